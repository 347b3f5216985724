"""The ``tokenizer.json`` of a byte-level BPE, read and rebuilt with fewer tokens.

Whatever is left encodes a text whose tokens are all left as the whole did: merges keep their order, and a token comes
with every token that BPE passes through on the way to it.
"""

import copy
import json
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from common.errors import UserError


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

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return self.vocab | self.added

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Every id, and its token."""
        return {number: token for token, number in self.ids.items()}

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

    def rebuilt(self, new: dict[int, int]) -> dict[str, Any]:
        """The content of the ``tokenizer.json`` with the tokens in ``new`` alone, which has their new ids.

        Added tokens must be among them.
        """
        vocab = {token: new[old] for token, old in self.vocab.items() if old in new}
        merges = [[left, right] for left, right in self.merges if {left, right, left + right} <= vocab.keys()]
        added = [one | {"id": new[one["id"]]} for one in self.content.get("added_tokens") or ()]
        return self.content | {
            "added_tokens": sorted(added, key=lambda one: one["id"]),
            "post_processor": _renumbered(self.content.get("post_processor"), new),
            "model": self.content["model"] | {"vocab": vocab, "merges": merges},
        }


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


def _kinds(part: Any) -> set[str]:
    """The types that occur in a pre-tokenizer or post-processor, sequences looked into."""
    if not isinstance(part, dict):
        return set()
    inner = [one for name in ("pretokenizers", "processors") for one in part.get(name) or ()]
    return {str(part.get("type"))} | {kind for one in inner for kind in _kinds(one)}


def _renumbered(part: Any, new: dict[int, int]) -> Any:
    """A post-processor whose templates insert the new ids."""
    if not isinstance(part, dict):
        return part
    changed = copy.copy(part)
    if part.get("processors"):
        changed["processors"] = [_renumbered(one, new) for one in part["processors"]]
    if part.get("special_tokens"):
        changed["special_tokens"] = {
            name: one | {"ids": [new[old] for old in one["ids"]]} for name, one in part["special_tokens"].items()
        }
    return changed
