"""One sweep over the blocks of a model: each is cut, and fitted to what is left, while it is in memory.

Two streams of hidden states go along. The dense one passes the blocks as they were: units are scored on it, and it is
what repair aims at. The pruned one passes the blocks as they are written, so that repair of a block makes good, as far
as it can, what those before it have changed.

Shapes: B rows, T tokens in a row, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.blocks import Block, Blocks, Hidden, Rows, parts_of
from pruning.cut import Kept, cut
from pruning.importance import Scores, best, by_energy
from pruning.repair import refit, with_bias
from pruning.shapes import Shape, head_width, resized
from pruning.statistics import Energies, Influence, Moments, token_weights

INFLUENCE_TOKENS = 32_768
"""Calibration tokens that the layers' influence is measured on: it is a mean of one number, and soon steady."""

Weighed = Callable[[int, dict[str, Tensor]], Scores]
"""Takes a layer and its weights and scores its units without a look at the hidden states."""


@dataclass
class _Seen:
    """What the dense stream left in passing a block."""

    middle: Hidden
    """With attention's output added."""
    ffn: Energies
    heads: Energies


class Sweep:
    """Cuts one block after the other, to be called for every layer in order.

    Args:
        blocks: the model.
        rows: calibration text; None where neither energy nor repair asks for any.
        shape: to cut to.
        weighed: scores units; None for energy.
        repair: whether to refit the layers that read them.
    """

    def __init__(
        self, blocks: Blocks, rows: Rows | None, shape: Shape, *, weighed: Weighed | None, repair: bool
    ) -> None:
        self._blocks, self._parts = blocks, parts_of(blocks.values)
        self._now, self._wanted = Shape.of(blocks.values), shape
        self._head_width = head_width(blocks.values)
        self._small_values = resized(blocks.values, shape)
        self._weighed, self._repair = weighed, repair
        self._rows = rows if repair or weighed is None else None
        self._dense: Hidden = [] if self._rows is None else blocks.embed(self._rows)
        self._pruned: Hidden = list(self._dense) if repair else []
        self._same = True
        self.error = 0.0
        """Of the pruned stream, after the last block: its squared distance to the dense one relative to the square of
        that, mean over tokens."""

    def cut(self, layer: int) -> dict[str, Tensor]:
        """The weights of a block that stays, cut and repaired, by their names inside it, as they are stored."""
        tensors = self._blocks.tensors(layer)
        narrower = (self._wanted.ffn, self._wanted.heads, self._wanted.kv_heads) != (
            self._now.ffn,
            self._now.heads,
            self._now.kv_heads,
        )
        self._same = self._same and not narrower
        seen = self._pass_dense(tensors) if self._rows is not None else None
        if self._same:  # nothing was cut so far: the streams are one
            self._pruned = list(self._dense)
            return tensors
        small = cut(tensors, self._parts, self._kept(layer, tensors, seen), self._head_width)
        if self._repair and seen is not None:
            small |= self._repaired(small, seen.middle)
        return {name: tensor.to("cpu", tensors[name].dtype) for name, tensor in small.items()}

    def drop(self, layer: int) -> None:
        """Leave a block out."""
        self._same = False
        if self._rows is not None:
            self._blocks.through(self._blocks.block(layer), self._dense, self._rows)

    def _kept(self, layer: int, tensors: dict[str, Tensor], seen: _Seen | None) -> Kept:
        if self._weighed is not None:
            scores = self._weighed(layer, tensors)
        else:
            assert seen is not None
            scores = by_energy(seen.ffn.sums, seen.heads.sums, self._now.kv_heads)
        return best(scores, self._now, self._wanted)

    def _pass_dense(self, tensors: dict[str, Tensor]) -> _Seen:
        """Move the dense stream through a block."""
        assert self._rows is not None
        block = Block(self._blocks.values, tensors, self._blocks.device)
        seen = _Seen([], Energies(block.ffn_out.weight, 1), Energies(block.attention_out.weight, self._head_width))

        def step(hidden: Tensor, positions: Tensor) -> Tensor:
            found = block.attention_units(hidden, positions)
            middle = hidden + block.attention_out(found)
            units = block.ffn_units(hidden, middle)
            output = middle + block.ffn_out(units)
            if self._weighed is None:
                weights = token_weights(output)
                seen.heads.add(found.flatten(0, 1), weights)
                seen.ffn.add(units.flatten(0, 1), weights)
            if self._repair:
                seen.middle.append(self._blocks.keep(middle))
            return output

        self._blocks.through(step, self._dense, self._rows)
        return seen

    def _repaired(self, small: dict[str, Tensor], aims: Hidden) -> dict[str, Tensor]:
        """Fit the layers that read a cut block's units, and move the pruned stream through it.

        Args:
            small: the block's weights.
            aims: the dense stream in the middle of the block; at its end it is at hand already.

        Returns:
            The weights that were fitted.
        """
        block, blocks = Block(self._small_values, small, self._blocks.device), self._blocks
        middles = self._fit_attention(block, aims)
        self._fit_ffn(block, middles)
        error = tokens = 0.0
        for number, aim in enumerate(self._dense):
            hidden, middle, aim = (blocks.fetch(states) for states in (self._pruned[number], middles[number], aim))
            output = middle + block.ffn_out(block.ffn_units(hidden, middle))
            self._pruned[number] = blocks.keep(output)
            distances = (output - aim).square().mean(-1).flatten() * token_weights(aim).flatten()
            error, tokens = error + float(distances.sum()), tokens + len(distances)
        self.error = error / tokens
        fitted = {self._parts.attention_out: block.attention_out, self._parts.ffn_out: block.ffn_out}
        return {
            f"{module}.{name}": tensor
            for module, linear in fitted.items()
            for name, tensor in linear.named_parameters()
        }

    def _fit_attention(self, block: Block, aims: Hidden) -> Hidden:
        """Fit what reads the heads; returns the pruned stream in the middle of the block."""
        assert self._rows is not None
        blocks, linear = self._blocks, block.attention_out
        moments = _moments(linear)
        for hidden, positions, aim in zip(self._pruned, self._rows.positions, aims, strict=True):
            hidden, aim = blocks.fetch(hidden), blocks.fetch(aim)
            units = block.attention_units(hidden, positions.to(blocks.device)).flatten(0, 1)
            moments.add(with_bias(units, linear), (aim - hidden).flatten(0, 1), token_weights(aim))
        refit(linear, moments)
        middles = list(self._pruned)
        blocks.through(lambda hidden, at: hidden + linear(block.attention_units(hidden, at)), middles, self._rows)
        return middles

    def _fit_ffn(self, block: Block, middles: Hidden) -> None:
        """Fit what reads the feed-forward units."""
        blocks, linear = self._blocks, block.ffn_out
        moments = _moments(linear)
        for states in zip(self._pruned, middles, self._dense, strict=True):
            hidden, middle, aim = (blocks.fetch(one) for one in states)
            units = block.ffn_units(hidden, middle).flatten(0, 1)
            moments.add(with_bias(units, linear), (aim - middle).flatten(0, 1), token_weights(aim))
        refit(linear, moments)


def influence(blocks: Blocks, rows: Rows, progress: Callable[[int], None]) -> list[float]:
    """How far each block of a model turns the hidden states, see :class:`pruning.statistics.Influence`.

    Args:
        blocks: the model.
        rows: calibration text, of which the first :data:`INFLUENCE_TOKENS` count.
        progress: told how many blocks are done.
    """
    some = rows.first(INFLUENCE_TOKENS)
    hidden, found = blocks.embed(some), []
    for layer in range(blocks.layers):
        block, turned = blocks.block(layer), Influence()

        def step(before: Tensor, positions: Tensor, block: Block = block, turned: Influence = turned) -> Tensor:
            after = block(before, positions)
            turned.add(before, after)
            return after

        blocks.through(step, hidden, some)
        found.append(turned.mean)
        progress(layer + 1)
    return found


def _moments(linear: torch.nn.Linear) -> Moments:
    units = linear.in_features + (linear.bias is not None)
    return Moments(units, linear.out_features, linear.weight.device)
