"""A smaller vocabulary: which tokens stay, the tokenizer rebuilt for them, and the rows of the matrices that go.

Byte-level BPE alone is taken. There every text stays encodable as long as the single bytes do, and a text whose
tokens all stay is encoded as before, token for token: a token stays with every token that BPE passes through on the
way to it, and the merges that are left keep their order.

In formulas: V tokens before, W after.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from common.errors import UserError
from common.files import write_json, write_text
from data.packing import Array
from data.settings import Mix
from data.sources import Corpus, TextSource
from data.tokenizer import Tokenizer, sample_texts
from models.hf_config import read_values
from pruning.byte_level import ByteLevelBpe, text_of_token
from pruning.frequency import count_tokens
from train.records import stored_generation

KEPT_FILE = "kept_tokens.json"
"""In a model folder with a cut vocabulary: the parent's id of every token, by the new id."""

COUNTED_BYTES = 20_000_000
"""Of text that tokens are counted in: five million tokens of English, in a minute."""

VERIFIED = 200
"""Documents of it that the rebuilt tokenizer is verified on."""

PROBES = (
    'A probe of plain words, then 12,345.67 numbers; "quotes", tabs\tand\nnew lines.',
    "def f(x):\n    return x ** 2  # naïve café, Ελληνικά, русский, 日本語, العربية, 🙂",
    "简单的回答很少是完整的回答。画蛇添足，守株待兔。",
)
"""Texts that every rebuilt tokenizer is verified on, beside some of those that tokens were counted in."""

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


def cut_vocabulary(
    folder: Path, out: Path, size: int, mix: Mix, *, frequencies: Callable[[Array], Array], chinese: int
) -> list[int]:
    """Choose tokens by their frequency and write the tokenizer, all that a cut begins with.

    Args:
        folder: the model folder.
        out: an existing folder, which gets the tokenizer's files and :data:`KEPT_FILE`.
        size: tokens that stay.
        mix: the text; :data:`COUNTED_BYTES` of its training part are counted.
        frequencies: what the counts of all tokens (V,) say of how frequent they are.
        chinese: tokens with Chinese characters to keep at least.

    Returns:
        The old id of every new token: ``size`` of them, in their old order.

    Raises:
        UserError: as :func:`choose_tokens` and :func:`write_tokenizer`; the text is not there, or is no text.
    """
    corpus = Corpus.open(mix)
    if not all(isinstance(source, TextSource) for source in corpus.sources):
        raise UserError(f"{mix} holds prepared tokens; a vocabulary is chosen on text: give the text itself")
    texts = list(sample_texts(corpus, COUNTED_BYTES))
    rows = read_values(folder)["vocab_size"]
    counts = np.zeros(rows)
    counted = count_tokens(Tokenizer(folder), texts)
    counts[: len(counted)] = counted
    kept = choose_tokens(folder, size, frequencies(counts), rows=rows, chinese=chinese, named=named_tokens(folder))
    write_tokenizer(folder, kept, out, texts[:VERIFIED])
    return kept


def smallest_vocabulary(folder: Path, chinese: int) -> int | None:
    """Tokens that stay in any case, about; None where the tokenizer is of a kind that cannot be cut."""
    try:
        bpe = ByteLevelBpe(folder)
    except UserError:
        return None
    return len(_in_any_case(bpe, _learned(bpe, np.zeros(0, dtype=np.int64)), chinese, named_tokens(folder)))


def choose_tokens(
    folder: Path, size: int, counts: Array, *, rows: int, chinese: int = 0, named: Iterable[int] = ()
) -> list[int]:
    """The ids that stay, in their old order: a token's place in the list is its new id.

    All added tokens, all bytes and ``named`` stay; then the first ``chinese`` tokens with Chinese characters and the
    first others, both by falling count and, where counts are equal, in the order in which BPE learned them; each with
    the tokens on the way to it. Where the tokenizer has fewer tokens than ``size``, rows of the matrices without a
    token stay at the end, so that the list has exactly ``size`` ids.

    Args:
        folder: of the model or tokenizer.
        size: W.
        counts: how frequent each id is, those beyond its end not at all.
        rows: of the embedding matrix, V; ids of the tokenizer are below it.
        chinese: tokens with Chinese characters to keep at least, if there are as many.
        named: more ids to keep, such as those in ``config.json``.

    Raises:
        UserError: the tokenizer cannot be cut, or ``size`` is too small for what must stay.
    """
    bpe = ByteLevelBpe(folder)
    ids, tokens = bpe.ids, bpe.tokens
    learned = _learned(bpe, counts)
    kept = _in_any_case(bpe, learned, chinese, named)
    if len(kept) > size:
        raise UserError(
            f"a vocabulary of {size:,} is too small: special tokens, bytes and {chinese:,} Chinese tokens "
            f"(--chinese-tokens) with those on the way to them make {len(kept):,}"
        )
    shortest = sorted(learned, key=lambda one: len(tokens[one]))  # fills places too few for what came before
    for number in [*learned, *shortest]:
        needed = {ids[token] for token in bpe.passed(tokens[number])} - kept if len(kept) < size else ()
        if len(kept) + len(needed) <= size:
            kept.update(needed)
    without_token = [row for row in range(rows) if row not in tokens]
    return [*sorted(kept), *without_token[: size - len(kept)]]


