"""The learning rate as a function of tokens."""

import math
from dataclasses import dataclass

from train.settings import RunSettings


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then the peak and a linear decay (wsd), or a cosine, to ``final`` · peak."""

    name: str
    peak: float
    total: int
    warmup: int
    decay: int
    final: float

    @classmethod
    def of(cls, settings: RunSettings) -> "Schedule":
        """The schedule of resolved settings."""
        chosen = settings.schedule
        assert settings.optimizer.lr is not None
        assert settings.tokens is not None
        assert chosen.warmup is not None
        assert chosen.decay is not None
        assert chosen.final is not None
        assert settings.batch_tokens is not None
        total = _whole_batches(settings.tokens, settings.batch_tokens)
        return cls(chosen.name, settings.optimizer.lr, total, chosen.warmup, chosen.decay, chosen.final)

    @property
    def decay_start(self) -> int:
        """Tokens at which the decay of wsd begins; the end where there is none."""
        return self.total - self.decay if self.name == "wsd" else self.total

    def rate(self, tokens: int, batch_tokens: int) -> float:
        """The rate of a step that starts after ``tokens``.

        Taken at the middle of the step, so that neither the first nor the last one is wasted on a rate
        of zero.
        """
        at = tokens + batch_tokens / 2
        if at < self.warmup:
            return self.peak * at / self.warmup
        if self.name == "cosine":
            progress = min(1.0, (at - self.warmup) / max(1, self.total - self.warmup))
            return self.peak * (self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2)
        left = min(1.0, max(0.0, (self.total - at) / self.decay)) if self.decay else 1.0
        return self.peak * (self.final + (1 - self.final) * left)


def decay_start(tokens: int, batch_tokens: int, decay: int) -> int:
    """Tokens at which the decay of wsd begins in a run of such a budget."""
    return _whole_batches(tokens, batch_tokens) - decay


def _whole_batches(tokens: int, batch_tokens: int) -> int:
    """The tokens that a run takes: its last batch is whole."""
    return math.ceil(tokens / batch_tokens) * batch_tokens
