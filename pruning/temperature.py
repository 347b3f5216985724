"""How sure of itself a pruned model may be.

What the cut has spoilt of the last hidden state, the head takes for evidence, and the prediction comes out sharper than
it has a right to be. One factor on what the head reads makes good for it: temperature scaling (Guo et al.,
arXiv:1706.04599), here towards the prediction of the whole model in place of labels, so that nothing of the text is
learned. The hidden states should be of text that nothing was fitted to, for on other text the model is never as good.
It goes into the weights of the last norm; which token is the likeliest stays the same (but for a head with biases).

Shapes: M tokens, D model width.
"""

import torch
from torch import Tensor

from pruning.blocks import Blocks, Hidden
from pruning.head import HEAD_TOKENS, Head

TOKENS = 2_048
"""Of the calibration text: the divergence is flat where it is least, and one number soon found."""

ENOUGH = 1e-3
"""Where Newton's steps end; the next would be a thousandth of that."""


def sharpness(blocks: Blocks, dense: Hidden, pruned: Hidden, kept: list[int] | None) -> float:
    """The factor a that minimises the mean of KL(p ‖ q), p the whole model's prediction and q = softmax(a·z + b).

    It is convex in a. Its slope is E_q[z] - E_p[z], its curvature the variance of z under q.

    Args:
        blocks: the whole model.
        dense: what comes out of its last block.
        pruned: what comes out of the pruned model's.
        kept: the tokens that the pruned model has; None: all.

    Returns:
        a: below 1 where the pruned model is too sure.
    """
    head, aims, states = blocks.head(kept), _spread(dense), _spread(pruned)
    factor = 1.0
    for _ in range(10):
        slope = curvature = 0.0
        for aim, found in zip(aims.split(HEAD_TOKENS), states.split(HEAD_TOKENS), strict=True):
            one_slope, one_curvature = _derivatives(head, blocks.fetch(aim), blocks.fetch(found), factor)
            slope, curvature = slope + one_slope, curvature + one_curvature
        step = slope / curvature if curvature > 0 else 0.0
        factor = max(factor - step, factor / 2)
        if abs(step) < ENOUGH:
            break
    return factor


def _spread(hidden: Hidden) -> Tensor:
    """Tokens of all rows, evenly spread (M, D)."""
    stride = max(1, sum(chunk[..., 0].numel() for chunk in hidden) // TOKENS)
    return torch.cat([chunk.flatten(0, 1)[::stride] for chunk in hidden])


def _derivatives(head: Head, dense_MD: Tensor, pruned_MD: Tensor, factor: float) -> tuple[float, float]:
    """The first and second derivative of Σ KL(p ‖ q) in the factor, logits by some rows of the head at a time."""
    of_p, of_q = _Means(), _Means()
    both = zip(head.parts(head.norm(dense_MD)), head.parts(head.norm(pruned_MD)), strict=True)
    for (dense, first), (logits, _) in both:
        bias = head.bias[first : first + logits.shape[-1]]
        scores = logits - bias
        of_p.add(dense, scores)
        of_q.add(factor * scores + bias, scores)
    (mean_p, _), (mean_q, square_q) = of_p.result(), of_q.result()
    return float((mean_q - mean_p).double().sum()), float((square_q - mean_q.square()).double().sum())


class _Means:
    """The mean of scores and of their squares under softmax(logits), both of them given in parts."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits: Tensor, scores: Tensor) -> None:
        """Count some rows of the head in."""
        total_M, chance = logits.logsumexp(-1), logits.softmax(-1)
        self._parts.append((total_M, (chance * scores).sum(-1), (chance * scores.square()).sum(-1)))

    def result(self) -> tuple[Tensor, Tensor]:
        """Both means (M,)."""
        totals, means, squares = map(torch.stack, zip(*self._parts, strict=True))
        share = totals.softmax(0)
        return (share * means).sum(0), (share * squares).sum(0)
