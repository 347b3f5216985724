"""Held-out text: the corpus's validation shards, or where it has none, documents chosen by hash."""

from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import UserError
from data.packing import Array, Layout, one_a_row, pack
from data.prepared import PreparedSource
from data.sources import DamagedShardError, TextSource, held_out, lines, text_of
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """Documents: whole and packed, or the beginning of each in a row of its own."""

    name: str
    """The source they are from."""
    rows: Array
    """Token ids (B, T + 1)."""
    text_bytes: int
    """Bytes of UTF-8 of the whole documents' text: the denominator of bits per byte where nothing is cut."""
    documents: int
    layout: Layout = "packed"


def read_held_out(
    source: TextSource | PreparedSource, tokenizer: Tokenizer, seq_len: int, tokens: int, layout: Layout = "packed"
) -> HeldOut:
    """The first held-out documents of a source, until they have ``tokens`` tokens, of padded rows those that are kept.

    Raises:
        UserError: the corpus holds out no document at all.
    """
    reader = _prepared(source) if isinstance(source, PreparedSource) else _text(source, tokenizer)
    documents: list[Array] = []
    text_bytes = count = 0
    for ids, size in reader:
        documents.append(ids[:seq_len] if layout == "padded" else ids)
        text_bytes += size
        count += len(documents[-1])
        if count >= tokens:
            break
    if not documents:
        raise UserError(
            f"{source.name} holds no validation text: it has no shard with 'validation' in its name, and is too small "
            "for one document in 200 to be held out. Add such a shard, or use --eval.every 0"
        )
    rows = (one_a_row if layout == "padded" else pack)(documents, seq_len, tokenizer.end)
    return HeldOut(source.name, rows, text_bytes, len(documents), layout)


def held_out_texts(source: TextSource) -> Iterator[str]:
    """The held-out documents of a source of text, in its order.

    Raises:
        UserError: a validation shard is damaged. One of training shards ends where it is damaged.
    """
    for shard in source.validation or source.train:
        try:
            for number, line in enumerate(lines(shard), 1):
                text = text_of(line, shard, number)
                if text and (source.validation or held_out(text)):
                    yield text
        except DamagedShardError as error:
            if source.validation:
                raise UserError(f"{error}. Fetch it again") from error


def _text(source: TextSource, tokenizer: Tokenizer) -> Iterator[tuple[Array, int]]:
    for text in held_out_texts(source):
        yield tokenizer.encode_documents([text])[0], len(text.encode())


def _prepared(source: PreparedSource) -> Iterator[tuple[Array, int]]:
    for shard in source.validation:
        bounds, sizes = shard.bounds().tolist(), shard.text_bytes().tolist()
        for start, stop, size in zip(bounds, bounds[1:], sizes, strict=False):
            if stop > start:
                yield shard.tokens(start, stop), size
