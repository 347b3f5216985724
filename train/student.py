"""The model that a run trains: ours or one from elsewhere, all of its weights or adapters beside them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from common.files import require_space
from common.run_folder import RunFolder
from models.foreign import Architecture, Foreign
from models.transformer import Transformer
from train import float8, lora
from train.checkpoint import steps_in
from train.device import compiles
from train.engine import Values
from train.learning import LoraSettings
from train.plan import checkpoint_bytes
from train.settings import RunSettings
from train.stage import Stage


@dataclass(frozen=True)
class Student:
    """A model without weights."""

    architecture: Architecture
    lora: LoraSettings
    """Resolved."""

    def build(self, stage: Stage) -> Transformer | Foreign:
        """The model as the engine takes it."""
        raw = self._plain(torch.bfloat16 if stage.settings.precision == "bf16" else torch.float32)
        if stage.settings.fp8:
            float8.convert(raw)
        if compiles(stage.settings, stage.device):
            raw.compile_parts()
        raw.checkpointing = stage.fit.checkpointing
        return raw

    def first_values(self, weights: Values, seed: int) -> Values:
        """``weights``, and of adapters their first ones."""
        return weights if self.lora.rank is None else lora.first_values(weights, seed)

    @cached_property
    def parameters(self) -> int:
        """How many there are, those of adapters counted."""
        return sum(self._sizes.values())

    @cached_property
    def trainable(self) -> int | None:
        """How many of them are trained; None: all."""
        return None if self.lora.rank is None else self._sizes[True]

    @property
    def described(self) -> str:
        """Their number, for the header of a run."""
        trained = "" if self.trainable is None else f", {self.trainable:,} of them trained"
        return f"{self.parameters:,}{trained}"

    def adapters(self, stage: Stage, base: str) -> dict[str, Any] | None:
        """What a checkpoint of adapters says of the model folder that they are trained beside; None without any.

        Raises:
            UserError: the run goes on, and the weights there are others by now.
        """
        if self.lora.rank is None:
            return None
        folder = Path(base)
        digest = stage.job.broadcast(lora.digest_of(folder) if stage.job.rank == 0 else "")
        if stage.state:
            lora.check_base(folder, stage.state["lora"]["digest"])
        return {"base": str(folder.absolute()), "digest": digest, "scale": self.lora.scale}

    def require_space(self, run: RunFolder, settings: RunSettings) -> None:
        """UserError when the disk lacks the room for a run's checkpoints and its model folder.

        The newest checkpoints that stay, one kept for good and one new; the model. What the run has there already
        counts, but for one checkpoint and the model, which are written anew.
        """
        size, model = self._checkpoint_bytes(settings.optimizer.name), 4 * self.parameters
        count = settings.checkpoint.keep + 2
        folders = [*(run.checkpoints / f"step-{step:07d}" for step in steps_in(run.checkpoints)), run.model]
        there = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        require_space(
            run.path, max(count * size + model - there, size + model), f"this run ({count} checkpoints and the model)"
        )

    def _checkpoint_bytes(self, optimizer: str) -> int:
        """Of a checkpoint's tensors: weights in fp32, and what the optimiser keeps of those that are trained."""
        if self.trainable is None and self.architecture.own is not None:
            return checkpoint_bytes(self.architecture.own, optimizer)
        return 12 * (self.trainable or self.parameters)  # AdamW's two moments

    def _plain(self, frozen: torch.dtype) -> Transformer | Foreign:
        raw = self.architecture.build()
        if self.lora.rank is not None:
            assert self.lora.alpha is not None
            lora.add_adapters(raw, self.lora.rank, self.lora.alpha, frozen)
        return raw

    @cached_property
    def _sizes(self) -> dict[bool, int]:
        """Parameters that are frozen, and that are trained."""
        with torch.device("meta"):
            model = self._plain(torch.float32)
        sizes = {False: 0, True: 0}
        for parameter in model.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        return sizes
