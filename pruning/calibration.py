"""Text that a model is pruned by, and text that it is measured on, as rows of tokens.

Calibration text is a draw of whole documents from many: breadth matters more than which criterion reads them. Rows are
packed as in training: attention stays inside each document, so that a model sees what it will be used on, whichever
way it was trained.

Shapes: B rows, T tokens in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import UserError
from data.packing import Array, Batch, make_batch, pack
from data.prepared import PreparedSource
from data.settings import Mix
from data.sources import DamagedShardError, TextSource, held_out, is_c4, lines, open_source, text_of
from data.tokenizer import Tokenizer
from data.validation import held_out_texts

POOL = 8
"""Documents are drawn from so many times the tokens that are wanted, where a source has them."""

BYTES_PER_TOKEN = 4
"""Of English text, about: how much text is read into the pool."""


@dataclass(frozen=True)
class Documents:
    """Texts of one source."""

    name: str
    """Where they are from, for records and tables."""
    texts: tuple[str, ...]

    @property
    def text_bytes(self) -> int:
        """Of all texts in UTF-8: the denominator of bits per byte."""
        return sum(len(text.encode()) for text in self.texts)

    def batch(self, tokenizer: Tokenizer, length: int) -> Batch:
        """All of them, packed into rows of ``length`` tokens."""
        return make_batch(pack(tokenizer.encode_documents(list(self.texts)), length, tokenizer.end), tokenizer.end)


@dataclass(frozen=True)
class Calibration:
    """The documents that a model is pruned by. With another tokenizer they become other rows of the same text."""

    sources: tuple[Documents, ...]
    weights: tuple[float, ...]
    """The share of the tokens that each source has."""
    rows: int
    length: int
    seed: int

    def batch(self, tokenizer: Tokenizer) -> Batch:
        """Rows (B, T), each source's share of them in turn.

        Raises:
            UserError: the documents have too few tokens.
        """
        counts = _shares(self.rows, self.weights)
        rows = [
            _rows(documents, tokenizer, count, self.length)
            for documents, count in zip(self.sources, counts, strict=True)
        ]
        return make_batch(np.concatenate(rows), tokenizer.end)

    @property
    def texts(self) -> Iterator[str]:
        """Every document."""
        for source in self.sources:
            yield from source.texts

    @property
    def c4_alone(self) -> bool:
        """Whether the text is C4 from the hub and nothing else, as track 1 of the competition has it."""
        return all(is_c4(source.name) for source in self.sources)

    def record(self) -> dict[str, Any]:
        """What is written down of it."""
        shares = zip(self.sources, self.weights, strict=True)
        return {
            "sources": [
                {"source": source.name, "weight": share, "documents": len(source.texts)} for source, share in shares
            ],
            "tokens": self.rows * self.length,
            "rows": self.rows,
            "row_length": self.length,
            "seed": self.seed,
            "outside_track_1": not self.c4_alone,
        }


def read_calibration(mix: Mix, tokenizer: Tokenizer, rows: int, length: int, seed: int) -> Calibration:
    """Draw whole documents from the training shards of each source until they fill its share of the rows.

    Args:
        mix: sources and weights.
        tokenizer: of the model.
        rows: B.
        length: T.
        seed: of the draw.

    Raises:
        UserError: a source is not there, is no text, or has too little of it.
    """
    weights = tuple(weight for _, weight in mix.parts)
    counts = _shares(rows, weights)
    sources = tuple(
        Documents(name, tuple(_draw(_text_source(name), tokenizer, count * length + 1, seed)))
        for (name, _), count in zip(mix.parts, counts, strict=True)
    )
    return Calibration(sources, weights, rows, length, seed)


def read_test(name: str, tokenizer: Tokenizer, tokens: int) -> Documents:
    """The first held-out documents of a source until they have ``tokens`` tokens.

    Raises:
        UserError: the source is not there, is no text, or holds out none.
    """
    source, texts, count = _text_source(name), [], 0
    for text in held_out_texts(source):
        texts.append(text)
        count += len(tokenizer.encode_documents([text])[0])
        if count >= tokens:
            break
    if not texts:
        raise UserError(
            f"{name} holds no validation text: it has no shard with 'validation' in its name, and is too small for one "
            "document in 200 to be held out. Give c4, or a folder with such a shard"
        )
    return Documents(source.origin, tuple(texts))


def _text_source(name: str) -> TextSource:
    source = open_source(name)
    if isinstance(source, PreparedSource):
        raise UserError(f"{name} holds prepared tokens, and pruning reads text: give {source.origin} instead")
    return source


def _shares(rows: int, weights: tuple[float, ...]) -> list[int]:
    """How many of the rows each source has: at least one, the first ones what is left over."""
    if rows < len(weights):
        raise UserError(f"{rows} rows of calibration text are too few for {len(weights)} sources; ask for more tokens")
    counts = [max(1, int(rows * weight)) for weight in weights]
    for number in range(rows - sum(counts)):
        counts[number % len(counts)] += 1
    while sum(counts) > rows:
        counts[counts.index(max(counts))] -= 1
    return counts


def _draw(source: TextSource, tokenizer: Tokenizer, tokens: int, seed: int) -> list[str]:
    """Documents of at least ``tokens`` tokens, in an order by the seed."""
    rng = np.random.default_rng(seed)
    pool, size = [], 0
    for text in _training_texts(source, rng):
        pool.append(text)
        size += len(text.encode())
        if size >= POOL * BYTES_PER_TOKEN * tokens:
            break
    texts, count = [], 0
    for number in rng.permutation(len(pool)):
        texts.append(pool[number])
        count += len(tokenizer.encode_documents([pool[number]])[0])
        if count >= tokens:
            return texts
    raise UserError(
        f"{source.name} has {count:,} tokens of training text, too few for the {tokens:,} that calibration asks of it; "
        "ask for fewer tokens, or give more text"
    )


def _training_texts(source: TextSource, rng: np.random.Generator) -> Iterator[str]:
    """The training documents, shards in an order by the seed, a shard up to where it is damaged."""
    for place in rng.permutation(len(source.train)):
        shard = source.train[place]
        try:
            for number, line in enumerate(lines(shard), 1):
                text = text_of(line, shard, number)
                if text and not (source.holds_out and held_out(text)):
                    yield text
        except DamagedShardError:
            continue


def _rows(documents: Documents, tokenizer: Tokenizer, rows: int, length: int) -> Array:
    """The first so many rows (B, T + 1), whole ones, of some documents."""
    encoded = tokenizer.encode_documents(list(documents.texts))
    whole = (sum(map(len, encoded)) - 1) // length
    if whole < rows:
        raise UserError(
            f"the documents of {documents.name} fill {whole} rows of {length} tokens, not {rows}; ask for fewer "
            "tokens, or give more text"
        )
    return pack(encoded, length, tokenizer.end)[:rows]
