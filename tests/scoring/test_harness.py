"""Our model class under lm-evaluation-harness's evaluator: competition and other tasks, killed and resumed runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate

from common.console import Console
from common.errors import UserError
from scoring.answers import Answers
from scoring.competition.harness import answered
from scoring.competition.harness import load as load_competition
from scoring.generation import GenerationSettings, Generator
from scoring.harness import FolderModel, answer_all, cut, render_chat, request_of, stop_strings
from scoring.loading import load
from scoring.progress import Progress
from scoring.quick.harness import load as load_quick
from scoring.requests import Keep, Request
from tests.conftest import ROOT

TASKS = ["gsm8k", "chid", "commonsense_qa"]

SAMPLE = ROOT / "scoring" / "sample"


class KilledError(Exception):
    """Stands for the end of the program."""


class Echo:
    """An engine that is none of ours: it says the end of the prompt."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request], keep: Keep) -> None:
        for request in requests:
            self.asked.append(request)
            keep(request, request.prompt[-3:])


@pytest.fixture(scope="module")
def loaded(micro_model: Path) -> tuple[Any, Any]:
    return load(micro_model, "cpu")


@pytest.fixture(scope="module")
def generator(loaded: tuple[Any, Any]) -> Generator:
    return Generator(*loaded, GenerationSettings(batch_size=4))


def instance(options: dict[str, Any], task: str = "t", doc: dict[str, Any] | None = None) -> Instance:
    return Instance("generate_until", doc or {}, ("Say 12:", options), 0, metadata=(task, 5, 1))


def ask(count: int) -> list[Request]:
    return [Request("t", row, f"the number {row} is", 6) for row in range(count)]


def outputs(generator: Generator, answers: Answers | None = None) -> Any:
    tasks = load_competition(TASKS, SAMPLE, limit=5, seed=1, max_new_tokens=6)
    found = evaluate(FolderModel(generator, generator.tokenizer, answers), tasks, bootstrap_iters=0)
    return {name: (one.numbers, one.outputs) for name, one in answered(found).items()}


def test_a_killed_run_goes_on_to_the_same_answers(generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    whole = outputs(generator)
    assert {name: len(texts) for name, (_, texts) in whole.items()} == dict.fromkeys(TASKS, 5)

    class Dying(Answers):
        def keep(self, request: Request, output: str) -> None:
            if len(self.outputs) == 6:
                raise KilledError
            super().keep(request, output)

    with Dying(path, generator.asked) as answers, pytest.raises(KilledError):
        outputs(generator, answers)
    with Answers(path, generator.asked) as answers:
        before = dict(answers.outputs)
        assert len(before) == 6
        assert outputs(generator, answers) == whole
        assert before.items() <= answers.outputs.items()
    assert {(name, number): text for name, found in whole.items() for number, text in zip(*found, strict=True)} == (
        answers.outputs
    )


def test_quick_tasks_are_scored_by_likelihood(shared: Path, generator: Generator) -> None:
    tasks = load_quick(["boolq", "lambada"], shared / "datasets" / "eval" / "extra")
    found = evaluate(FolderModel(generator, generator.tokenizer), tasks, limit=4, bootstrap_iters=0)
    assert found["results"].keys() == {"boolq", "lambada"}


def test_another_engine_is_asked_for_what_is_missing(tmp_path: Path) -> None:
    requests = ask(4)
    for expected in (4, 0):
        engine = Echo()
        with Answers(tmp_path / "a.jsonl", {}) as answers:
            if expected:
                answers.begin(requests, list)
                answers.keep(requests[2], "kept")
            found = answer_all(engine, requests, answers, Console(rank=1))
        assert len(engine.asked) == max(expected - 1, 0)
        assert found == {("t", 0): " is", ("t", 1): " is", ("t", 2): "kept", ("t", 3): " is"}


def test_another_engine_has_no_likelihoods(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="--engine transformers"):
        FolderModel(Echo(), loaded[1]).loglikelihood([])


def test_answers_are_cut_at_their_tasks_strings(loaded: tuple[Any, Any]) -> None:
    model = FolderModel(Echo(), loaded[1])
    options = [{"until": []}, {"until": ":"}, {"until": ["2:", "1"]}]
    assert [model.generate_until([instance(one)]) for one in options] == [["12:"], ["12"], [""]]


def test_a_task_of_the_harness_stops_at_its_strings() -> None:
    request = request_of(instance({"until": ["\n\n"], "max_gen_toks": 7}, "gsm8k"))
    assert (request.task, request.row, request.prompt, request.max_new_tokens) == ("gsm8k", 5, "Say 12:", 7)
    assert [request.finished(text) for text in ("Question:", "so\n\n")] == [False, True]


def test_a_task_of_the_competition_stops_where_its_score_is_decided() -> None:
    request = request_of(instance({"until": []}, "chid", {"task": "chid", "row": 77, "fields": {}}))
    assert (request.row, request.max_new_tokens) == (77, 256)
    assert [request.finished(text) for text in ("答", "答A")] == [False, True]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"temperature": 0.7}])
def test_sampling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="asks for sampling"):
        request_of(instance(options))


def test_stop_strings_come_in_any_form() -> None:
    assert [stop_strings({"until": until}) for until in (None, "", "a", ["a", ""])] == [[], [], ["a"], ["a"]]
    assert cut("one. two! three.", ["!", "."]) == "one"


def test_a_chat_is_rendered_by_the_models_template(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    text = FolderModel(Echo(), tokenizer).apply_chat_template([{"role": "user", "content": "Hi\n"}])
    assert text == "<|begin|><|user|>Hi<|turn_end|><|assistant|>"
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(UserError, match="no chat template.*--form base"):
            render_chat(tokenizer, [])
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        with pytest.raises(UserError, match="refuses"):
            render_chat(tokenizer, [{"role": "user", "content": "Hi"}])
    finally:
        tokenizer.chat_template = template


def test_progress_is_told_for_each_task(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(Console(), ["a"] * 3 + ["b"] * 2, ["a"]) as progress:
        for task in "aabb":
            progress.add(task)
    assert capsys.readouterr().out.splitlines() == ["60.0%  a 3/3", "100.0%  b 2/2"]
