"""How a pruned model is trained afterwards. Imports nothing heavy: ``--help`` reads this module."""

from dataclasses import dataclass, field
from typing import Literal

from common.settings import Count, option
from data.settings import Mix
from train.learning import DistillSettings, LoraSettings


@dataclass
class RecoverSettings:
    """Training after the cut, with the whole model as teacher."""

    data: Mix = option(Mix.parse("c4"))
    """Text to train on: c4, a folder, sample, or a mix with weights. Other than C4: not track 1."""
    tokens: Count | None = None
    """Training budget; more is better. Default: 50M on a GPU; on a CPU 80k, for a hundred million parameters about
    twenty minutes of two cores, or three where they multiply bf16."""
    train: Literal["auto", "all", "adapters"] = "auto"
    """all weights, or adapters beside them. auto: adapters for fewer than 100k tokens."""
    seq_len: Count | None = None
    """Tokens in a row. Default: the context, at most 2,048, on a CPU 512."""
    batch_tokens: Count | None = None
    """Tokens in a global batch. Default: grows with the root of the budget; so small that there are 128 steps."""
    lr: float | None = None
    """Peak learning rate. Default, in inverse proportion to the width: 2e-5 at 4096, of adapters 2e-4."""
    distill: DistillSettings = field(default_factory=DistillSettings)
    """The teacher."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters in place of all weights, for few tokens or a model that cannot be trained whole; rank 16 by default."""
    run: str | None = None
    """Name (under runs/) or path of the run folder. Default: beside the pruned model, by its name and weights."""

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')} of a recovery must be at least 1, not {value}")
        if self.lora.rank is not None and self.train == "all":
            raise ValueError(f"lora.rank {self.lora.rank} of a recovery is for adapters, which train=all has none of")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"lr of a recovery must be positive, not {self.lr}")
