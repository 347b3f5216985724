"""What the commands of ``data`` can be told, and the mix of sources that all commands share.

Imports nothing heavy: ``--help`` reads this module.
"""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from jsonargparse.typing import register_type

from common.settings import MAY_CHANGE, Count, option


class Mix:
    """Sources of text with their weights: ``c4``, ``c4:en=0.9,c4:zh=0.1``, ``DIR``, ``DIR1=3,DIR2=1``.

    A word that is an existing path is that path, even when it holds ``,`` or ``=``.
    """

    def __init__(self, typed: tuple[tuple[str, float], ...]) -> None:
        self.typed = typed
        """(source, weight) as they were written."""

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """(source, share) in the order they were written; the shares sum to 1."""
        total = sum(weight for _, weight in self.typed)
        return tuple((name, weight / total) for name, weight in self.typed)

    @classmethod
    def parse(cls, value: Any) -> "Mix":
        """Read a mix; ValueError says what is wrong with it."""
        text = str(value).strip()
        if not text:
            raise ValueError("no source is given; write c4, sample or a folder")
        if os.path.exists(text):
            return cls(((text, 1.0),))
        parts: dict[str, float] = {}
        for word in text.split(","):
            name, _, weight = word.strip().rpartition("=") if "=" in word else (word.strip(), "", "1")
            if not name or not re.fullmatch(r"\d*\.?\d+([eE][+-]?\d+)?", weight) or float(weight) <= 0:
                raise ValueError(f"{word!r} is not a source with a weight; write for example c4:en=0.9,c4:zh=0.1")
            if name in parts:
                raise ValueError(f"the source {name!r} stands twice in {text!r}; add its weights up")
            parts[name] = float(weight)
        return cls(tuple(parts.items()))

    def __str__(self) -> str:
        if len(self.typed) == 1:
            return self.typed[0][0]
        return ",".join(f"{name}={weight!r}" for name, weight in self.typed)

    def __repr__(self) -> str:
        return f"Mix({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mix) and self.typed == other.typed

    def __hash__(self) -> int:
        return hash(self.typed)


register_type(Mix, serializer=str, deserializer=Mix.parse)


@dataclass
class LoaderSettings:
    """How text becomes batches."""

    streams: int = 64
    """Canonical streams the corpus is dealt into: part of the order of the data. A multiple of devices × workers."""
    layout: Literal["packed", "padded"] = "packed"
    """packed: documents end to end. padded: one a row, cut or filled up, as in GaLore's protocol."""
    workers: int | None = option(None, MAY_CHANGE)
    """Processes a device that tokenise ahead of the step; 0: the training process. Default: up to 8, on a CPU 0."""

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"--loader.streams must be at least 1, not {self.streams}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--loader.workers must be at least 0, not {self.workers}")


@dataclass
class TokenizerSettings:
    """Train a byte-level BPE tokenizer."""

    data: Mix = option(Mix.parse("c4"))
    """Sources and weights, such as c4, c4:en=0.9,c4:zh=0.1, sample, or folders in C4's layout."""
    out: str = "tokenizer"
    """Folder to write tokenizer.json and tokenizer_config.json to."""
    vocab: Count = option(Count(32_768))
    """Number of tokens, special tokens included."""
    sample_bytes: Count = option(Count(100_000_000))
    """Bytes of text to train on, taken from all shards in turn."""

    def __post_init__(self) -> None:
        if self.sample_bytes < 1:
            raise ValueError("--sample-bytes must be at least 1")


@dataclass
class PrepareSettings:
    """Write the tokens of a corpus once, for training that a CPU could not tokenise fast enough for."""

    data: Mix = option(Mix.parse("c4"))
    """One source: c4, c4:zh, sample, or a folder in C4's layout."""
    tokenizer: str | None = None
    """A tokenizer's folder, a model folder, or a name on the hub."""
    out: str = "prepared"
    """Folder to write to; running again goes on where a killed run stopped."""
    workers: int | None = None
    """Processes to tokenise with. Default: one per CPU."""
    shards: int | None = None
    """Take only the first so many training shards, for a smaller corpus."""
    skip_bad_shards: bool = False
    """Keep what is readable of a damaged shard and count it, instead of stopping."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"--workers must be at least 0, not {self.workers}")
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"--shards must be at least 1, not {self.shards}")
