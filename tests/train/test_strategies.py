"""Every strategy computes what one process does."""

import json
from pathlib import Path

import pytest
import torch

from models.sizes import adapt, size
from models.transformer import initial_weight
from tests.conftest import kill_and_resume
from train.checkpoint import read_weights

STEPS = 15
RUN = f"""
--tokens {STEPS * 512} --batch-tokens 512 --seq-len 32 --device cpu --precision 32 --optimizer.lr 1e-3
--schedule.warmup {5 * 512} --schedule.decay 0 --checkpoint.every 1000 --eval.every 0 --log.every 1
--log.tensorboard false --loader.streams 8 --micro-batch 4
""".split()

ADAMW = ""
MUON_32 = "--optimizer.name muon --optimizer.newton-schulz 32"
MUON_16 = "--optimizer.name muon --optimizer.newton-schulz bf16"
TAUGHT = "--teacher MODEL --distill.weight 0.5"

VARIANTS = [
    # strategy, ranks, optimiser, more settings (4 rows of 16 are two micro-batches on two ranks), tolerance
    ("ddp", 2, ADAMW, "--micro-batch 8", 1e-5),
    ("ddp", 2, ADAMW, "--micro-batch 4", 1e-5),
    ("ddp", 2, ADAMW, "--activation-checkpointing selective", 1e-5),
    ("ddp", 2, MUON_32, "", 1e-5),
    ("ddp", 2, MUON_16, "", 1e-3),
    ("fsdp", 2, ADAMW, "--micro-batch 8", 1e-5),
    ("fsdp", 2, ADAMW, "--micro-batch 4", 1e-5),
    ("fsdp", 2, ADAMW, "--activation-checkpointing full", 1e-5),
    ("fsdp", 2, MUON_32, "", 1e-5),
    ("fsdp", 2, MUON_16, "", 1e-3),
    ("fsdp", 2, TAUGHT, "", 1e-5),
    ("hsdp", 4, ADAMW, "--micro-batch 2", 1e-5),
    ("ddp", 2, ADAMW, "--compile on", 1e-5),
    ("fsdp", 2, ADAMW, "--compile on --activation-checkpointing full", 1e-5),
    # bf16 rounds to 8 bits: these show that the mixed precision of each works, not that it is exact.
    ("fsdp", 2, ADAMW, "--precision bf16", 2e-3),
]


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def run_variants(variants: list, corpus: Path, model: Path, base: Path) -> dict[str, list[float]]:
    """The losses of variants and of one process alone, all run by one program, by their settings."""
    optimizers = sorted({optimizer for _, _, optimizer, _, _ in variants})
    attempts = [{"run": str(base / (o or "adamw")), "argv": o.split(), "world": 1} for o in optimizers]
    for strategy, world, optimizer, argv, _ in variants:
        words = ["--strategy", strategy, *optimizer.split(), *argv.split()]
        attempts.append({"run": str(base / " ".join(words)), "argv": words, "world": world})
        if strategy == "hsdp":
            attempts[-1]["devices"] = 2
    for attempt in attempts:
        attempt["argv"] = [str(model) if word == "MODEL" else word for word in attempt["argv"]]
    ends = kill_and_resume({"argv": [*RUN, "--data", str(corpus), "--init", str(model)], "attempts": attempts})
    for attempt, end in zip(attempts, ends, strict=True):
        assert end["codes"] == [0] * attempt["world"], end["log"][-3000:]
    return {Path(attempt["run"]).name: losses(Path(attempt["run"])) for attempt in attempts}


def compare(variant: tuple, found: dict[str, list[float]]) -> None:
    """Hold the losses of a variant to those of one process."""
    strategy, _, optimizer, argv, tolerance = variant
    name = " ".join(["--strategy", strategy, *optimizer.split(), *argv.split()])
    expected = found[optimizer or "adamw"]
    assert len(expected) == len(found[name]) == STEPS
    worst = max(abs(a - b) / abs(b) for a, b in zip(found[name], expected, strict=True))
    print(f"{name}: {worst:.1e}")
    assert worst < tolerance


@pytest.fixture(scope="module")
def found(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return run_variants(VARIANTS, corpus, micro_model, tmp_path_factory.mktemp("strategies"))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(map(str, variant[:4])))
def test_the_losses_are_those_of_one_process(variant: tuple, found) -> None:
    compare(variant, found)


STRATEGIES = ("ddp", "fsdp", "deepspeed-2", "deepspeed-3")


@pytest.fixture(scope="module")
def poisoned(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """The steps of runs in which the loss of one rank of two is NaN in steps 6 and 7."""
    base = tmp_path_factory.mktemp("poisoned")
    attempts = [
        {"run": str(base / name), "argv": ["--strategy", name, "--tokens", "5120"], "world": 2, "poison": [6, 7]}
        for name in STRATEGIES
    ]
    ends = kill_and_resume({"argv": [*RUN, "--data", str(corpus), "--init", str(micro_model)], "attempts": attempts})
    assert [end["codes"] for end in ends] == [[0, 0]] * len(STRATEGIES), ends[0]["log"][-3000:]
    lines = {name: (base / name / "metrics.jsonl").read_text().splitlines() for name in STRATEGIES}
    return {name: [r for r in map(json.loads, lines[name]) if "loss" in r] for name in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_skip_a_step_that_one_of_them_has_lost(strategy: str, poisoned) -> None:
    steps = poisoned[strategy]
    assert [step["step"] for step in steps if step.get("skipped")] == [6, 7]
    assert [step["step"] for step in steps if step["loss"] is None] == [6, 7]
    # The weights are those of step 5, and training goes on from there.
    assert steps[7]["loss"] == pytest.approx(steps[4]["loss"], abs=0.1)
    assert len(steps) == 10


@pytest.fixture(scope="module")
def first_weights(corpus: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Weights that each strategy begins with, after a step at a rate of nothing."""
    base = tmp_path_factory.mktemp("first")
    argv = f"""--size tiny --model.vocab 512 --tokens 512 --batch-tokens 512 --seq-len 32 --device cpu --precision 32
        --optimizer.lr 1e-12 --eval.every 0 --log.tensorboard false --loader.streams 8 --data {corpus}
        --tokenizer {tokenizer.folder}""".split()
    attempts = [{"run": str(base / strategy), "argv": ["--strategy", strategy], "world": 2} for strategy in STRATEGIES]
    ends = kill_and_resume({"argv": argv, "attempts": attempts})
    assert [end["codes"] for end in ends] == [[0, 0]] * len(STRATEGIES), ends[0]["log"][-3000:]
    return {name: read_weights(base / name / "checkpoints" / "step-0000001") for name in STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_weights_are_drawn_as_intended(strategy: str, first_weights) -> None:
    """Under ZeRO-3 parameters are empty when they are filled, and an assignment would go nowhere."""
    config = adapt(size("tiny").config, vocab=512)
    weights = first_weights[strategy]
    assert len(weights) == 2 + config.layers * 8
    for name, weight in weights.items():
        assert torch.allclose(weight, initial_weight(name, weight.shape, config, seed=0), atol=1e-7)
    assert weights["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["blocks.3.ffn.down.weight"].std().item() == pytest.approx(0.02 / 12**0.5, rel=0.02)
