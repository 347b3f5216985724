"""What a recipe's training costs before it starts: the arithmetic of ``python train.py --plan``, for every stage.

A stage that reads a model takes its shape from the stage that makes it, or from the folder's ``config.json``. Stages
that do not train (scoring, pruning itself, export) are not estimated. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.console import duration
from common.errors import UserError
from models import budget, gpus
from models.hf_config import from_config, is_ours, nearest_shape, taken_values, to_config
from models.sizes import ModelConfig
from pipeline.settings import Recipe
from pipeline.stages import Task
from pruning.plan import candidates
from pruning.shapes import resized
from sft import settings as sft_settings
from train.plan import ASSUMED_MFU, DEFAULT_GPU, MEASURED_MFU, Machine, best, tokens_per_second, workload_of
from train.settings import RunSettings, TrainSettings, model_config, resolve


@dataclass(frozen=True)
class Cost:
    """What a stage that trains will cost."""

    stage: str
    parameters: int
    tokens: int
    machine: Machine
    mfu: float
    measured: bool
    """Whether the MFU has been measured for this size on this GPU."""
    seconds: float

    @property
    def gpu_hours(self) -> float:
        """Of all devices together."""
        return self.seconds / 3600 * self.machine.world

    def line(self, price: float | None) -> str:
        """The cost in words."""
        spread = f" on {self.machine.nodes} nodes" if self.machine.nodes > 1 else ""
        money = "" if price is None else f", ${self.gpu_hours * price:,.2f} at ${price:g}"
        return (
            f"{self.stage}: {self.parameters / 1e6:,.0f} M parameters on {_count(self.tokens)} tokens, "
            f"{self.machine.world} × {self.machine.gpu.name}{spread} at {self.mfu:.0%} MFU "
            f"({'measured' if self.measured else 'assumed'}): {duration(self.seconds)}, {self.gpu_hours:,.1f} GPU-hours"
            f"{money}"
        )


def print_plan(recipe: Recipe, every: Sequence[Task], gpu: str | None, price: float | None) -> None:
    """Print a line for every stage that trains, and their sum.

    Raises:
        UserError: no such GPU, the devices cannot share a batch, or a model that the recipe starts from is not there.
    """
    for line in plan(recipe, every, gpu, price):
        print(line)


def plan(recipe: Recipe, every: Sequence[Task], gpu: str | None = None, price: float | None = None) -> list[str]:
    """The lines of :func:`print_plan`; the GPU and the price are the recipe's where none is given."""
    price = price if price is not None else recipe.price
    card = gpus.gpu(gpu or recipe.gpu or DEFAULT_GPU)
    shapes = _Shapes(every)
    costs = [_cost(task, shapes, card) for task in every if task.kind.trains]
    hours = sum(cost.gpu_hours for cost in costs)
    money = "" if price is None else f", ${hours * price:,.2f}"
    return [
        *(cost.line(price) for cost in costs),
        f"in all: {duration(sum(cost.seconds for cost in costs))} of training, {hours:,.1f} GPU-hours{money}",
    ]


def _cost(task: Task, shapes: "_Shapes", card: gpus.Gpu) -> Cost:
    machine, asked = _machine(task, card), task.settings
    settings: RunSettings
    if isinstance(asked, TrainSettings):
        config = shapes.of(Path(asked.init)) if asked.init else model_config(asked)
        settings = resolve(asked, config, machine.world)
    else:
        if asked.tokens is None:
            raise UserError(
                f"stage {task.name}: how long its data is shows when it is read; give it tokens to plan with"
            )
        config = shapes.of(Path(asked.model))
        settings = sft_settings.resolve(asked, config, own=True, rows=None, world=machine.world)
    assert settings.tokens is not None
    assert settings.seq_len is not None
    teacher = shapes.of(Path(asked.teacher)) if asked.teacher else None
    job = workload_of(settings, config, machine)
    if teacher is not None:
        job = replace(job, taken=job.value_bytes * budget.parameters(teacher).total)
    size = getattr(asked, "size", None)
    measured = MEASURED_MFU.get((card.name, size or ""))
    mfu = measured or ASSUMED_MFU
    rate = tokens_per_second(config, settings.seq_len, machine, best(job).checkpointing, mfu, teacher)
    count = budget.parameters(config).total
    return Cost(task.name, count, settings.tokens, machine, mfu, measured is not None, settings.tokens / rate)


class _Shapes:
    """The shapes of model folders that may not be there yet."""

    def __init__(self, every: Sequence[Task]) -> None:
        self._makers = {task.place.result: task for task in every}

    def of(self, folder: Path) -> ModelConfig:
        """The shape of a model folder."""
        values = self._values(folder)
        return from_config(values, folder) if is_ours(values) else nearest_shape(values, folder)

    def _values(self, folder: Path) -> dict[str, Any]:
        """The ``config.json`` that a folder has or will have."""
        maker = self._makers.get(folder)
        if maker is None:
            return taken_values(folder)
        asked = maker.settings
        if maker.stage.command == "pruning":
            values = self._values(Path(asked.model))
            return resized(values, candidates(values, asked, self._smallest(Path(asked.model), asked))[0].shape)
        start = asked.init if isinstance(asked, TrainSettings) else asked.model
        return to_config(model_config(asked), bos=0, eos=0, pad=0) if start is None else self._values(Path(start))

    def _smallest(self, folder: Path, asked: Any) -> int | None:
        """The least vocabulary of a tokenizer; of one that is not there yet nothing is known, so it may be any."""
        if not (folder / "tokenizer.json").exists():
            return 0
        from pruning.vocabulary import smallest_vocabulary

        return smallest_vocabulary(folder, asked.chinese_tokens)


def _machine(task: Task, card: gpus.Gpu) -> Machine:
    """The devices that a stage asks SLURM for, else those of its own settings."""
    asked = task.stage.slurm.values if task.stage.slurm is not None else {}
    gpus_asked = int(asked.get("gpus", 0)) or task.settings.devices or 1
    return Machine(card, gpus_asked, int(asked.get("nodes", 0)) or task.settings.nodes or 1)


def _count(tokens: int) -> str:
    """A number of tokens for people."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return str(tokens)
