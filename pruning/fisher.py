"""How much the model's prediction feels a change of the hidden state after each block.

Energy alone takes all dimensions of the hidden state for equal. They are not: some hold values many times the others'
that later norms scale down again, and what no later layer reads may be wrong at no cost. The Fisher information of the
hidden state, F = E[g·gᵀ], g the gradient of the negative log-likelihood of a token drawn from the model's own
prediction, says what the prediction makes of each direction: a small change d turns it by d·F·d / 2 nats (in
Kullback-Leibler divergence). Kwon et al., arXiv:2204.09656, score units by the Fisher information of masks on them.

The pass back goes through the model block by block, as everything here; what it keeps in memory is the hidden states of
few tokens after every block.

Shapes: B rows, T tokens in a row, M tokens, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pruning.blocks import Block, Blocks, Hidden, Rows
from pruning.statistics import token_weights

TOKENS = 4_096
"""Of the calibration text: what is looked for is a property of the model, a mean that is soon steady."""


@torch.no_grad()
def information(blocks: Blocks, rows: Rows, seed: int, progress: Callable[[int], None]) -> list[Tensor]:
    """The Fisher information of the hidden state after each block, (D, D) of mean 1 on the diagonal.

    It is that of relative changes, to the root mean square of a token's hidden state, as what
    :class:`pruning.statistics.Energies` adds up is relative to its square.

    Args:
        blocks: the model.
        rows: calibration text, of which the first :data:`TOKENS` count.
        seed: of the tokens that are drawn.
        progress: told how many times a block was passed, forth or back.
    """
    some = rows.first(TOKENS)
    after = [blocks.embed(some)]
    for layer in range(blocks.layers):
        hidden = list(after[-1])
        blocks.through(blocks.block(layer), hidden, some)
        after.append(hidden)
        progress(layer + 1)
    slopes = blocks.slopes(after[-1], some, torch.Generator().manual_seed(seed))
    found = []
    for layer in reversed(range(blocks.layers)):
        found.append(_second_moment(blocks, after.pop(), slopes))
        if layer:  # before the first block nothing is asked
            slopes = _before(blocks, blocks.block(layer), after[-1], slopes, some)
        progress(2 * blocks.layers - layer)
    return found[::-1]


def _second_moment(blocks: Blocks, hidden: Hidden, slopes: Hidden) -> Tensor:
    """Σ g·gᵀ over tokens, g times the root mean square of its token's hidden state."""
    width = hidden[0].shape[-1]
    total_DD = torch.zeros(width, width, device=blocks.device)
    for states, slope in zip(hidden, slopes, strict=True):
        relative_MD = blocks.fetch(slope).flatten(0, 1) * token_weights(blocks.fetch(states)).rsqrt()
        total_DD.addmm_(relative_MD.T, relative_MD)
    return (total_DD / total_DD.diagonal().mean()).cpu()


def _before(blocks: Blocks, block: Block, hidden: Hidden, slopes: Hidden, rows: Rows) -> Hidden:
    """The gradient with respect to what goes into a block, from that with respect to what comes out of it."""
    found = []
    for states, slope, positions in zip(hidden, slopes, rows.positions, strict=True):
        into = blocks.fetch(states).requires_grad_(True)
        with torch.enable_grad():
            out = block(into, positions.to(blocks.device))
        (gradient,) = torch.autograd.grad(out, into, blocks.fetch(slope))
        found.append(blocks.keep(gradient))
    return found
