"""Prompts out and answers in, without a model; and the same tasks through lm-evaluation-harness."""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from scoring import sandbox
from scoring.answers import Answers
from scoring.competition import GROUPS, TASKS, score_outputs, task_score
from scoring.competition.data import read_rows
from scoring.competition.open_books import rescore, write_prompts
from scoring.competition.prompts import base_prompt, chat_messages
from scoring.competition.shots import read_shots
from scoring.requests import Request
from scoring.sample import FOLDER as SAMPLE

BBH = ("bbh_date_understanding", "bbh_boolean_expressions")
NAMES = [name for group, names in GROUPS.items() for name in (BBH if group == "bbh" else names)]

RIGHT = {
    "commonsense_qa": "So the answer is {}.",
    "bbh_date_understanding": "So the answer is ({}).",
    "bbh_boolean_expressions": "So the answer is {}.",
    "gsm8k": "The answer is {}",
    "humaneval": "{}",
    "chid": "{}",
    "truthfulqa": "{}",
}
"""What a model writes that knows the answer."""

SANDBOX = pytest.mark.skipif(sandbox.available() is not None, reason=f"no sandbox: {sandbox.available()}")


def right(name: str, number: int) -> str:
    return RIGHT[name].format(TASKS[name].gold(read_rows(TASKS[name], SAMPLE)[number]))


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_are_written_as_they_are_sent(tmp_path: Path) -> None:
    count = write_prompts(tmp_path / "prompts.jsonl", SAMPLE, NAMES)
    lines = read_lines(tmp_path / "prompts.jsonl")
    assert count == len(lines)
    assert Counter(line["task"] for line in lines) == {name: len(read_rows(TASKS[name], SAMPLE)) for name in NAMES}
    for line in lines:
        task = TASKS[line["task"]]
        assert line["prompt"] == base_prompt(task, read_rows(task, SAMPLE)[line["row"]], read_shots(SAMPLE))


