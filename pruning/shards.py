"""Weights written to safetensors files as they come, so that they are never in memory together."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import write_json

SHARD_BYTES = 250_000_000
"""Bytes that are gathered before a file is written: they count towards the memory that pruning takes."""

LARGEST = torch.finfo(torch.float16).max
"""What fp16 holds, in which phones compute."""


class ShardWriter:
    """A model's weights, into an existing folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a weight.

        Raises:
            UserError: it holds values that fp16 cannot.
        """
        largest = max(abs(one.item()) for one in tensor.aminmax())
        if not largest <= LARGEST:
            raise UserError(
                f"the pruned weight {name} holds {largest:g}, beyond the {LARGEST:,.0f} of fp16, in which a phone "
                "computes. Where the model holds it already, it is not fit for one; else give more calibration text "
                "(--tokens), or leave out repair (--repair false)"
            )
        self._pending[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if sum(one.nbytes for one in self._pending.values()) >= SHARD_BYTES:
            self._flush()

    def close(self) -> int:
        """Write what is left, and the index where there are several files; returns the bytes of all weights."""
        if self._pending:
            self._flush()
        count = len(self._files)
        if count == 1:
            self._file(1).rename(self._folder / "model.safetensors")
            return self._bytes
        index: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            file = self._folder / f"model-{number:05d}-of-{count:05d}.safetensors"
            self._file(number).rename(file)
            index |= dict.fromkeys(names, file.name)
        values = {"metadata": {"total_size": self._bytes}, "weight_map": index}
        write_json(self._folder / "model.safetensors.index.json", values)
        return self._bytes

    def _flush(self) -> None:
        self._files.append(list(self._pending))
        save_file(self._pending, self._file(len(self._files)), metadata={"format": "pt"})
        self._pending = {}

    def _file(self, number: int) -> Path:
        """Its name until it is known how many there are."""
        return self._folder / f"part-{number}.safetensors"
