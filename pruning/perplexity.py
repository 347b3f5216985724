"""The loss of a model folder on held-out text, block by block, so that it may be larger than memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from pruning.blocks import Blocks, Rows
from pruning.calibration import Documents

LENGTH = 512
"""Tokens in a row of test text."""

Progress = Callable[[int, int], None]
"""Takes how many blocks are done, and of how many."""


@dataclass(frozen=True)
class Measured:
    """The loss on one text."""

    source: str
    """Where the text is from."""
    loss: float
    """Mean negative log-likelihood of a predicted token, in nats."""
    tokens: int
    """Tokens that were predicted."""
    text_bytes: int
    """Of the text in UTF-8."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where no float holds it."""
        return math.inf if self.loss > 700 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """What tokenizers do not change: bits for each byte of text."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes


@torch.no_grad()
def measure(
    folder: Path,
    texts: Sequence[Documents],
    device: torch.device,
    *,
    length: int = LENGTH,
    progress: Progress | None = None,
) -> list[Measured]:
    """The loss of a model on each text, with the tokenizer of its own folder.

    Args:
        folder: a model folder.
        texts: held-out documents; the same ones make figures of two folders comparable.
        device: where blocks are run.
        length: tokens in a row.
        progress: told after each block.

    Raises:
        UserError: the folder or its weights are not what they should be.
    """
    blocks, tokenizer = Blocks(folder, device), Tokenizer(folder)
    rows = [Rows.of(text.batch(tokenizer, length)) for text in texts]
    hidden = [blocks.embed(one) for one in rows]
    for layer in range(blocks.layers):
        block = blocks.block(layer)
        for states, one in zip(hidden, rows, strict=True):
            blocks.through(block, states, one)
        if progress is not None:
            progress(layer + 1, blocks.layers)
    return [
        Measured(text.name, blocks.nats(states, one) / one.predicted, one.predicted, text.text_bytes)
        for text, states, one in zip(texts, hidden, rows, strict=True)
    ]