def test_prompts_of_a_limit_keep_their_rows_and_chats_are_rendered(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    assert write_prompts(path, SAMPLE, ["gsm8k"], 3, seed=5, template=json.dumps) == 3
    rows = read_rows(TASKS["gsm8k"], SAMPLE)
    for line in read_lines(path):
        expected = chat_messages(TASKS["gsm8k"], rows[line["row"]], read_shots(SAMPLE))
        assert json.loads(line["prompt"]) == expected


@SANDBOX
def test_given_answers_are_scored_without_a_model(tmp_path: Path) -> None:
    """Odd rows are right, the others empty; HumanEval's programs run in the sandbox."""
    lines = [
        {"task": name, "row": number, "output": right(name, number) if number % 2 else "", "seconds": 1.5}
        for name in NAMES
        for number in reversed(range(len(read_rows(TASKS[name], SAMPLE))))
    ]
    answers = tmp_path / "answers.jsonl.gz"
    answers.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    summary = rescore(answers, SAMPLE, out=tmp_path / "scored.jsonl")
    scored = read_lines(tmp_path / "scored.jsonl")
    assert [{key: line[key] for key in ("task", "row", "output", "seconds")} for line in scored if line["task"]] == [
        line for name in dict.fromkeys(line["task"] for line in lines) for line in lines if line["task"] == name
    ]
    for line in scored:
        skipped = line["task"] == "truthfulqa" and line["row"] % 2 == 0
        assert line["correct"] == (None if skipped else line["row"] % 2 == 1), line
    assert summary["tasks"]["gsm8k"] == {"score": 50.0, "answered": 8, "rows": 8}
    assert summary["tasks"]["truthfulqa"]["score"] == 100.0
    assert summary["tasks"]["truthfulqa"]["bleu_max"] > 0.9
    assert summary["groups"] == dict.fromkeys(GROUPS, 50.0) | {"truthfulqa": 100.0}
    assert "bbh is the mean of 2 of its 27 tasks" in summary["warnings"]
    assert "gsm8k has 8 rows where published scores are over 1,319" in summary["warnings"]


def test_a_run_s_answers_with_broken_characters_are_scored_and_kept(tmp_path: Path, monkeypatch) -> None:
    """Some tokenizers decode broken bytes to lone surrogates, which no UTF-8 file can hold."""
    monkeypatch.setattr(sandbox, "available", lambda: "none here")
    given = {name: f"\ud83d {right(name, 0)}" for name in NAMES}
    with Answers(tmp_path / "answers.jsonl", {}) as answers:
        for name, output in given.items():
            answers.keep(Request(name, 0, "", 8), output)
    summary = rescore(tmp_path / "answers.jsonl", SAMPLE, out=tmp_path / "scored.jsonl")
    assert summary["tasks"]["gsm8k"]["score"] == 100
    scored = read_lines(tmp_path / "scored.jsonl")
    assert {line["task"]: line["output"] for line in scored} == given
    assert rescore(tmp_path / "scored.jsonl", SAMPLE, out=tmp_path / "again.jsonl") == summary
    assert read_lines(tmp_path / "again.jsonl") == scored


def test_programs_without_a_sandbox_are_said_not_to_have_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "available", lambda: "bubblewrap is missing; install it")
    answers = write_lines(tmp_path / "a.jsonl", [{"task": "humaneval", "row": 0, "output": right("humaneval", 0)}])
    summary = rescore(answers, SAMPLE, out=tmp_path / "scored.jsonl")
    assert summary["tasks"]["humaneval"]["score"] is None
    assert summary["groups"] == {"humaneval": None}
    assert "humaneval was not run: bubblewrap is missing; install it" in summary["warnings"]
    assert read_lines(tmp_path / "scored.jsonl")[0]["correct"] is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no answers; a line is"),
        ([{"task": "gsm8k", "row": 0}], "line 1 of .* is no answer"),
        ([{"task": "gsm8k", "row": "0", "output": ""}], "line 1 of .* is no answer"),
        ([{"task": "gsm8k", "row": True, "output": ""}], "line 1 of .* is no answer"),
        ([{"task": "bbh", "row": 0, "output": ""}], "line 1 of .* answers 'bbh', which is no task; there are comm"),
        ([{"task": "gsm8k", "row": 8, "output": ""}], "an answer to row 8 of gsm8k, whose rows are 0 to 7"),
        ([{"task": "gsm8k", "row": 1, "output": ""}] * 2, "line 2 of .* answers row 1 of gsm8k again"),
    ],
)
def test_what_is_no_answer_is_named(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rescore(write_lines(tmp_path / "a.jsonl", lines), SAMPLE, out=tmp_path / "scored.jsonl")
    assert not (tmp_path / "scored.jsonl").exists()


def test_damaged_and_missing_files_of_answers_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"task": "gsm8k", "row": 0, "output": "1"}\n{"task":')
    with pytest.raises(UserError, match="line 2 of .* is no valid JSON"):
        rescore(tmp_path / "a.jsonl", SAMPLE, out=tmp_path / "b.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        rescore(tmp_path / "a.jsonl", SAMPLE, out=tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="missing.jsonl cannot be read"):
        rescore(tmp_path / "missing.jsonl", SAMPLE, out=tmp_path / "b.jsonl")


def test_the_harness_asks_the_same_prompts_and_gives_the_same_scores() -> None:
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate

    from scoring.competition import harness

    class Knowing(LM):
        """Answers odd rows right."""

        def generate_until(self, requests: list[Any]) -> list[str]:
            self.requests = requests
            return [right(one.task_name, one.doc["row"]) if one.doc["row"] % 2 else " " for one in requests]

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return json.dumps(chat_history)

        tokenizer_name = "none"

    model = Knowing()
    results = evaluate(model, harness.load(NAMES, SAMPLE, max_new_tokens=100), bootstrap_iters=0)
    for request in model.requests:
        task, row = TASKS[request.task_name], request.doc["row"]
        assert request.args[0] == base_prompt(task, read_rows(task, SAMPLE)[row], read_shots(SAMPLE))
        assert request.args[1] == {
            "until": [],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": task.max_new_tokens or 100,
        }
    outputs = harness.answered(results)
    for name, found in outputs.items():
        assert found.numbers == list(range(len(read_rows(TASKS[name], SAMPLE))))
        if name != "humaneval":  # its programs are run when all answers are there
            scored, _ = score_outputs(TASKS[name], found.rows, found.outputs)
            assert results["results"][name]["score,none"] == pytest.approx(task_score(TASKS[name], scored))
    assert outputs["humaneval"].outputs[1] == right("humaneval", 1)
    assert "score,none" not in results["results"]["humaneval"]

    limited = harness.load(["gsm8k"], SAMPLE, limit=3, seed=1)
    results = evaluate(model, limited, bootstrap_iters=0, apply_chat_template=True)
    assert len(model.requests) == 3
    assert json.loads(model.requests[0].args[0])[-1]["content"].endswith("Answer:\n")
