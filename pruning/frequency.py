"""How frequent each token is, which says what a smaller vocabulary can do without.

Counts alone do not: in a million tokens of text most tokens of a vocabulary occur a few times or never, and tell as
little of those that go as of those that stay. The model has seen a million times as much. What it expects, its
prediction averaged over some of the calibration text, is the prior that counts are added to: the posterior mean of a
Dirichlet distribution.

Shapes: V vocabulary.
"""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from data.packing import Array
from data.tokenizer import Tokenizer

if TYPE_CHECKING:  # a plan lists vocabularies without torch
    from pruning.blocks import Blocks, Rows

EXPECTED_TOKENS = 32_768
"""Of the calibration text that the model predicts at most."""

PRIOR_TOKENS = 5_000_000
"""Counted tokens that the model's expectation weighs as much as (docs/log.md: little changes from 2 to 6 million)."""


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Array:
    """How often each id occurs in some texts (V,)."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    texts = iter(texts)
    while some := list(islice(texts, 256)):
        ids = np.concatenate(tokenizer.encode_documents(some))
        counts += np.bincount(ids.astype(np.int64), minlength=len(counts))
    return counts


def expected_tokens(blocks: "Blocks", rows: "Rows", progress: Callable[[int], None]) -> Array:
    """How often each token occurs in :data:`PRIOR_TOKENS` of such text, if the model is right (V,).

    Args:
        blocks: the model.
        rows: calibration text, of which the first :data:`EXPECTED_TOKENS` count.
        progress: told how many blocks are done.
    """
    some = rows.first(EXPECTED_TOKENS)
    hidden = blocks.embed(some)
    for layer in range(blocks.layers):
        blocks.through(blocks.block(layer), hidden, some)
        progress(layer + 1)
    found: Array = PRIOR_TOKENS * blocks.expected(hidden, some).numpy()
    return found
