"""One sweep over the blocks of a model: each is cut, and fitted to what is left, while it is in memory.

Two streams of hidden states go along. The dense one passes the blocks as they were: units are scored on it, and it is
what repair aims at. The pruned one passes the blocks as they are written, so that repair of a block makes good, as far
as it can, what those before it have changed.

Shapes: B rows, T tokens in a row, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from torch import Tensor, nn

from models.hf_config import head_width
from pruning.blocks import Block, Blocks, Hidden, Rows, parts_of
from pruning.cut import cut
from pruning.importance import Scores, best, by_energy
from pruning.repair import refit, with_bias
from pruning.shapes import Shape, resized
from pruning.statistics import Energies, Influence, Moments, token_weights
from pruning.temperature import sharpness

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
        felt: what the energy of each block's units is weighed by, see :class:`pruning.statistics.Energies`.
        repair: whether to refit the layers that read them.
    """

    def __init__(
        self,
        blocks: Blocks,
        rows: Rows | None,
        shape: Shape,
        *,
        weighed: Weighed | None = None,
        felt: list[Tensor] | None = None,
        repair: bool,
    ) -> None:
        self._blocks, self._parts = blocks, parts_of(blocks.values)
        self._now, self._wanted = Shape.of(blocks.values), shape
        self._head_width = head_width(blocks.values)
        self._small_values = resized(blocks.values, shape)
        self._weighed, self._felt, self._repair = weighed, felt, repair
        axes = ("ffn", "heads", "kv_heads")
        self._narrower = any(getattr(self._wanted, axis) < getattr(self._now, axis) for axis in axes)
        self._rows = rows if repair or (weighed is None and self._narrower) else None
        self._dense: Hidden = [] if self._rows is None else blocks.embed(self._rows)
        self._pruned: Hidden = list(self._dense) if repair else []
        self._same = True
        self.error = 0.0
        """Of the pruned stream, after the last block: its squared distance to the dense one relative to the square of
        that, mean over tokens."""

    def cut(self, layer: int) -> dict[str, Tensor]:
        """The weights of a block that stays, cut and repaired, by their names inside it, as they are stored."""
        tensors = self._blocks.tensors(layer)
        self._same = self._same and not self._narrower
        felt = None if self._felt is None else self._felt[layer]
        seen = self._pass_dense(tensors, felt) if self._rows is not None else None
        if self._same:  # nothing was cut so far: the streams are one
            self._pruned = list(self._dense)
            return tensors
        small = self._narrowed(layer, tensors, seen) if self._narrower else tensors
        if self._repair and seen is not None:
            small = small | self._repaired(small, seen.middle)
        return {name: tensor.to("cpu", tensors[name].dtype) for name, tensor in small.items()}

    def drop(self, layer: int) -> None:
        """Leave a block out."""
        self._same = False
        if self._rows is not None:
            self._blocks.through(self._blocks.block(layer), self._dense, self._rows)

    def sharpness(self, kept: list[int] | None) -> float:
        """What the last norm is to be scaled by once all blocks are through, see :func:`pruning.temperature.sharpness`.

        Args:
            kept: the tokens that the pruned model has; None: all.
        """
        if self._same or not self._pruned:
            return 1.0
        assert self._rows is not None
        apart = slice(self._rows.fitted % len(self._dense), None)  # all, where none stands apart
        return sharpness(self._blocks, self._dense[apart], self._pruned[apart], kept)

    def _narrowed(self, layer: int, tensors: dict[str, Tensor], seen: _Seen | None) -> dict[str, Tensor]:
        """The weights of a block with the units of highest scores alone."""
        if self._weighed is not None:
            scores = self._weighed(layer, tensors)
        else:
            assert seen is not None
            scores = by_energy(seen.ffn.sums, seen.heads.sums, self._now.kv_heads)
        return cut(tensors, self._parts, best(scores, self._now, self._wanted), self._head_width)

    def _pass_dense(self, tensors: dict[str, Tensor], felt: Tensor | None) -> _Seen:
        """Move the dense stream through a block."""
        assert self._rows is not None
        block = Block(self._blocks.values, tensors, self._blocks.device)
        ffn = Energies(block.ffn_out.weight, 1, felt)
        seen = _Seen([], ffn, Energies(block.attention_out.weight, self._head_width, felt))

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
        block, rows = Block(self._small_values, small, self._blocks.device), self._rows
        assert rows is not None
        units = list(self._pruned)
        self._blocks.through(block.attention_units, units, rows)
        middles = self._fit(block.attention_out, units, self._pruned, aims)
        for number, states in enumerate(zip(self._pruned, middles, strict=True)):
            units[number] = self._blocks.keep(block.ffn_units(*map(self._blocks.fetch, states)))
        self._pruned = self._fit(block.ffn_out, units, middles, self._dense)
        self.error = self._distance()
        fitted = ((self._parts.attention_out, block.attention_out), (self._parts.ffn_out, block.ffn_out))
        return {f"{module}.{name}": one for module, linear in fitted for name, one in linear.named_parameters()}

    def _fit(self, linear: nn.Linear, units: Hidden, before: Hidden, aims: Hidden) -> Hidden:
        """Refit a layer so that what it adds to the stream brings it to where the dense one is.

        Args:
            linear: the layer.
            units: what it reads.
            before: the pruned stream that its output is added to.
            aims: the dense stream after that.

        Returns:
            The pruned stream after it.
        """
        assert self._rows is not None
        fetch, width = self._blocks.fetch, linear.in_features + (linear.bias is not None)
        moments = Moments(width, linear.out_features, self._blocks.device)
        for states in islice(zip(units, before, aims, strict=True), self._rows.fitted):
            read, hidden, aim = map(fetch, states)
            moments.add(with_bias(read.flatten(0, 1), linear), (aim - hidden).flatten(0, 1), token_weights(aim))
        refit(linear, moments)
        pairs = zip(before, units, strict=True)
        return [self._blocks.keep(fetch(hidden) + linear(fetch(read))) for hidden, read in pairs]

    def _distance(self) -> float:
        """The squared distance of the streams relative to the square of the dense one, mean over tokens."""
        total = tokens = 0.0
        for states in zip(self._pruned, self._dense, strict=True):
            hidden, aim = map(self._blocks.fetch, states)
            squares = (hidden - aim).square().mean(-1).flatten() * token_weights(aim).flatten()
            total, tokens = total + float(squares.sum()), tokens + len(squares)
        return total / tokens


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
