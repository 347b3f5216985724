"""Prepared tokens: the format, and reading it by memory map.

A prepared folder holds, for every shard of its source::

    train-00000.tokens          token ids, little-endian uint16 (uint32 when the vocabulary exceeds 65,536)
    train-00000.bounds.npy      uint64, one more than there are documents: where each starts and ends
    train-00000.json            its name at the source, counts, and a checksum of every block of tokens
    validation-00000.*          the same, with text_bytes.npy: uint32 bytes of text a document
    tokenizer/                  the tokenizer that made them
    manifest.json               written last: the list of all shards

Documents stand in the order of the source. One that is held out for validation keeps its place among
the training documents with no tokens, so that documents have the same numbers in both forms.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from common.errors import UserError
from data.packing import Array

MANIFEST = "manifest.json"
BEGUN = "begun.json"
"""Names the source and the tokenizer; there from the first shard on."""

BLOCK = 2**20
"""Tokens that one checksum covers; a block is checked when it is first read."""


def block_checksums(tokens: Array) -> list[str]:
    """xxHash of every block of :data:`BLOCK` tokens."""
    return [xxhash.xxh3_64_hexdigest(tokens[at : at + BLOCK].tobytes()) for at in range(0, len(tokens), BLOCK)]


@dataclass(frozen=True)
class PreparedShard:
    """One shard of prepared tokens."""

    folder: Path
    stem: str
    """What its files are called, such as ``train-00000``."""
    name: str
    """The shard at the source, which decides the order of shards."""
    dtype: str
    tokens_count: int
    documents: int
    checksums: tuple[str, ...]
    index_checksums: dict[str, str]
    """xxHash of the index files, ``bounds`` and ``text_bytes``."""

    @cached_property
    def _tokens(self) -> Array:
        path = self.folder / f"{self.stem}.tokens"
        expected = self.tokens_count * np.dtype(self.dtype).itemsize
        size = path.stat().st_size if path.exists() else -1
        if size != expected:
            found = "is missing" if size < 0 else f"has {size:,} bytes"
            raise self._damaged(f"{path} {found}, expected {expected:,}")
        return np.memmap(path, dtype=self.dtype, mode="r") if expected else np.empty(0, dtype=self.dtype)

    @cached_property
    def _checked(self) -> Array:
        return np.zeros(len(self.checksums), dtype=bool)

    def tokens(self, start: int, stop: int) -> Array:
        """Token ids start to stop; UserError when a block of them is damaged."""
        blocks = slice(start // BLOCK, (stop + BLOCK - 1) // BLOCK)
        if not self._checked[blocks].all():
            for block in range(blocks.start, blocks.stop):
                if not self._checked[block]:
                    data = self._tokens[block * BLOCK : (block + 1) * BLOCK]
                    if xxhash.xxh3_64_hexdigest(data.tobytes()) != self.checksums[block]:
                        raise self._damaged(
                            f"{self.folder / self.stem}.tokens does not have its checksum (block {block})"
                        )
                    self._checked[block] = True
        return np.asarray(self._tokens[start:stop])

    def bounds(self) -> Array:
        """Where each document starts and ends, (documents + 1,)."""
        bounds = self._load("bounds")
        if len(bounds) != self.documents + 1 or int(bounds[-1]) != self.tokens_count:
            raise self._damaged(f"{self.folder / self.stem}.bounds.npy does not fit the shard's counts")
        return bounds

    def text_bytes(self) -> Array:
        """Bytes of text of each document; for validation shards."""
        return self._load("text_bytes")

    def _load(self, what: str) -> Array:
        path = self.folder / f"{self.stem}.{what}.npy"
        try:
            if xxhash.xxh3_64_hexdigest(path.read_bytes()) != self.index_checksums[what]:
                raise self._damaged(f"{path} fails its checksum")
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._damaged(f"{path} cannot be read ({error})") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"the prepared shard {self.stem} is damaged: {what}. Remove {self.stem}.* and {MANIFEST} from "
            f"{self.folder} and run the same `python -m data prepare` again: it makes what is missing"
        )


@dataclass(frozen=True)
class PreparedSource:
    """A prepared folder as a source of a run."""

    name: str
    origin: str
    """The source that the tokens were made from."""
    folder: Path
    train: tuple[PreparedShard, ...]
    validation: tuple[PreparedShard, ...]

    @classmethod
    def open(cls, folder: Path) -> "PreparedSource":
        """Read a folder's manifest; UserError when it is not one of ours."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if manifest["format"] != 1:
                raise UserError(f"{folder} is in format {manifest['format']}; this version reads format 1")
            shards = [[read_shard(folder, values) for values in manifest[split]] for split in ("train", "validation")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST} is not a manifest of prepared tokens: {error}") from error
        return cls(str(folder), manifest["source"], folder, tuple(shards[0]), tuple(shards[1]))

    @property
    def fingerprint(self) -> str:
        """A hash of the shards that the order of the data depends on."""
        sums = [f"{shard.name} {' '.join(shard.checksums)}" for shard in (*self.train, *self.validation)]
        return xxhash.xxh3_64_hexdigest("\n".join(sums).encode())

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer that made the tokens."""
        return self.folder / "tokenizer"


def read_shard(folder: Path, values: dict[str, Any]) -> PreparedShard:
    """A shard from its record in the manifest or its own JSON file."""
    return PreparedShard(
        folder,
        values["stem"],
        values["name"],
        values["dtype"],
        values["tokens"],
        values["documents"],
        tuple(values["checksums"]),
        values["index_checksums"],
    )
