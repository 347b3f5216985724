"""Knowledge distillation: a student learns the distribution of a teacher beside the labels (arXiv:1503.02531).

The loss of a target is (1 - w) · CE + w · T² · KL(p || q), with p the teacher's and q the student's distribution
at temperature T: the forward divergence, which makes the student cover all that the teacher holds likely. T² keeps
the size of its gradient about the same at every temperature.

A student whose vocabulary was cut knows some of the teacher's tokens: both distributions are over those, and the
teacher reads them under its own ids.

Shapes: M tokens, D model width, V vocabulary, P tokens that are predicted, K tokens that both know.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.foreign import summed_by_chunks
from models.transformer import IGNORE

LOGITS_AT_ONCE = 2**18
"""Logits that go through all passes of the loss before the next ones do, on a CPU."""


class Distillation:
    """The objective of a student.

    Args:
        teacher: in evaluation mode on the student's device.
        weight: w, of the teacher against the labels; 1 is the teacher alone.
        temperature: T.
        ids: the teacher's id of each of the student's K tokens, there too. None: they have the same ids, and where
            the one has more rows of vocabulary than the other, those that both have count.
    """

    def __init__(self, teacher: nn.Module, weight: float, temperature: float, ids: Tensor | None = None) -> None:
        self.teacher, self.weight, self.temperature, self.ids = teacher, weight, temperature, ids

    def __call__(self, student: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The summed loss, and the summed negative log-likelihood of the labels."""
        loss, nll = self._sums(student, batch, self.weight, self.temperature)
        return loss, nll

    def figures(self, student: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Over the tokens that are predicted, the summed negative log-likelihood of the labels and KL(p || q) at
        temperature 1, both in nats."""
        divergence, nll = self._sums(student, batch, weight=1.0, temperature=1.0)
        return nll, divergence

    def _sums(self, student: nn.Module, batch: dict[str, Tensor], weight: float, temperature: float) -> Any:
        inputs, positions, targets = batch["inputs"], batch["positions"], batch["targets"]
        read = inputs if self.ids is None else self.ids[inputs]
        with torch.no_grad():
            theirs_MD, their_head = self.teacher(
                read, positions, targets, head_loss=lambda hidden, head, targets: (hidden, head)
            )

        def loss(hidden_MD: Tensor, head: nn.Linear, targets_M: Tensor) -> tuple[Tensor, Tensor]:
            def against_teacher(ours: Tensor, theirs: Tensor, targets: Tensor) -> Any:
                with torch.no_grad():
                    logits = their_head(theirs)
                    logits = logits if self.ids is None else logits[:, self.ids]
                return _Loss.apply(ours, logits, targets, weight, temperature)

            predicts = targets_M != IGNORE
            rest = theirs_MD[predicts], targets_M[predicts]
            return summed_by_chunks(against_teacher, hidden_MD[predicts], head, *rest)

        return student(inputs, positions, targets, head_loss=loss)


class _Loss(torch.autograd.Function):
    """The loss, the labels' negative log-likelihood, and the gradient w·T·(q - p) + (1 - w)·(softmax - onehot) at once.

    It takes a dozen passes over the logits; on a CPU for a few tokens at a time, whose logits stay in its caches.
    """

    @staticmethod
    def forward(
        ctx: Any, ours_PV: Tensor, theirs_PV: Tensor, targets_P: Tensor, weight: float, temperature: float
    ) -> tuple[Tensor, Tensor]:
        loss, nll = (torch.zeros((), device=ours_PV.device) for _ in range(2))
        d_ours_PV = torch.empty_like(ours_PV)
        rows = max(1, len(ours_PV) if ours_PV.is_cuda else LOGITS_AT_ONCE // ours_PV.shape[1])
        for first in range(0, len(ours_PV), rows):
            part = slice(first, first + rows)
            ours, theirs, targets = ours_PV[part].float(), theirs_PV[part].float(), targets_P[part]
            of_labels, divergence, slope = _sums_and_slope(ours, theirs, targets, weight, temperature)
            nll += of_labels
            loss += (1 - weight) * of_labels + weight * temperature**2 * divergence
            d_ours_PV[part] = slope
        ctx.save_for_backward(d_ours_PV)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_nll: Tensor) -> Any:
        (d_ours_PV,) = ctx.saved_tensors
        return d_ours_PV * d_loss.to(d_ours_PV.dtype), None, None, None, None


def _sums_and_slope(
    ours: Tensor, theirs: Tensor, targets: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The labels' summed negative log-likelihood, the summed divergence, and the loss's gradient in ``ours``."""
    common = min(ours.shape[-1], theirs.shape[-1])
    places = torch.arange(len(ours), device=ours.device)
    softmax, log_z = _softmax(ours)
    nll = (log_z - ours[places, targets]).sum()
    p, q = theirs[:, :common] / temperature, ours[:, :common] / temperature
    differences = p - q
    p, log_z_of_p = _softmax(p)
    alike = temperature == 1 and common == ours.shape[-1]
    q, log_z_of_q = (softmax, log_z) if alike else _softmax(q)
    divergence = (p * differences).sum() + (log_z_of_q - log_z_of_p).sum()
    slope = (1 - weight) * softmax
    slope[places, targets] -= 1 - weight
    slope[:, :common] += (weight * temperature) * (q - p)
    return nll, divergence, slope


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution, and the logarithm of its denominator."""
    largest = logits.amax(-1, keepdim=True)
    powers = (logits - largest).exp_()
    total = powers.sum(-1, keepdim=True)
    return powers.div_(total), (largest + total.log()).squeeze(-1)
