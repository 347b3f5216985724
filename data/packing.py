"""Rows of tokens into what the model takes: inputs, targets, positions.

A document is [begin] text [end], the begin token where the tokenizer has one. Documents are laid end
to end and cut into rows of T + 1 tokens that overlap by one, so that every token is predicted exactly
once. After an end token a new document starts: positions start again, attention does not reach back,
and the end token itself predicts nothing, for what follows it is another document's.

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
    inputs = rows[:, :-1].astype(np.int64)
    targets = rows[:, 1:].astype(np.int64)
    ends = inputs == end
    targets[ends] = IGNORE
    place = np.arange(inputs.shape[1])
    starts = np.zeros_like(inputs)
    starts[:, 1:] = np.where(ends[:, :-1], place[1:], 0)
    return Batch(inputs, targets, place - np.maximum.accumulate(starts, axis=1))


def cut_rows(tokens: Array, seq_len: int) -> Array:
    """The rows (B, T + 1) in a run of B·T + 1 tokens, overlapping by one, without copying."""
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def pack(documents: list[Array], seq_len: int, end: int) -> Array:
    """All tokens of some documents as rows (B, T + 1), the last one filled up with end tokens.

    The filling predicts nothing, so the summed loss over the rows is that of the documents alone.
    """
    tokens = np.concatenate(documents)
    rows = max(1, -(-(len(tokens) - 1) // seq_len))
    filled = np.full(rows * seq_len + 1, end, dtype=tokens.dtype)
    filled[: len(tokens)] = tokens
    return cut_rows(filled, seq_len)
