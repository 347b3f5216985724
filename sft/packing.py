"""Conversations into rows: whole ones, several to a row, and the order of the rows.

A conversation of L tokens takes L - 1 positions, each of which sees the tokens before it in its own conversation and
predicts the next. Which rows a run sees depends on the data, the weights, the seed and the sequence length alone; a
rank takes every W-th of them.

Shapes: B rows, T sequence length, L tokens of a conversation, W ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.packing import IGNORE, Batch
from sft.rendering import Rendered

Row = list[int]
"""Indices of the conversations in a row."""


def pack(lengths: Sequence[int], space: int) -> list[Row]:
    """Which conversations share a row: the longest first, each goes into the fullest row that has room (best fit).

    Args:
        lengths: positions that each takes, at most ``space``.
        space: positions of a row.
    """
    rows: list[Row] = []
    with_space: list[list[int]] = [[] for _ in range(space + 1)]
    spaces = 0  # bit s is set where a row has s positions left: the lowest one from a length on is the best fit
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        fitting = spaces >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = with_space[left].pop()
            if not with_space[left]:
                spaces &= ~(1 << left)
        else:
            left, row = space, len(rows)
            rows.append([])
        rows[row].append(index)
        with_space[left - length].append(row)
        spaces |= 1 << (left - length)
    return rows


def make_batch(rows: Sequence[Sequence[Rendered]], seq_len: int) -> Batch:
    """Rows of conversations as the model takes them, (B, T); what is left of a row predicts nothing."""
    inputs = np.zeros((len(rows), seq_len), dtype=np.int64)
    targets = np.full_like(inputs, IGNORE)
    positions = np.zeros_like(inputs)
    for number, row in enumerate(rows):
        start = 0
        for one in row:
            part = slice(start, start + one.length)
            inputs[number, part] = one.ids[:-1]
            targets[number, part] = np.where(one.trained[1:], one.ids[1:].astype(np.int64), IGNORE)
            positions[number, part] = np.arange(one.length)
            start += one.length
        positions[number, start:] = np.arange(seq_len - start)
    return Batch(inputs, targets, positions)


@dataclass(frozen=True)
class Mixture:
    """The conversations of several sources, and how often an epoch sees each.

    An epoch has as many conversations as the sources together, shared by weight: a source that has fewer than its
    share begins again, one that has more goes on in the next epoch. Each source is shuffled anew every time through.
    """

    sources: Sequence[Sequence[Rendered]]
    weights: Sequence[float]
    """Shares, which sum to 1."""
    seq_len: int
    seed: int

    @cached_property
    def _counts(self) -> list[int]:
        """Conversations of each source in an epoch."""
        total = sum(map(len, self.sources))
        return [max(1, round(weight * total)) for weight in self.weights]

    def epoch(self, number: int) -> list[list[Rendered]]:
        """The rows of an epoch, in order."""
        chosen = [self.sources[source][index] for source, index in self._chosen(number)]
        rows = pack([one.length for one in chosen], self.seq_len)
        # The frozen generator (NEP 19): the same order under every version of numpy.
        order = np.random.RandomState([self.seed, number]).permutation(len(rows))
        return [[chosen[index] for index in rows[row]] for row in order]

    def _chosen(self, number: int) -> Iterator[tuple[int, int]]:
        for source, count in enumerate(self._counts):
            size = len(self.sources[source])
            orders: dict[int, Any] = {}
            for place in range(number * count, (number + 1) * count):
                time, index = divmod(place, size)
                if time not in orders:
                    orders = {time: np.random.RandomState([self.seed, source, time]).permutation(size)}
                yield source, int(orders[time][index])


class ConversationRows:
    """This rank's rows of a mixture, from any row of the run on.

    Args:
        mixture: the conversations.
        rank: which of the ranks this is.
        world_size: how many share the rows.
        row: rows taken before, over all ranks.
    """

    def __init__(self, mixture: Mixture, *, rank: int = 0, world_size: int = 1, row: int = 0) -> None:
        self._mixture, self._rank, self._world, self._row = mixture, rank, world_size, row
        self._epoch, self._first = 0, 0
        self._rows = mixture.epoch(0)

    def take(self, rows: int) -> Batch:
        """This rank's share of the next ``rows`` rows of the run."""
        mine = [self._at(row) for row in range(self._row, self._row + rows) if row % self._world == self._rank]
        self._row += rows
        return make_batch(mine, self._mixture.seq_len)

    def _at(self, row: int) -> list[Rendered]:
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._epoch += 1
            self._rows = self._mixture.epoch(self._epoch)
        return self._rows[row - self._first]

    def state(self) -> dict[str, Any]:
        """Rows taken."""
        return {"rows": self._row}

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """All ranks have taken the same rows."""
        return states[0] if states else {}

    def warnings(self, state: dict[str, Any]) -> list[str]:
        """Nothing is ever passed over."""
        return []

    def close(self) -> None:
        """Nothing is open."""


def rows_in(mixture: Mixture, epochs: float) -> int:
    """Rows of so many epochs."""
    whole, part = int(epochs), epochs % 1
    count = sum(len(mixture.epoch(number)) for number in range(whole))
    return max(1, count + (round(part * len(mixture.epoch(whole))) if part else 0))


def padding(rows: Sequence[Sequence[Rendered]], seq_len: int) -> float:
    """The share of positions in rows that no conversation takes."""
    taken = sum(one.length for row in rows for one in row)
    return 1 - taken / (len(rows) * seq_len)


def target_count(rows: Sequence[Sequence[Rendered]]) -> int:
    """Tokens that are learned in rows."""
    return int(sum(one.trained[1:].sum() for row in rows for one in row))
