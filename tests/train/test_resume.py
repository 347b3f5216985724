"""A run that is killed and goes on is the run that was never stopped, bit for bit."""

import json
import random
from pathlib import Path

import pytest

from common.run_folder import RunFolder
from data.prepare import prepare
from data.sources import open_source
from tests.conftest import kill_and_resume
from train.resume import find_origin
from train.settings import TrainSettings

STEPS = 40
RUN = f"""
--tokens {STEPS * 256} --batch-tokens 256 --seq-len 32 --device cpu --precision 32
--micro-batch 1 --checkpoint.every 4 --eval.every 5120 --eval.tokens 500 --eval.continuation 4
--log.every 1 --log.tensorboard false --loader.streams 8
""".split()


def run(folder: Path, data: Path, model: Path, attempts: list[dict]) -> list[dict]:
    """Train in ``folder`` with the given attempts (see kill_and_resume.py); returns how each ended."""
    argv = [*RUN, "--data", str(data), "--init", str(model)]
    return kill_and_resume({"argv": argv, "attempts": [{"run": str(folder)} | attempt for attempt in attempts]})


def what_it_computed(folder: Path) -> tuple[list, bytes]:
    """Every loss, norm and validation figure of a run, and its final weights."""
    figures = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        record.pop("tokens_per_s", None)
        if "event" not in record:
            figures.append(record)
    return figures, (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def prepared(corpus: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "corpus"
    list(prepare(open_source(str(corpus)), tokenizer, folder, workers=0))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, corpus, micro_model, [{"argv": []}])
    figures, weights = what_it_computed(folder)
    assert [record["step"] for record in figures if "loss" in record] == list(range(1, STEPS + 1))
    return figures, weights


@pytest.mark.parametrize(
    ("form", "workers", "name", "kills"),
    [
        ("streamed", [0], "SIGKILL", 8),
        ("streamed", [2, 0, 2], "SIGKILL", 4),
        ("prepared", [0], "SIGKILL", 4),
        ("prepared", [2], "SIGKILL", 3),
        ("streamed", [0, 2], "SIGTERM", 4),
    ],
)
def test_kills_change_nothing(
    form: str, workers: list[int], name: str, kills: int, corpus, prepared, micro_model, uninterrupted, tmp_path
) -> None:
    rng = random.Random(f"{form} {workers} {name}")
    steps = sorted(rng.sample(range(1, STEPS - 8), kills))  # so that none comes after the end
    flags = [["--loader.workers", str(workers[i % len(workers)])] for i in range(kills)]
    attempts = [{"step": s, "signal": name, "argv": argv} for s, argv in zip(steps, flags, strict=True)]
    attempts.append({"argv": ["--loader.workers", str(workers[-1])]})
    data = corpus if form == "streamed" else prepared
    ends = run(tmp_path / "run", data, micro_model, attempts)
    assert [end["codes"] for end in ends[:-1]] == [[-9 if name == "SIGKILL" else 128 + 15]] * kills
    assert ends[-1]["codes"] == [0]
    figures, weights = what_it_computed(tmp_path / "run")
    assert figures == uninterrupted[0]
    assert weights == uninterrupted[1]


def test_a_signal_before_the_first_step_is_survived(corpus, micro_model, tmp_path) -> None:
    folder = tmp_path / "run"
    ends = run(folder, corpus, micro_model, [{"step": 0, "signal": "SIGUSR1", "argv": []}, {"argv": []}])
    assert ends[0]["codes"][0] in (128 + 10, -10)  # -10: it struck before Python ran the first line
    assert ends[1]["codes"] == [0]


def test_a_tokenizer_that_stands_where_the_runs_will_is_never_lost(tokenizer, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.tokenizer.mkdir()
    tokenizer.copy_to(run.tokenizer)
    find_origin(TrainSettings(tokenizer=str(run.tokenizer)), run, print, None)
    assert (run.tokenizer / "tokenizer.json").exists()  # named: it will be the run's
    find_origin(TrainSettings(), run, print, None)
    assert not run.tokenizer.exists()
    assert (tmp_path / "superseded-tokenizer" / "tokenizer.json").exists()
