"""How frequent each token is, which says what a smaller vocabulary can do without.

Counts alone do not: in a million tokens of text most tokens of a vocabulary occur a few times or never, and tell as
little of those that go as of those that stay. The model has seen a million times as much: its prediction, averaged over
some calibration text, says what it expects, and the rows of its embedding lie by how often they were trained. What the
counts of all tokens say of these two, by regression, is the prior that each token's own count is added to.

Shapes: V vocabulary, D model width, K = 2 + D inputs of the regression, P tokens of a part.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from data.packing import Array
from data.tokenizer import Tokenizer

if TYPE_CHECKING:  # a plan lists vocabularies without torch
    from torch import Tensor

    from pruning.blocks import Blocks, Rows

EXPECTED_TOKENS = 32_768
"""Of the calibration text that the model predicts at most."""

SHAPE = 2.0
"""Of the gamma distribution of frequencies around what the regression says (docs/log.md: 1 to 4 do alike)."""

RIDGE = 100.0
"""Penalty of the embedding's weights, in units of its mean square."""

STEPS = 50
"""Of the regression at most; it takes eight."""

ENOUGH = 0.01
"""Where it ends: no frequency changes by more, relatively."""

PART = 16_384
"""Rows of the embedding that are in fp32 at one time."""


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Array:
    """How often each id occurs in some texts (V,)."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    texts = iter(texts)
    while some := list(islice(texts, 256)):
        ids = np.concatenate(tokenizer.encode_documents(some))
        counts += np.bincount(ids.astype(np.int64), minlength=len(counts))
    return counts


def expected_tokens(blocks: "Blocks", rows: "Rows", progress: Callable[[int], None]) -> Array:
    """The probability of each token in the model's mean prediction (V,).

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
    found: Array = blocks.expected(hidden, some).numpy()
    return found


def frequencies(counts_V: Array, expected_V: Array, embedding_VD: "Tensor") -> Array:
    """How often each token occurs on average in as much text as was counted (V,).

    A count has Poisson's distribution around the token's frequency, and this a gamma distribution of shape
    :data:`SHAPE` around a prior whose logarithm is linear in that of what the model expects and in the embedding.

    Args:
        counts_V: of each token in the text; there must be some.
        expected_V: as :func:`expected_tokens` gives them.
        embedding_VD: of the model.

    Returns:
        The posterior mean.
    """
    prior_V = np.exp(_regression(counts_V.astype(np.float64), expected_V, embedding_VD))
    found: Array = (counts_V + SHAPE) / (1 + SHAPE / prior_V)
    return found


def _regression(counts_V: Array, expected_V: Array, embedding_VD: "Tensor") -> Array:
    """The logarithm of each count's mean, by negative binomial regression with a ridge.

    The negative log-likelihood Σ (c + S)·log(S + μ) - c·log μ is convex in log μ. It is brought down by Newton's steps,
    from the same mean for all.
    """
    log_V = np.full(len(counts_V), np.log(counts_V.mean()))
    weights_K = np.array([log_V[0], *[0.0] * (1 + embedding_VD.shape[1])])
    squares = sum(float(rows.float().square().sum()) for rows in embedding_VD.split(PART))
    penalty_K = np.array([0, 0, *[RIDGE * squares / embedding_VD.numel()] * embedding_VD.shape[1]])

    def loss(log_V: Array, weights_K: Array) -> float:
        likelihood_V = (counts_V + SHAPE) * np.logaddexp(np.log(SHAPE), log_V) - counts_V * log_V
        return float(likelihood_V.sum() + (penalty_K * weights_K**2).sum() / 2)

    for _ in range(STEPS):
        chance_V = 1 / (1 + SHAPE * np.exp(-log_V))
        slope_V = (counts_V + SHAPE) * chance_V - counts_V
        curve_V = (counts_V + SHAPE) * chance_V * (1 - chance_V)
        slope_K, curve_KK = penalty_K * weights_K, np.diag(penalty_K)
        for part, inputs_PK in _inputs(expected_V, embedding_VD):
            slope_K += inputs_PK.T @ slope_V[part]
            curve_KK += (inputs_PK.T * curve_V[part].astype(np.float32)) @ inputs_PK
        step_K = np.linalg.solve(curve_KK, -slope_K)
        step_V = np.concatenate([inputs_PK @ step_K for _, inputs_PK in _inputs(expected_V, embedding_VD)])
        now, share = loss(log_V, weights_K), 1.0
        while loss(log_V + share * step_V, weights_K + share * step_K) > now and share > ENOUGH:
            share /= 2
        log_V, weights_K = log_V + share * step_V, weights_K + share * step_K
        if np.abs(share * step_V).max() < ENOUGH:
            break
    return log_V


def _inputs(expected_V: Array, embedding_VD: "Tensor") -> Iterator[tuple[slice, Array]]:
    """A constant, the logarithm of what is expected, and the embedding (P, K) in fp32, by parts and their places."""
    log_V1 = np.log(np.maximum(expected_V, 1e-12))[:, None].astype(np.float32)
    for first in range(0, len(log_V1), PART):
        part = slice(first, first + PART)
        yield part, np.hstack([np.ones_like(log_V1[part]), log_V1[part], embedding_VD[part].float().numpy()])
