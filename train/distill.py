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
import torch.nn.functional as F
from torch import Tensor, nn

from models.foreign import summed_by_chunks
from models.transformer import IGNORE


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
                    logits = their_head(theirs).float()
                    logits = logits if self.ids is None else logits[:, self.ids]
                return _loss(ours.float(), logits, targets, weight, temperature)

            predicts = targets_M != IGNORE
            rest = theirs_MD[predicts], targets_M[predicts]
            return summed_by_chunks(against_teacher, hidden_MD[predicts], head, *rest)

        return student(inputs, positions, targets, head_loss=loss)


def _loss(
    ours_PV: Tensor, theirs_PV: Tensor, targets_P: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    log_q = ours_PV.log_softmax(-1)
    nll = F.nll_loss(log_q, targets_P, reduction="sum")
    common = min(ours_PV.shape[-1], theirs_PV.shape[-1])
    if temperature != 1 or common < ours_PV.shape[-1]:  # else the same again, and a pass over V is dear on a CPU
        log_q = (ours_PV[:, :common] / temperature).log_softmax(-1)
    theirs_PV = theirs_PV[:, :common]
    log_p = (theirs_PV if temperature == 1 else theirs_PV / temperature).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    return (1 - weight) * nll + weight * temperature**2 * divergence, nll.detach()
