"""How weights learn beside the data: through adapters, from a teacher. Imports nothing heavy: ``--help`` reads it."""

from dataclasses import dataclass


@dataclass
class LoraSettings:
    """Low-rank adapters beside the frozen matrices of the blocks, merged at the end (peft)."""

    rank: int | None = None
    """Rows of the adapters, such as 16. Default: none, all weights are trained."""
    alpha: int | None = None
    """The adapters' product is scaled by alpha / rank. Default: twice the rank."""

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--lora.{name} must be at least 1, not {getattr(self, name)}")
        if self.alpha is not None and self.rank is None:
            raise ValueError("--lora.alpha belongs to --lora.rank")

    @property
    def scale(self) -> float:
        """What the adapters' product is multiplied by; of resolved settings with a rank."""
        assert self.rank is not None
        assert self.alpha is not None
        return self.alpha / self.rank


@dataclass
class DistillSettings:
    """How a --teacher counts."""

    weight: float = 0.5
    """Of the teacher against the labels; 1: the teacher alone."""
    temperature: float = 1.0
    """Of both distributions."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"--distill.weight must be above 0 and at most 1, not {self.weight}")
        if self.temperature <= 0:
            raise ValueError(f"--distill.temperature must be positive, not {self.temperature}")
