"""Fits the layer that reads pruned units to what is left of them.

The weights that come out give, in the least squares over calibration text, what the unpruned block gave, errors of the
blocks before it made good as far as these units can. A ridge draws them to the weights that were there, which are what
to take for a unit that the text says little of.

Shapes: M tokens, U units that are left, D model width.
"""

import torch
from torch import Tensor, nn

from pruning.statistics import Moments

RIDGE = 10.0
"""r·M / U: the fewer tokens there are for each unit, the less they are to be believed. On SmolLM2 with 24 tokens for
each unit, perplexity on C4's validation part was 67.3 with 2.5, 65.5 with 10 and 66.4 with 40. The hidden states after
the first blocks alone would ask for a quarter of it, but what is fitted too closely there is paid for later."""


def refit(linear: nn.Linear, moments: Moments, ridge: float = RIDGE) -> None:
    """Replace a linear layer's weights W by W + (C - W·S)·(S + r·diag S)⁻¹.

    That minimises the weighted squares Σ|target - W·u|² + r·Σ_u S_uu·|change of column u|², where S = Σ u·uᵀ and C =
    Σ target·uᵀ. The ridge on a unit is relative to its own second moment, so that none counts for its scale. Where the
    layer has a bias, it is the column of a unit that is always 1, see :func:`with_bias`.

    Args:
        linear: the layer, with as many inputs as there are units left.
        moments: of the units and targets over M tokens; one unit more where there is a bias. They are used up.
        ridge: r·M / U.
    """
    weight_DU = linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], 1)
    gram_UU = moments.gram_UU
    scale_U = gram_UU.diagonal().sqrt()
    scale_U = torch.where(scale_U > 0, scale_U, torch.ones_like(scale_U))  # a unit that was always 0 keeps its column
    missing_DU = torch.addmm(moments.cross_DU, weight_DU, gram_UU, alpha=-1) / scale_U
    gram_UU /= scale_U[:, None]
    gram_UU /= scale_U  # a matrix of correlations by now, which fp32 holds well enough
    gram_UU.diagonal().add_(ridge * len(gram_UU) / moments.tokens)
    change_DU = torch.cholesky_solve(missing_DU.T, torch.linalg.cholesky(gram_UU)).T / scale_U
    fitted_DU = weight_DU + change_DU
    if linear.bias is not None:
        linear.bias.copy_(fitted_DU[:, -1])
        fitted_DU = fitted_DU[:, :-1]
    linear.weight.copy_(fitted_DU)


def with_bias(units_MU: Tensor, linear: nn.Linear) -> Tensor:
    """The units, and for a linear layer that has a bias one more that is always 1."""
    return units_MU if linear.bias is None else nn.functional.pad(units_MU, (0, 1), value=1.0)
