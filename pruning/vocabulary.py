"""A smaller vocabulary: which tokens stay, the tokenizer rebuilt for them, and the rows of the matrices that go.

Byte-level BPE alone is taken. There every text stays encodable as long as the single bytes do, and a text whose
tokens all stay is encoded as before, token for token: a token stays with every token that BPE passes through on the
way to it, and the merges that are left keep their order.

In formulas: V tokens before, W after.
"""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from common.errors import UserError
from common.files import write_json, write_text
from data.packing import Array
from data.tokenizer import Tokenizer

KEPT_FILE = "kept_tokens.json"
"""In a model folder with a cut vocabulary: the parent's id of every token, by the new id."""

PROBES = (
    'A probe of plain words, then 12,345.67 numbers; "quotes", tabs\tand\nnew lines.',
    "def f(x):\n    return x ** 2  # naïve café, Ελληνικά, русский, 日本語, العربية, 🙂",
    "简单的回答很少是完整的回答。画蛇添足，守株待兔。",
)
"""Texts that every rebuilt tokenizer is verified on, beside those that the tokens were counted on."""

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


class ByteLevelBpe:
    """The ``tokenizer.json`` of a model folder, of the one kind whose vocabulary can be cut.

    Raises:
        UserError: it is of another kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.content: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            model = self.content["model"]
            self.vocab: dict[str, int] = model["vocab"]
            self.added: dict[str, int] = {one["content"]: one["id"] for one in self.content.get("added_tokens") or ()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        kinds = _kinds(self.content.get("pre_tokenizer"))
        if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in kinds:
            raise UserError(
                f"the tokenizer in {folder} is no byte-level BPE ({model.get('type')} behind "
                f"{', '.join(sorted(kinds)) or 'no pre-tokenizer'}), so its vocabulary cannot be cut; leave it whole: "
                "--vocab keep"
            )
        others = _kinds(self.content.get("post_processor")) - {"ByteLevel", "TemplateProcessing", "Sequence"}
        if others:
            raise UserError(
                f"the tokenizer in {folder} has a post-processor of an unknown kind, {', '.join(others)}; leave the "
                "vocabulary whole: --vocab keep"
            )
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        self.merges: dict[tuple[str, str], int] = {(left, right): rank for rank, (left, right) in enumerate(merges)}

    @property
    def ids(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return self.vocab | self.added

    def passed(self, token: str) -> list[str]:
        """The tokens that BPE makes on its way to a token of the vocabulary, itself included.

        The merges within a token are the same wherever in a word it stands, because none crosses its ends. A token
        that merges do not reach is only ever taken whole (``ignore_merges``) and needs no other.
        """
        parts, made = list(token), set(token)
        while len(parts) > 1:
            ranks = [self.merges.get(pair, len(self.merges)) for pair in pairwise(parts)]
            lowest = min(ranks)
            if lowest == len(self.merges):
                return [token]
            place = ranks.index(lowest)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            made.add(parts[place])
        return sorted(made)


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Array:
    """How often each id occurs in some texts (V,)."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    texts = iter(texts)
    while some := list(islice(texts, 256)):
        ids = np.concatenate(tokenizer.encode_documents(some))
        counts += np.bincount(ids.astype(np.int64), minlength=len(counts))
    return counts


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
        counts: from :func:`count_tokens`.
        rows: of the embedding matrix, V; ids of the tokenizer are below it.
        chinese: tokens with Chinese characters to keep at least, if there are as many.
        named: more ids to keep, such as those in ``config.json``.

    Raises:
        UserError: the tokenizer cannot be cut, or ``size`` is too small for what must stay.
    """
    bpe = ByteLevelBpe(folder)
    ids, tokens = bpe.ids, {number: token for token, number in bpe.ids.items()}
    learned = sorted(set(bpe.vocab.values()) - set(bpe.added.values()), key=lambda one: (-_count(counts, one), one))
    alphabet = {ids[char] for char in pre_tokenizers.ByteLevel.alphabet() if char in ids}
    kept = {*bpe.added.values(), *alphabet, *(one for one in named if one in tokens)}
    for number in [one for one in learned if _CHINESE.search(text_of_token(tokens[one]))][:chinese]:
        kept.update(ids[token] for token in bpe.passed(tokens[number]))
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
    write_json(out / "tokenizer.json", _rebuilt(bpe, new))
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


def cut_rows(matrix: Tensor, kept: Sequence[int]) -> Tensor:
    """The rows of an embedding (V, D), a head (V, D) or its bias (V,) that stay: (W, D) or (W,)."""
    return matrix.index_select(0, torch.tensor(kept, dtype=torch.long))


def text_of_token(token: str) -> str:
    """What a byte-level token spells; "" where its bytes are a part of a character, or it is an added token."""
    try:
        return bytes(bytes_of_characters()[char] for char in token).decode()
    except (KeyError, UnicodeDecodeError):
        return ""


@cache
def bytes_of_characters() -> dict[str, int]:
    """The character that stands for each byte: itself where it can be seen, the others one by one beyond them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    seen = [char for char in alphabet if ord(char) < 256]
    others = sorted(set(range(256)) - set(map(ord, seen)))
    return dict(zip(alphabet, [*map(ord, seen), *others], strict=True))


def _count(counts: Array, number: int) -> int:
    return int(counts[number]) if number < len(counts) else 0


def _kinds(part: Any) -> set[str]:
    """The types that occur in a pre-tokenizer or post-processor, sequences looked into."""
    if not isinstance(part, dict):
        return set()
    inner = [one for name in ("pretokenizers", "processors") for one in part.get(name) or ()]
    return {str(part.get("type"))} | {kind for one in inner for kind in _kinds(one)}


def _rebuilt(bpe: ByteLevelBpe, new: dict[int, int]) -> dict[str, Any]:
    """The content of the new ``tokenizer.json``."""
    vocab = {token: new[old] for token, old in bpe.vocab.items() if old in new}
    merges = [[left, right] for left, right in bpe.merges if {left, right, left + right} <= vocab.keys()]
    added = [one | {"id": new[one["id"]]} for one in bpe.content.get("added_tokens") or ()]
    return bpe.content | {
        "added_tokens": sorted(added, key=lambda one: one["id"]),
        "post_processor": _renumbered_processor(bpe.content.get("post_processor"), new),
        "model": bpe.content["model"] | {"vocab": vocab, "merges": merges},
    }


def _renumbered_processor(part: Any, new: dict[int, int]) -> Any:
    """A post-processor whose templates insert the new ids."""
    if not isinstance(part, dict):
        return part
    changed = copy.copy(part)
    if part.get("processors"):
        changed["processors"] = [_renumbered_processor(one, new) for one in part["processors"]]
    if part.get("special_tokens"):
        changed["special_tokens"] = {
            name: one | {"ids": [new[old] for old in one["ids"]]} for name, one in part["special_tokens"].items()
        }
    return changed
