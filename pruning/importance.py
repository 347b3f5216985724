"""Which units of a block stay: a score for each, by one of five criteria, and the best of them.

A key/value head goes with its query heads and they with it.

Shapes: F feed-forward units, H query heads, K key/value heads, N head width, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.blocks import Parts
from pruning.cut import Kept
from pruning.shapes import Shape


@dataclass(frozen=True)
class Scores:
    """Of a block's units; more is more important."""

    ffn: Tensor
    """Of feed-forward units (F,)."""
    heads: Tensor
    """Of query heads (H,), by their own weights."""
    kv_heads: Tensor
    """Of key/value heads (K,), by their own weights, the query heads that read them apart."""


def by_weights(
    tensors: dict[str, Tensor], parts: Parts, shape: Shape, score: Callable[[str, Tensor], Tensor]
) -> Scores:
    """Add up a score of each weight over the weights of each unit.

    Args:
        tensors: the weights by their names inside the block.
        parts: what the architecture calls them.
        shape: of the model.
        score: a tensor's name and values to the scores of its values: l1 takes their size, taylor what they change.
    """
    scores = {name: score(name, tensor.float()) for name, tensor in tensors.items()}

    def outgoing(modules: tuple[str, ...], units: int) -> Tensor:
        found = [scores[f"{module}.weight"].unflatten(0, (units, -1)).sum((1, 2)) for module in modules]
        biases = [f"{module}.bias" for module in modules if f"{module}.bias" in scores]
        return torch.stack([*found, *(scores[bias].unflatten(0, (units, -1)).sum(1) for bias in biases)]).sum(0)

    def incoming(module: str, units: int) -> Tensor:
        return scores[f"{module}.weight"].unflatten(1, (units, -1)).sum((0, 2))

    return Scores(
        outgoing(parts.ffn_in, shape.ffn) + incoming(parts.ffn_out, shape.ffn),
        outgoing((parts.queries,), shape.heads) + incoming(parts.attention_out, shape.heads),
        outgoing(parts.keys_values, shape.kv_heads),
    )


def by_chance(shape: Shape, generator: torch.Generator) -> Scores:
    """Random scores, a control."""
    return Scores(*(torch.rand(count, generator=generator) for count in (shape.ffn, shape.heads, shape.kv_heads)))


def by_energy(ffn_F: Tensor, heads_H: Tensor, kv_heads: int) -> Scores:
    """What units add to the hidden state on calibration text (:class:`pruning.statistics.Energies`, for energy and
    fisher): a key/value head adds nothing but what its query heads do."""
    return Scores(ffn_F.cpu(), heads_H.cpu(), torch.zeros(kv_heads))


def best(scores: Scores, now: Shape, wanted: Shape) -> Kept:
    """The units to keep for a smaller shape.

    Whole groups go first, by the sum over a key/value head and its query heads; then, in every group that stays, as
    many query heads.
    """
    each_now, each = now.heads // now.kv_heads, wanted.heads // wanted.kv_heads
    heads_KE = scores.heads.unflatten(0, (now.kv_heads, each_now))
    groups = _top(scores.kv_heads + heads_KE.sum(1), wanted.kv_heads)
    heads = [group * each_now + head for group in groups for head in _top(heads_KE[group], each)]
    return Kept(_top(scores.ffn, wanted.ffn), heads, groups)


def least_influential(influence: list[float], count: int) -> list[int]:
    """The ``count`` layers that change the direction of the hidden state least, in order."""
    return sorted(sorted(range(len(influence)), key=lambda layer: influence[layer])[:count])


def _top(scores: Tensor, count: int) -> list[int]:
    """The places of the highest scores, in order; of equal scores the first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())
