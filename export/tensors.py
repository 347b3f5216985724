"""The tensors of a model folder in pieces, as NumPy arrays: a matrix may be larger than what memory should hold."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from common.errors import UserError
from models.folder import INDEX, weight_files, weight_index

Array = np.ndarray[Any, Any]

PIECE = 2**21
"""Values that are read at one time."""

STORED: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
"""Safetensors' floating-point types; NumPy has no bf16, whose bits are the upper half of an fp32."""


class Tensors:
    """The safetensors files of a folder.

    Raises:
        UserError: there are none, or one is missing or cut.
    """

    def __init__(self, folder: Path) -> None:
        files = weight_files(folder)
        order = {name: file for name, file in weight_index(folder).items() if file in files}
        found: dict[str, tuple[Path, dict[str, Any], int]] = {}
        for file in files:
            found |= self._read_header(file)
        missing = sorted(set(order) - set(found))
        if missing:
            raise UserError(f"{folder / INDEX} names the tensor {missing[0]!r}, which no file of the folder holds")
        if order:  # MLC-LLM goes through the files one by one, and through each in the order of the index
            names = [name for file in files for name in order if order[name] == file]
            found = {name: found[name] for name in names}
        self._entries = found

    @property
    def names(self) -> list[str]:
        """Of all tensors, in the order in which MLC-LLM takes them."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._entries[name][1]["shape"])

    def stored(self, name: str) -> str:
        """What a tensor is stored in, by safetensors' names: F32, BF16, …"""
        return str(self._entries[name][1]["dtype"])

    def pieces(self, name: str) -> Iterator[Array]:
        """A tensor's values one after the other, at most :data:`PIECE` at a time; those of bf16 as fp32."""
        file, entry, start = self._entries[name]
        dtype, left = STORED[entry["dtype"]], math.prod(entry["shape"])
        with open(file, "rb") as stream:
            stream.seek(start + entry["data_offsets"][0])
            while left > 0:
                piece = np.fromfile(stream, dtype, min(left, PIECE))
                left -= len(piece)
                yield (piece.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else piece

    def _read_header(self, file: Path) -> dict[str, tuple[Path, dict[str, Any], int]]:
        """Where each tensor lies in a file, in the order in which they lie there."""
        try:
            with safe_open(file, framework="np"):
                pass  # it checks that the header is sound and that the file is whole
            with open(file, "rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
        except Exception as error:  # safetensors raises its own type, which it does not export stably
            raise UserError(f"{file} is damaged: {error}") from error
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        return {name: (file, entry, 8 + length) for name, entry in entries}
