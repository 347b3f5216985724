"""Which steps are not taken, and that those leave everything as it was."""

import json
import math
from pathlib import Path

import pytest
import torch

from tests.train.kill_and_resume import spoiled
from train import loop
from train.health import WARM, WINDOW, Guard
from train.settings import HealthSettings

CPU = torch.device("cpu")


def check(guard: Guard, norm: float, nll: float = 1.0) -> bool:
    return bool(guard.check(torch.tensor(nll), torch.tensor(norm)))


def steady(guard: Guard, steps: int) -> None:
    """Norms between 0.9 and 1.1."""
    for step in range(steps):
        assert not check(guard, 1 + 0.1 * math.sin(step))


@pytest.mark.parametrize(("nll", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_is_skipped_from_the_first_step(nll: float, norm: float) -> None:
    assert check(Guard(0.0, CPU), norm, nll)
    assert check(Guard(6.0, CPU), norm, nll)


def test_a_spike_is_skipped_once_enough_was_seen() -> None:
    guard = Guard(6.0, CPU)
    steady(guard, WARM - 1)
    assert not check(guard, 1.0)
    assert not check(guard, 1.3)
    assert check(guard, 2.0)
    assert not check(guard, 1.0)


def test_early_norms_may_be_anything() -> None:
    guard = Guard(6.0, CPU)
    assert not any(check(guard, norm) for norm in (1e3, 1.0, 1e4, 0.1))


def test_zero_looks_for_no_spikes() -> None:
    guard = Guard(0.0, CPU)
    steady(guard, WARM)
    assert not check(guard, 1e6)


@pytest.mark.parametrize("level", [1.5, 2.0, 3.0])
def test_a_lasting_change_of_level_is_accepted_before_patience_ends(level: float) -> None:
    guard = Guard(6.0, CPU)
    steady(guard, WINDOW)
    skipped = [check(guard, level) for _ in range(2 * HealthSettings().patience)]
    assert skipped[0]
    assert sum(skipped) < HealthSettings().patience
    assert not any(skipped[HealthSettings().patience :])


def test_what_is_not_finite_leaves_the_spread_alone() -> None:
    guard = Guard(6.0, CPU)
    steady(guard, WARM)
    before = {name: tensor.clone() for name, tensor in guard.tensors().items()}
    assert check(guard, math.nan)
    assert all(torch.equal(before[name], tensor) for name, tensor in guard.tensors().items())


def test_a_resumed_guard_decides_alike() -> None:
    guard, other = Guard(6.0, CPU), Guard(6.0, CPU)
    steady(guard, WARM + 10)
    for name, tensor in other.tensors().items():
        tensor.copy_(guard.tensors()[name])
    assert check(other, 2.0)


WORDS = """--tokens 7680 --batch-tokens 256 --seq-len 32 --device cpu --precision 32 --eval.every 0 --log.every 1
--log.tensorboard false --loader.streams 8 --checkpoint.every 5 --health.patience 4 --schedule.decay 1536""".split()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch, corpus: Path, micro_model: Path, tmp_path: Path):
    """Train with a loss that is NaN at the given steps; returns the run's folder."""
    from common import signals
    from train.__main__ import main

    def run(steps: list[int], *words: str) -> Path:
        monkeypatch.setattr(loop, "training_step", spoiled(steps))
        argv = ["train.py", *WORDS, "--run", str(tmp_path / "run"), "--data", str(corpus), "--init", str(micro_model)]
        monkeypatch.setattr("sys.argv", [*argv, *words])
        try:
            main()
        finally:
            signals.clear()
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing_and_is_logged(poisoned, optimizer: str) -> None:
    from train.checkpoint import read_weights

    run = poisoned([6, 7], "--optimizer.name", optimizer, "--keep-every", "1")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record.get("skipped")] == [6, 7]
    assert [record["loss"] for record in records if record.get("step") == 6 and "loss" in record] == [None]
    weights = [read_weights(run / "checkpoints" / f"step-{step:07d}") for step in (5, 7, 8)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    assert all(math.isfinite(record["loss"]) for record in records if record.get("step", 0) > 7 and "loss" in record)


def test_too_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(poisoned, capsys, tmp_path) -> None:
    with pytest.raises(SystemExit) as stop:
        poisoned([12, 13, 14, 15, 16])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "4 steps in a row were skipped" in said
    assert f"{tmp_path / 'run'}/checkpoints/step-0000010" in said
