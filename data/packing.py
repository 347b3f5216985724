"""Rows of tokens into what the model takes: inputs, targets, positions.

A document is [begin] text [end], the begin token where the tokenizer has one. Documents are laid end
to end and cut into rows of T + 1 tokens that overlap by one, so that every token but a document's first
is predicted exactly once. After an end token a new document starts: positions start again, attention
does not reach back, and the end token itself predicts nothing, for what follows it is another
document's. (Where there is no begin token, the first token of the text is thus never predicted.)

In the padded layout a row is one document, as in GaLore's protocol (arXiv:2403.03507): its first T tokens, filled up
with end tokens where it is shorter. The filling predicts nothing and is not predicted.

Shapes: B rows, T sequence length.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

IGNORE = -100
"""Target of a position that predicts nothing (cross-entropy's usual ignore_index)."""

Array = np.ndarray[Any, Any]

Layout = Literal["packed", "padded"]
"""Documents end to end, or one a row."""


@dataclass(frozen=True)
class Batch:
    """Rows as the model takes them, all int64 (B, T)."""

    inputs: Array
    targets: Array
    """The token after each input; :data:`IGNORE` after the end of a document."""
    positions: Array
    """Each token's place within its document in this row; 0 starts one."""

    @property
    def target_count(self) -> int:
        """How many tokens are predicted."""
        return int((self.targets != IGNORE).sum())


def make_batch(rows: Array, end: int, layout: Layout = "packed") -> Batch:
    """Turn rows (B, T + 1) of token ids into a batch; ``end`` is the id that closes documents."""
    # One block of memory: the allocator keeps it for the next batch, where several would be given back.
    inputs, targets, positions = np.empty((3, len(rows), rows.shape[1] - 1), dtype=np.int64)
    inputs[:], targets[:] = rows[:, :-1], rows[:, 1:]
    ends = rows[:, :-1] == end
    targets[ends] = IGNORE
    begins = np.ones_like(ends)
    begins[:, 1:] = ends[:, :-1]
    starts = np.flatnonzero(begins)
    # Positions rise by one with every token, but for those that start a row or a document: back to 0.
    steps = positions.reshape(-1)
    steps[:] = 1
    steps[starts] = 1 - np.diff(starts, prepend=-1)
    np.cumsum(steps, out=steps)
    if layout == "padded":
        targets[:, -1] = IGNORE  # of a document that was cut it would be the filling
        # A row is one document to the model: nothing looks at the filling, which comes last.
        positions[:] = np.arange(positions.shape[1])
    return Batch(inputs, targets, positions)


def cut_rows(tokens: Array, seq_len: int) -> Array:
    """The rows (B, T + 1) in a run of B·T + 1 contiguous tokens, overlapping by one, without copying."""
    shape = ((len(tokens) - 1) // seq_len, seq_len + 1)
    return np.ndarray(shape, tokens.dtype, tokens, strides=(seq_len * tokens.itemsize, tokens.itemsize))


def one_a_row(documents: list[Array], seq_len: int, end: int) -> Array:
    """The first T tokens of each document as a row (B, T + 1) of its own, filled up with end tokens."""
    rows = np.full((len(documents), seq_len + 1), end, dtype=documents[0].dtype)
    for row, document in zip(rows, documents, strict=True):
        row[: min(seq_len, len(document))] = document[:seq_len]
    return rows


def pack(documents: list[Array], seq_len: int, end: int) -> Array:
    """All tokens of some documents as rows (B, T + 1), the last one filled up with end tokens.

    The filling predicts nothing, so the summed loss over the rows is that of the documents alone.
    """
    tokens = np.concatenate(documents)
    rows = max(1, -(-(len(tokens) - 1) // seq_len))
    filled = np.full(rows * seq_len + 1, end, dtype=tokens.dtype)
    filled[: len(tokens)] = tokens
    return cut_rows(filled, seq_len)
