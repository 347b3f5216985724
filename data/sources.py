"""Where text comes from: C4 on the hub, a folder in C4's layout, prepared tokens, the offline sample.

A source is a list of shards for training and one for validation. A text shard is a file of one JSON
record a line with a ``text`` field, gzipped or not: ``c4-train.00000-of-01024.json.gz``.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import xxhash

from common.errors import UserError
from common.files import readable_disk_errors
from data.prepared import BEGUN, MANIFEST, PreparedSource
from data.settings import Mix

_SURROGATE = re.compile("[\ud800-\udfff]")

HELD_OUT = 200
"""One document in so many is kept for validation where a corpus has no validation shards (0.5%)."""


class Shard(Protocol):
    """A file of text, on the disk or on the hub."""

    @property
    def name(self) -> str:
        """What messages and the order of shards call it."""

    @property
    def size(self) -> int:
        """Bytes, compressed."""

    @property
    def where(self) -> str:
        """The file on this machine, for messages."""

    @property
    def identity(self) -> str:
        """What tells it from another version of the same shard."""

    def open(self) -> BinaryIO:
        """Its bytes from the start, still compressed."""


@dataclass(frozen=True)
class LocalShard:
    """A shard on the disk."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        """Bytes, compressed."""
        return self.path.stat().st_size

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def identity(self) -> str:
        """Its name and size."""
        return f"{self.name} {self.size}"

    def open(self) -> BinaryIO:
        """Its bytes from the start, still compressed."""
        return open(self.path, "rb")


@dataclass(frozen=True)
class TextSource:
    """Shards of text under the name that the user gave them."""

    name: str
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]

    @property
    def origin(self) -> str:
        """Where the text is from, for the record of a model's data."""
        return self.name

    @property
    def fingerprint(self) -> str:
        """A hash of the shards that the order of the data depends on."""
        identities = [shard.identity for shard in (*self.train, *self.validation)]
        return xxhash.xxh3_64_hexdigest("\n".join(identities).encode())

    @property
    def holds_out(self) -> bool:
        """Whether validation documents are picked from the training shards, for want of their own."""
        return not self.validation


class DamagedShardError(Exception):
    """A shard cannot be decompressed further."""


def held_out(text: str) -> bool:
    """Whether a document of a corpus without validation shards is left out of training.

    Decided by a hash of the text, so that copies of a document fall on one side.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % HELD_OUT == 0


def lines(shard: Shard) -> Iterator[bytes]:
    """The lines of a shard, decompressed.

    Raises:
        DamagedShardError: the compressed data ends early or is corrupt; what came before is good.
    """
    with readable_disk_errors(Path(shard.where)), shard.open() as raw:
        stream = gzip.GzipFile(fileobj=raw) if shard.name.endswith(".gz") else raw
        try:
            yield from stream
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = f"the shard {shard.name} is damaged: {error} (in {shard.where}"
            raise DamagedShardError(f"{problem}; delete or replace that file)") from error


def text_of(line: bytes, shard: Shard, number: int) -> str:
    """The text of one record, "" for a blank line; UserError names shard and line (from 1) when there is none."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
        text = record["text"]
    except (ValueError, TypeError) as error:
        raise UserError(f"line {number} of {shard.name} is no JSON record: {error}") from error
    except KeyError as error:
        fields = ", ".join(record) or "none"
        raise UserError(f"line {number} of {shard.name} has no field 'text'; its fields are: {fields}") from error
    if not isinstance(text, str):
        raise UserError(f"line {number} of {shard.name} has a 'text' that is no string but {type(text).__name__}")
    return _SURROGATE.sub("\ufffd", text)  # half of a pair has no UTF-8


def is_c4(origin: str) -> bool:
    """Whether text of this origin is C4, the only text that the competition's pruning track allows.

    Of a folder nobody can tell.
    """
    return origin == "c4" or origin.startswith("c4:")


def open_source(name: str) -> TextSource | PreparedSource:
    """Find a source by the name that the user gave; UserError when there is nothing of that name."""
    if name == "sample":
        from data.sample import sample_folder

        return _folder_source(name, sample_folder())
    if name == "c4" or name.startswith("c4:"):
        return _hub_source(name, "allenai/c4", name.partition(":")[2] or "en")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / MANIFEST).exists():
            return PreparedSource.open(folder)
        if (folder / BEGUN).exists():
            raise UserError(f"{folder} is not finished; run the same `python -m data prepare` again")
        return _folder_source(name, folder)
    if folder.exists():
        raise UserError(f"{name} is a file; give the folder that holds the shards")
    raise UserError(
        f"there is no source {name!r}: it is neither a folder here nor one of c4, c4:LANGUAGE (such as c4:zh), sample"
    )


def _hub_source(name: str, repository: str, config: str) -> TextSource:
    from data.hub import resolve

    splits = resolve(repository, config)
    return TextSource(name, tuple(splits.get("train", ())), tuple(splits.get("validation", ())))


def _folder_source(name: str, folder: Path) -> TextSource:
    """The shards of a folder, or of its only sub-folder that has any (as C4 keeps ``en/``)."""
    found = _shards_in(folder)
    if not found:
        inner = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and _shards_in(sub)]
        if len(inner) > 1:
            choices = ", ".join(str(sub) for sub in inner)
            raise UserError(f"{folder} holds several corpora; name one, or a mix of them: {choices}")
        if not inner:
            raise UserError(
                f"{folder} holds no shards: files such as c4-train.00000-of-01024.json.gz or *.jsonl, one JSON "
                "record with a 'text' a line"
            )
        folder, found = inner[0], _shards_in(inner[0])
    validation = [path for path in found if "validation" in path.name]
    train = [path for path in found if "train" in path.name] or [path for path in found if path not in validation]
    if not train:
        raise UserError(f"{folder} holds validation shards but none to train on")
    shards = [tuple(LocalShard(path, path.name) for path in paths) for paths in (train, validation)]
    return TextSource(name, shards[0], shards[1])


def _shards_in(folder: Path) -> list[Path]:
    endings = (".json.gz", ".jsonl.gz", ".jsonl", ".json")
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(endings))


@dataclass(frozen=True)
class Corpus:
    """The sources of a run and the share of the streams that each gets."""

    sources: tuple[TextSource | PreparedSource, ...]
    weights: tuple[float, ...]

    @classmethod
    def open(cls, mix: Mix) -> "Corpus":
        """Open every source of a mix."""
        corpus = cls(tuple(open_source(name) for name, _ in mix.parts), tuple(weight for _, weight in mix.parts))
        kinds = {type(source) for source in corpus.sources}
        if len(kinds) > 1:
            raise UserError(f"{mix} mixes prepared folders with text; prepare all of them, or none")
        return corpus
