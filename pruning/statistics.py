"""What a pass over calibration text collects of each block.

Every sum weighs a token by one over the mean square of the hidden state that its block's output becomes. The norms
that read it divide by just that, so an error counts as later layers see it; and the few tokens that models blow up to
hundreds of times the others (the first of a row) do not decide alone.

Shapes: M tokens, U units, D model width.
"""

import torch
from torch import Tensor


def token_weights(output_BTD: Tensor) -> Tensor:
    """One over the mean square of each token's hidden state (M, 1)."""
    return 1 / output_BTD.flatten(0, 1).square().mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


class Moments:
    """Weighted second moments of units, and of units with what the layer that reads them should give."""

    def __init__(self, units: int, width: int, device: torch.device) -> None:
        self.gram_UU = torch.zeros(units, units, device=device)
        self.cross_DU = torch.zeros(width, units, device=device)
        self.tokens = 0

    def add(self, units_MU: Tensor, targets_MD: Tensor, weights_M1: Tensor) -> None:
        """Count some tokens in."""
        weighted_MU = units_MU * weights_M1
        self.gram_UU.addmm_(weighted_MU.T, units_MU)
        self.cross_DU.addmm_(targets_MD.T, weighted_MU)
        self.tokens += len(units_MU)


class Energies:
    """Weighted sums over tokens that tell what each unit adds to the hidden state.

    Args:
        weight_DU: of the linear layer that reads the units.
        group: neighbouring units that go together: 1, or N for the columns of a head.
        felt_DD: F, a symmetric matrix that says how much each direction of what they add counts, see
            :mod:`pruning.fisher`; None: all as much.
    """

    def __init__(self, weight_DU: Tensor, group: int, felt_DD: Tensor | None = None) -> None:
        self._group = group
        # The energy of a group is the sum of u·G·u over tokens, G = Wᵀ·F·W of its own columns (group, U, U).
        columns = weight_DU.unflatten(1, (-1, group))
        felt = columns if felt_DD is None else torch.einsum("de,egi->dgi", felt_DD.to(columns.device), columns)
        self._gram = torch.einsum("dgi,dgj->gij", columns, felt)
        self.sums = torch.zeros(len(self._gram), device=weight_DU.device)

    def add(self, units_MU: Tensor, weights_M1: Tensor) -> None:
        """Count some tokens in."""
        units_MGU = units_MU.unflatten(1, (-1, self._group))
        if self._group == 1:
            self.sums += (units_MGU.square().squeeze(-1) * weights_M1).sum(0) * self._gram.flatten()
        else:
            self.sums += (torch.einsum("mgi,gij,mgj->mg", units_MGU, self._gram, units_MGU) * weights_M1).sum(0)


class Influence:
    """How far a block turns the hidden state: 1 - cosine of its input and output, mean over tokens."""

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, before_BTD: Tensor, after_BTD: Tensor) -> None:
        """Count some tokens in."""
        cosine = torch.nn.functional.cosine_similarity(before_BTD, after_BTD, dim=-1)
        self._sum += float((1 - cosine).sum())
        self._tokens += cosine.numel()

    @property
    def mean(self) -> float:
        """0 for a block that changes no direction."""
        return self._sum / self._tokens
