"""Every strategy computes what one process does: losses, weights and checkpoints."""

import json
from pathlib import Path

import pytest

from tests.conftest import kill_and_resume

STEPS = 30
RUN = f"""
--tokens {STEPS * 512} --batch-tokens 512 --seq-len 32 --device cpu --precision 32 --optimizer.lr 1e-3
--schedule.warmup {10 * 512} --schedule.decay 0 --checkpoint.every 1000 --eval.every 0 --log.every 1
--log.tensorboard false --loader.streams 8 --micro-batch 4
""".split()


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def train(folder: Path, argv: list[str], world: int) -> list[float]:
    """Losses of a run on so many ranks."""
    plan = {"argv": [*RUN, "--run", str(folder), *argv], "run": str(folder), "attempts": [{"argv": [], "world": world}]}
    (end,) = kill_and_resume(plan)
    assert end["codes"] == [0] * world, end["log"][-3000:]
    found = losses(folder)
    assert len(found) == STEPS
    return found


@pytest.fixture(scope="module")
def alone(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Losses of one process, by further arguments."""
    known: dict[tuple[str, ...], list[float]] = {}

    def run(*argv: str) -> list[float]:
        if argv not in known:
            folder = tmp_path_factory.mktemp("alone") / "run"
            known[argv] = train(folder, ["--data", str(corpus), "--init", str(micro_model), *argv], 1)
        return known[argv]

    return run


MUON = ("--optimizer.name", "muon")
MUON_32 = (*MUON, "--optimizer.newton-schulz", "32")
MUON_16 = (*MUON, "--optimizer.newton-schulz", "bf16")


@pytest.mark.parametrize(
    ("strategy", "world", "optimizer", "argv", "tolerance"),
    [
        ("ddp", 2, (), "--micro-batch 8", 1e-5),
        ("ddp", 2, (), "--micro-batch 4", 1e-5),  # accumulation 2
        ("ddp", 2, (), "--activation-checkpointing full", 1e-5),
        ("ddp", 2, MUON_32, "", 1e-5),
        ("ddp", 2, MUON_16, "", 1e-3),
        ("fsdp", 2, (), "--micro-batch 8", 1e-5),
        ("fsdp", 2, (), "--micro-batch 4", 1e-5),
        ("fsdp", 2, (), "--activation-checkpointing selective", 1e-5),
        ("fsdp", 2, (), "--activation-checkpointing full", 1e-5),
        ("fsdp", 2, MUON_32, "", 1e-5),
        ("fsdp", 2, MUON_16, "", 1e-3),
        ("deepspeed-2", 2, (), "--micro-batch 8", 1e-5),
        ("deepspeed-2", 2, (), "--micro-batch 4", 1e-5),
        ("deepspeed-3", 2, (), "--micro-batch 8", 1e-5),
        ("deepspeed-3", 2, (), "--micro-batch 4 --activation-checkpointing full", 1e-5),
        ("deepspeed-3-offload", 2, (), "--micro-batch 4", 1e-5),
    ],
)
def test_the_losses_are_those_of_one_process(
    strategy, world, optimizer, argv, tolerance, alone, corpus, micro_model, tmp_path
) -> None:
    expected = alone(*optimizer)
    words = ["--data", str(corpus), "--init", str(micro_model), "--strategy", strategy, *optimizer, *argv.split()]
    found = train(tmp_path / "run", words, world)
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    print(f"{strategy} {argv}: {worst:.1e}")
    assert worst < tolerance