def _learned(bpe: ByteLevelBpe, counts: Array) -> list[int]:
    """The ids of all tokens but the added ones, the most frequent first."""
    learned = set(bpe.vocab.values()) - set(bpe.added.values())
    return sorted(learned, key=lambda one: (-counts[one] if one < len(counts) else 0, one))


def _in_any_case(bpe: ByteLevelBpe, learned: Sequence[int], chinese: int, named: Iterable[int]) -> set[int]:
    """Added tokens, bytes, named ones, and the first Chinese ones with those on the way to them."""
    alphabet = {bpe.ids[char] for char in pre_tokenizers.ByteLevel.alphabet() if char in bpe.ids}
    kept = {*bpe.added.values(), *alphabet, *(one for one in named if one in bpe.tokens)}
    for number in [one for one in learned if _CHINESE.search(text_of_token(bpe.tokens[one]))][:chinese]:
        kept.update(bpe.ids[token] for token in bpe.passed(bpe.tokens[number]))
    return kept


def write_tokenizer(folder: Path, kept: Sequence[int], out: Path, texts: Iterable[str] = ()) -> None:
    """Write the tokenizer of ``folder`` with the tokens ``kept`` alone into the existing folder ``out``.

    Beside the tokenizer's files stands :data:`KEPT_FILE`. The result is verified on :data:`PROBES` and ``texts``.

    Raises:
        UserError: the tokenizer cannot be cut, or the verification fails.
    """
    bpe = ByteLevelBpe(folder)
    new = {old: number for number, old in enumerate(kept)}
    before = Tokenizer(folder)
    before.copy_to(out)
    write_json(out / "tokenizer.json", bpe.rebuilt(new))
    file = out / "tokenizer_config.json"
    if file.exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        decoder = config.get("added_tokens_decoder")
        if decoder:
            config["added_tokens_decoder"] = {str(new[int(old)]): one for old, one in decoder.items()}
        write_json(file, config)
    write_text(out / KEPT_FILE, json.dumps(list(kept)) + "\n")
    verify(before, Tokenizer(out), kept, [*PROBES, *texts])


def verify(before: Tokenizer, after: Tokenizer, kept: Sequence[int], texts: Iterable[str]) -> None:
    """Raise a UserError unless every text decodes as before, and those whose tokens all stay have the same tokens."""
    new = {old: number for number, old in enumerate(kept)}
    for text in texts:
        old_ids, new_ids = before.encode(text), after.encode(text)
        same = [new[old] for old in old_ids] == new_ids if all(old in new for old in old_ids) else True
        if not same or after.decode(new_ids, special=True) != before.decode(old_ids, special=True):
            what = "decodes" if same else "is encoded"
            raise UserError(
                f"the tokenizer in {before.folder} cannot be cut: with {len(kept):,} tokens {text[:60]!r} {what} "
                "otherwise than before; leave the vocabulary whole: --vocab keep"
            )


def renumbered(values: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """``config.json`` or ``generation_config.json`` with the new ids of the special tokens; one that went is null."""
    new = {old: number for number, old in enumerate(kept)}
    changed = copy.copy(values)
    for name, ids in special_ids(values).items():
        left = [new[one] for one in ids if one in new]
        changed[name] = left if isinstance(values[name], list) else next(iter(left), None)
    return changed


def special_ids(values: dict[str, Any]) -> dict[str, list[int]]:
    """The ids that ``config.json`` or ``generation_config.json`` gives special tokens, by the setting's name."""
    found = {name: value for name, value in values.items() if name.endswith("_token_id") and value is not None}
    return {name: list(value) if isinstance(value, list) else [value] for name, value in found.items()}


def named_tokens(folder: Path) -> list[int]:
    """The ids that a folder's ``config.json`` and ``generation_config.json`` name."""
    named = [special_ids(read_values(folder)), special_ids(stored_generation(folder))]
    return [one for settings in named for ids in settings.values() for one in ids]
