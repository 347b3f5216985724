"""Rows of tokens into what the model takes: inputs, targets, positions.

A document is [begin] text [end], the begin token where the tokenizer has one. Documents are laid end
to end and cut into rows of T + 1 tokens that overlap by one, so that every token but a document's first
is predicted exactly once. After an end token a new document starts: positions start again, attention
does not reach back, and the end token itself predicts nothing, for what follows it is another
document's. (Where there is no begin token, the first token of the text is thus never predicted.)

Shapes: B rows, T sequence length.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE = -100
"""Target of a position that predicts nothing (cross-entropy's usual ignore_index)."""

Array = np.ndarray[Any, Any]


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


def make_batch(rows: Array, end: int) -> Batch:
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
    return Batch(inputs, targets, positions)


def cut_rows(tokens: Array, seq_len: int) -> Array:
    """The rows (B, T + 1) in a run of B·T + 1 contiguous tokens, overlapping by one, without copying."""
    shape = ((len(tokens) - 1) // seq_len, seq_len + 1)
    return np.ndarray(shape, tokens.dtype, tokens, strides=(seq_len * tokens.itemsize, tokens.itemsize))


def pack(documents: list[Array], seq_len: int, end: int) -> Array:
    """All tokens of some documents as rows (B, T + 1), the last one filled up with end tokens.

    The filling predicts nothing, so the summed loss over the rows is that of the documents alone.
    """
    tokens = np.concatenate(documents)
    rows = max(1, -(-(len(tokens) - 1) // seq_len))
    filled = np.full(rows * seq_len + 1, end, dtype=tokens.dtype)
    filled[: len(tokens)] = tokens
    return cut_rows(filled, seq_len)
