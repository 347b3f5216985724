"""The training loop waits for the GPU nowhere between two steps; collected only where there is a GPU."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from common.distributed import Job
from data.packing import Batch, make_batch
from models.sizes import ModelConfig
from models.transformer import Transformer, initial_weight
from train.engine import Engine
from train.loop import training_step
from train.meter import Outcome, Stopwatch
from train.optimizer import make_optimizers
from train.settings import OptimizerSettings

CONFIG = ModelConfig(2, 64, 4, 2, 16, 128, 128, 64, tied=True, qk_norm=True)


class Rows:
    """Rows of random documents."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def take(self, rows: int) -> Batch:
        return make_batch(self._random.integers(CONFIG.vocab, size=(rows, 65), dtype=np.uint16), end=0)


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises; an event that it waits for in so many words does not."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def training(device: str, optimizer: str, compiled: bool) -> Any:
    """What a step needs of a run, with micro-batches, clipping, and steps that are judged."""

    def build() -> nn.Module:
        model = Transformer(CONFIG, seed=None)
        if compiled:
            model.compile_parts()
        return model

    settings = OptimizerSettings(name=optimizer, lr=1e-3, beta2=0.95)  # type: ignore[arg-type]
    engine = Engine(
        Fabric(accelerator=device, devices=1, precision="bf16-mixed"),
        Job(),
        build=build,
        values=lambda name, shape: initial_weight(name, shape, CONFIG, 0),
        make_optimizers=lambda raw: make_optimizers(raw, settings, "bf16"),
        spike=6.0,
    )

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return model(batch["inputs"], batch["positions"], batch["targets"])

    return SimpleNamespace(engine=engine, batches=Rows(), objective=objective, rows=8, micro_rows=4, clip=1.0)


def take(run: Any) -> Outcome:
    """Launch a step as the loop does; what it came to is on its way."""
    watch = Stopwatch(run.engine.device)
    return Outcome(1, 1, 1e-3, training_step(run, 1e-3, asks=[0.0, 0.0, 0.0], watch=watch), watch)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_is_launched_without_waiting(optimizer: str, compiled: bool) -> None:
    run = training("cuda", optimizer, compiled)
    for _ in range(3):  # compilation and the optimiser's first step may wait
        take(run)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    outcomes = [take(run) for _ in range(3)]
    losses = [outcome.loss for outcome in outcomes]  # read late
    torch.cuda.set_sync_debug_mode("default")
    assert all(0 < loss < 10 for loss in losses)
    assert outcomes[0].seconds > 0
