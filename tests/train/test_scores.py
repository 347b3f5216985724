"""Scores in the loop: the same as of the model folder that the run leaves."""

import json
from pathlib import Path

import pytest

from scoring.generation import Generator
from scoring.harness import FolderModel
from scoring.loading import load
from scoring.quick.scores import score_quick
from tests.forked import forked
from train.settings import ScoreInLoop

ROWS = [
    {"goal": f"To count to {n}", "sol1": f"say {n}", "sol2": "go home and sleep", "label": n % 2} for n in range(12)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "piqa_validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("spread", [(), ("--strategy", "fsdp", "--devices", "2")])
def test_scores_in_the_loop_are_those_of_the_model_folder(
    spread: tuple[str, ...], data: Path, corpus: Path, tokenizer, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--size", "tiny", "--model.vocab", "512", "--data", corpus, "--tokenizer", tokenizer.folder, "--run", run]
    words += ["--tokens", "4096", "--batch-tokens", "512", "--seq-len", "64", "--eval.every", "1024"]
    words += ["--eval.continuation", "0", "--eval.tokens", "1000", "--eval.scores", f"piqa@every=2000,data={data}"]
    done = forked().run("train.py", *words, *spread, "--optimizer.lr", "4e-3")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["score/piqa"] for line in lines if "score/piqa" in line}
    assert list(scores) == [4, 8]  # 2,048 and 4,096 tokens
    [found], _ = score_quick(FolderModel(Generator(*load(run / "model")), load(run / "model")[1]), ["piqa"], data)
    assert scores[8] == pytest.approx(found.score)


def test_what_may_be_asked_for() -> None:
    asked = ScoreInLoop.parse("hellaswag+piqa@every=5e7,limit=200,data=some/folder")
    assert (asked.tasks, asked.every, asked.limit) == (["hellaswag", "piqa"], 50_000_000, 200)
    assert str(ScoreInLoop.parse(str(asked))) == str(asked)
    assert len(ScoreInLoop.parse("quick@every=1e8").tasks) == 8


@pytest.mark.parametrize("wrong", ["quick", "quick@every=0", "mmlu@every=1e8", "quick@every=1e8,rows=3", "@every=5"])
def test_anything_else_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="every|neither"):
        ScoreInLoop.parse(wrong)
