"""The last norm and the head of a model, by some rows at a time.

Shapes: M tokens, D model width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_TOKENS, HEAD_ROWS = 512, 16_384
"""Tokens and rows of the head whose logits exist at one time."""


@dataclass(frozen=True)
class Head:
    """The last norm and the head, whose weights stay in host memory and are in fp32 by some rows at a time."""

    norm: nn.Module
    weight: Tensor
    """(V, D), as stored."""
    bias: Tensor
    """(V,) in fp32, on the device."""

    def nll(self, states_MD: Tensor, targets_M: Tensor) -> float:
        """The summed negative log-likelihood of targets."""
        normed_MD = self.norm(states_MD)
        total_M = torch.stack([logits.logsumexp(-1) for logits, _ in self.parts(normed_MD)]).logsumexp(0)
        wanted_M = (normed_MD * self._rows(targets_M)).sum(-1) + self.bias[targets_M.to(self.bias.device)]
        return float((total_M - wanted_M).double().sum())

    def chances(self, states_MD: Tensor) -> Tensor:
        """The predicted probability of every token, summed over the states (V,), on the device."""
        normed_MD = self.norm(states_MD)
        total_M = torch.stack([logits.logsumexp(-1) for logits, _ in self.parts(normed_MD)]).logsumexp(0)
        return torch.cat([(logits - total_M[:, None]).exp().sum(0) for logits, _ in self.parts(normed_MD)])

    def slope(self, states_MD: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient of the negative log-likelihood of drawn tokens with respect to the states (M, D)."""
        with torch.enable_grad():
            normed_MD = self.norm(states_MD.requires_grad_(True))
        totals, highest, places = [], [], []
        for logits, first in self.parts(normed_MD.detach()):
            totals.append(logits.logsumexp(-1))
            noise = torch.rand(logits.shape, generator=generator).clamp_min(1e-30).log().neg().log().neg()
            best = (logits + noise.to(logits.device)).max(-1)  # the highest with Gumbel's noise is a draw
            highest.append(best.values)
            places.append(best.indices + first)
        total_M1 = torch.stack(totals).logsumexp(0).unsqueeze(-1)
        drawn_M = torch.stack(places).gather(0, torch.stack(highest).argmax(0, keepdim=True)).squeeze(0)
        slope_MD = -self._rows(drawn_M.cpu())
        for logits, first in self.parts(normed_MD.detach()):
            weight = self.weight[first : first + logits.shape[-1]].to(logits.device).float()
            slope_MD += (logits - total_M1).exp() @ weight
        (found,) = torch.autograd.grad(normed_MD, states_MD, slope_MD)
        return found

    def parts(self, normed_MD: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The logits of some rows of the head after the other, with the number of the first."""
        first = 0
        for weight, bias in zip(self.weight.split(HEAD_ROWS), self.bias.split(HEAD_ROWS), strict=True):
            yield F.linear(normed_MD, weight.to(normed_MD.device).float(), bias), first
            first += len(weight)

    def _rows(self, tokens_M: Tensor) -> Tensor:
        """The rows of the head of some tokens (M, D)."""
        return self.weight[tokens_M].to(self.bias.device).float()
