"""The quick tasks: rows of both origins, requests as lm-evaluation-harness makes them, and its evaluator's verdict."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks._yaml_loader import load_yaml

from common.errors import UserError
from scoring.quick import TASKS
from scoring.quick.forms import arc
from scoring.quick.harness import load
from scoring.quick.rows import other_count, read_rows
from tests.scoring.eval_folder import write_quick

THEIRS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag_validation", "validation"),
    "piqa": ("piqa/piqa.yaml", "piqa_validation", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "arc_easy_validation", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "arc_challenge_validation", "test"),
    "winogrande": ("winogrande/default.yaml", "winogrande_xl_validation", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "openbookqa_validation", "test"),
    "lambada": ("lambada/lambada_openai.yaml", "lambada_openai_test", "test"),
}
"""Our task, and the harness's: its file, rows in its published format, the split that it reads."""


def first_rows(shared: Path, stem: str, count: int) -> Iterator[dict]:
    with gzip.open(shared / "datasets" / "eval" / "extra" / f"{stem}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line, _ in zip(lines, range(count), strict=False):
            yield json.loads(line)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def requests_of(task) -> list[tuple]:
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("name", THEIRS)
def test_requests_are_those_of_the_harness(name: str, shared: Path, tmp_path: Path) -> None:
    _, stem, split = THEIRS[name]
    rows = tmp_path / TASKS[name].file
    write_rows(rows, list(first_rows(shared, stem, 40)))
    local = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(tmp_path / TASKS[name].file)},
            "cache_dir": str(tmp_path / "cache"),
        },
        "training_split": None,
        "validation_split": split if split == "validation" else None,
        "test_split": split if split == "test" else None,
    }
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / THEIRS[name][0]) | local
    theirs = ConfigurableTask(config={key: value for key, value in config.items() if key != "tag"})
    ours = load([name], tmp_path)["tasks"][name]
    assert requests_of(ours) == requests_of(theirs)
    assert [ours.doc_to_target(doc) for doc in ours.eval_docs] == [
        theirs.doc_to_target(doc) for doc in theirs.eval_docs
    ]


def test_all_rows_are_there_and_every_answer_is_one_of_the_choices(shared: Path) -> None:
    for name, task in TASKS.items():
        rows = read_rows(name, shared / "datasets" / "eval")
        assert other_count(name, len(rows)) is None
        if name == "lambada":
            continue
        choices = [len(row["choices"] if "choices" in row else row["contexts"]) for row in rows]
        assert all(row["gold"] in range(count) for row, count in zip(rows, choices, strict=True))
        assert 100 * sum(1 / count for count in choices) / len(rows) == pytest.approx(task.chance, abs=0.1)
    assert other_count("piqa", 20) == "piqa has 20 rows; published are 1,838"


def test_a_query_that_is_written_out_is_the_one_that_is_made(shared: Path) -> None:
    for row in first_rows(shared, "arc_easy_test", 50):
        labels = list("ABCDE")[: len(row["choices"])]
        published = {
            "question": row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["gold"]],
        }
        assert arc(row) == arc(published)


class Oracle(LM):
    """Likelihoods by a rule, no model."""

    def __init__(self, likely: set[tuple[str, str]]) -> None:
        super().__init__()
        self._likely = likely

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-1.0, True) if request.args in self._likely else (-500.0, False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


def test_the_evaluator_gives_full_marks_to_the_right_answers_and_none_to_wrong_ones(tmp_path: Path) -> None:
    write_quick(tmp_path / "extra")
    question = "Question: What does water become when it freezes?\nAnswer:"
    likely = {
        (question, " ice"),
        ("Water that freezes becomes", " ice"),
        ("Ice floats on water.\nQuestion: does ice float?\nAnswer:", " yes"),
        ("Question: Keep bread fresh.\nAnswer:", " Wrap it."),
        ("The jug did not fit into the basket because the jug", " was too wide."),
        ("Baking: A woman opens an oven. She", " takes out a loaf."),
        ("He put the letter into the envelope and licked the", " stamp"),
    }
    results = evaluate(Oracle(likely), load(list(TASKS), tmp_path), bootstrap_iters=0)
    scores = {name: results["results"][name][f"{TASKS[name].metric},none"] for name in TASKS}
    assert scores == {name: float(name != "arc_challenge") for name in TASKS}


def test_what_is_wrong_with_the_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no piqa_validation\.jsonl.*leave --data out"):
        load(["piqa"], tmp_path)
    file = tmp_path / "piqa_validation.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"goal": "x"}\n' * 2000)[:-9])
    with pytest.raises(UserError, match=r"row 1 of .*piqa_validation.* not in the format of piqa: KeyError\('sol1'\)"):
        load(["piqa"], tmp_path)
    good = json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": 0}).encode()
    file.write_bytes(gzip.compress(good + b"\n{"))
    with pytest.raises(UserError, match="line 2 of .* is no JSON record"):
        load(["piqa"], tmp_path)
    file.write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        load(["piqa"], tmp_path)
    file.write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="there is no row"):
        load(["piqa"], tmp_path)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"baber/piqa cannot be had from the hub .*--data DIR"):
        read_rows("piqa", None)
