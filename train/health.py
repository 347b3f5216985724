"""Steps that must not be taken: a loss or a gradient norm that is not finite or far outside its spread.

All arithmetic stays on the device, so that the loop need not wait for it: the optimiser is told by a tensor
(``found_inf``, as torch's gradient scaler does) whether to leave the weights, its moments and its step
count as they are.
"""

import torch
from torch import Tensor

WINDOW = 128
"""Steps that the running spread is taken over (OLMo 2's SkipStepOptimizer uses as many, arXiv:2501.00656)."""

WARM = 64
"""Steps that must be seen before a norm is called large: norms fall quickly at first."""


class Guard:
    """Decides for each step whether it is taken.

    A norm beyond mean + ``spike`` · standard deviation of the last :data:`WINDOW` steps is a spike. It enters the
    window cut to that limit: so one spike does not widen the spread much, and a lasting change of level
    is accepted after some steps. All ranks decide alike, for they see the same loss and norm.

    Args:
        spike: standard deviations above the mean; 0 looks for what is not finite alone.
        device: where loss and norm are.
    """

    def __init__(self, spike: float, device: torch.device) -> None:
        self._spike = spike
        self._norms = torch.zeros(WINDOW, dtype=torch.float64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(WINDOW, device=device)

    def check(self, nll: Tensor, norm: Tensor) -> Tensor:
        """1.0 when the step must be skipped, else 0.0, as an fp32 tensor on the device."""
        norm = norm.double()
        finite = torch.isfinite(nll) & torch.isfinite(norm)
        limit = self._limit()
        taken = torch.minimum(norm, limit)
        here = (self._places == self._seen % WINDOW) & finite
        self._norms.copy_(torch.where(here, taken, self._norms))
        self._seen += finite
        return (~finite | (norm > limit)).float()

    def _limit(self) -> Tensor:
        """The largest norm that is no spike; infinite while too few were seen."""
        if not self._spike:
            return torch.full_like(self._norms[0], torch.inf)
        filled = self._places < self._seen
        count = filled.sum().clamp(min=1)
        mean = self._norms.sum() / count
        variance = torch.where(filled, (self._norms - mean).square(), 0.0).sum() / count
        return torch.where(self._seen >= WARM, mean + self._spike * variance.sqrt(), torch.inf)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, so that a resumed run decides alike."""
        return {"guard.norms": self._norms, "guard.seen": self._seen}
