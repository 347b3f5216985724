"""Weights for MLC-LLM: ``params_shard_*.bin`` and the two caches that say what lies where, in fp16.

Equal byte by byte to what MLC-LLM's ``convert_weight --quantization q0f16`` writes. The values go through memory in
pieces, so that what is in memory is a few megabytes, whatever the model has.

The rules, found in MLC-LLM's output and in TVM's ``tvmjs``: parameters come in the order of their first tensor in the
safetensors files; a shard is closed before it would reach 32 MiB, except that a parameter of at least half of that gets
one of its own at once. ``format`` is ``f32-to-bf16`` for fp16 too, where it means nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import write_text
from export.mapping import Parameter, parameters
from export.tensors import Array, Tensors
from models.hf_config import taken_values

SHARD = 32 * 2**20
"""Bytes that a shard of several parameters stays below."""

CACHE, OLD_CACHE = "tensor-cache.json", "ndarray-cache.json"
"""Today's name of the cache, and the one that MLC-LLM read before September 2025."""

LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Written:
    """What :func:`write_weights` wrote."""

    parameters: int
    """Values; a tied head is the embedding, and counts once."""
    bytes: int
    """Of all shards."""
    shards: int


def write_weights(folder: Path, out: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Written:
    """Write the weights of a model folder into the existing folder ``out``.

    Args:
        folder: the model folder.
        out: gets the shards and both caches.
        progress: told the bytes that are written, and all.

    Raises:
        UserError: the architecture is none of the four; a tensor is missing; a value is beyond fp16.
    """
    tensors = Tensors(folder)
    ordered = in_order(parameters(taken_values(folder)), tensors, folder)
    total = sum(2 * parameter.size for parameter in ordered)
    writer, done = _Writer(out), 0
    for parameter in ordered:
        writer.add(parameter, _halves(parameter, tensors, folder))
        done += 2 * parameter.size
        progress(done, total)
    records = writer.close()
    metadata = {"ParamSize": len(ordered), "ParamBytes": float(total), "BitsPerParam": 16.0}
    text = json.dumps({"metadata": metadata, "records": records}, indent=4)
    for name in (CACHE, OLD_CACHE):
        write_text(out / name, text)
    return Written(total // 2, total, len(records))


def read_cache(mlc: Path) -> dict[str, Any]:
    """The ``tensor-cache.json`` of an MLC folder; UserError where there is none."""
    try:
        return dict(json.loads((mlc / CACHE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{mlc / CACHE} cannot be read: {error}; export the model again") from error


def in_order(found: list[Parameter], tensors: Tensors, folder: Path) -> list[Parameter]:
    """The parameters by the first of their tensors in the files; UserError where one is missing."""
    place = {name: number for number, name in enumerate(tensors.names)}
    missing = [source.name for parameter in found for source in parameter.sources if source.name not in place]
    if missing:
        raise UserError(f"the weights of {folder} lack {len(missing)} tensors, such as {missing[0]!r}")
    return sorted(found, key=lambda parameter: min(place[source.name] for source in parameter.sources))


def _halves(parameter: Parameter, tensors: Tensors, folder: Path) -> Iterator[Array]:
    """A parameter's values in fp16, piece by piece."""
    for source in parameter.sources:
        for piece in tensors.pieces(source.name):
            with np.errstate(over="ignore"):
                half = piece.astype("<f2")
            if not np.isfinite(half).all():
                worst = piece[np.argmax(~np.isfinite(half))]
                raise UserError(
                    f"{source.name} of {folder} holds {worst:g}, beyond the {LARGEST:,.0f} of fp16, in which phones "
                    "compute: the model is not fit for one"
                )
            yield half


@dataclass
class _Shard:
    """A file that parameters are appended to."""

    path: Path
    """Its name until its number is known."""
    bytes: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._digest = hashlib.md5(usedforsecurity=False)

    def append(self, parameter: Parameter, halves: Iterator[Array]) -> None:
        """Write a parameter."""
        self.records.append(
            {
                "name": parameter.name,
                "shape": list(parameter.shape),
                "dtype": "float16",
                "format": "f32-to-bf16",
                "nbytes": 2 * parameter.size,
                "byteOffset": self.bytes,
            }
        )
        with open(self.path, "ab") as file:
            for half in halves:
                file.write(half.data)
                self._digest.update(half.data)
                self.bytes += half.nbytes

    def finish(self, path: Path) -> dict[str, Any]:
        """Give the file its name; returns its record in the cache."""
        self.path.rename(path)
        found = {"dataPath": path.name, "format": "raw-shard", "nbytes": self.bytes, "records": self.records}
        return found | {"md5sum": self._digest.hexdigest()}


class _Writer:
    """Shards in a folder, numbered in the order in which they are finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._finished: list[dict[str, Any]] = []
        self._open: _Shard | None = None

    def add(self, parameter: Parameter, halves: Iterator[Array]) -> None:
        """Write a parameter into the open shard, or into one of its own."""
        bytes_, used = 2 * parameter.size, 0 if self._open is None else self._open.bytes
        if used + bytes_ >= SHARD:
            if 2 * bytes_ >= SHARD:
                alone = _Shard(self._folder / "alone.part")
                alone.append(parameter, halves)
                self._finish(alone)
                return
            self.close()
        self._open = self._open or _Shard(self._folder / "open.part")
        self._open.append(parameter, halves)

    def close(self) -> list[dict[str, Any]]:
        """Finish the open shard; returns the records of all."""
        if self._open is not None:
            self._finish(self._open)
            self._open = None
        return self._finished

    def _finish(self, shard: _Shard) -> None:
        self._finished.append(shard.finish(self._folder / f"params_shard_{len(self._finished)}.bin"))
