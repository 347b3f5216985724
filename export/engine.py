"""Run an exported model on this machine: its host library and the weights of its MLC folder."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Bound to cores, TVM's threads would keep torch's from them (60 tokens/s fall to 10 where both share a process).
os.environ.setdefault("TVM_BIND_THREADS", "0")

import tvm
from tvm import relax

from common.errors import UserError
from export.shards import read_cache

Array = np.ndarray[Any, Any]

ALIGNMENT = 64
"""Bytes that TVM's tensors begin at multiples of."""

SEQUENCE = 0
"""The name of the one sequence in the cache."""


class Engine:
    """A model that reads and writes tokens, one sequence at a time.

    Args:
        library: of the host, as :func:`export.library.build` makes it.
        mlc: folder with the weights.

    Raises:
        UserError: the library and the weights do not belong together, or the library is for another machine.
    """

    def __init__(self, library: Path, mlc: Path) -> None:
        try:
            self._machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
        except Exception as error:  # TVM raises its own types, all of them without a common base
            raise UserError(f"{library} cannot be loaded here: {error}") from error
        self.metadata: dict[str, Any] = json.loads(self._machine["palmtop_metadata"]())
        self.context: int = self.metadata["context"]
        self.vocab: int = self.metadata["vocab"]
        self.chunk: int = self.metadata["prefill_chunk"]
        self._weights = [tvm.runtime.from_dlpack(one) for one in _weights(mlc, self.metadata["params"])]
        self._state = {
            name: tvm.get_global_func(f"vm.builtin.kv_state_{name}")
            for name in ("add_sequence", "begin_forward", "end_forward", "clear")
        }
        self._cache = self._machine["create_kv_cache"](tvm.runtime.ShapeTuple([self.context]))
        self.length = 0
        """Tokens in the cache."""
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._state["clear"](self._cache)
        self._state["add_sequence"](self._cache, SEQUENCE)
        self.length = 0

    def prefill(self, ids: Sequence[int]) -> Array:
        """Read tokens; returns the logits after the last (V)."""
        *before, last = self._chunks(ids)
        for chunk in before:
            self._run("prefill", chunk)
        return self._run("prefill", last)[0]

    def decode(self, token: int) -> Array:
        """Read one token; returns the logits after it (V)."""
        return self._run("decode", [token])[0]

    def all_logits(self, ids: Sequence[int]) -> Array:
        """Read tokens; returns the logits after each (T, V)."""
        return np.concatenate([self._run("all_logits", chunk) for chunk in self._chunks(ids)])

    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        """Forget all tokens, read a prompt, and return the ``count`` most likely ones after it, one after the other."""
        self.reset()
        logits, found = self.prefill(ids), list[int]()
        while len(found) < count:
            found.append(int(logits.argmax()))
            if len(found) < count:
                logits = self.decode(found[-1])
        return found

    def _chunks(self, ids: Sequence[int]) -> list[Sequence[int]]:
        if not ids:
            raise ValueError("there is no token to read")
        return [ids[first : first + self.chunk] for first in range(0, len(ids), self.chunk)]

    def _run(self, function: str, ids: Sequence[int]) -> Array:
        if self.length + len(ids) > self.context:
            raise UserError(
                f"{self.length + len(ids):,} tokens do not fit into the library's context of {self.context:,}; "
                "export with a larger --context"
            )
        tokens = tvm.runtime.tensor(np.array([ids], dtype=np.int32))
        self._state["begin_forward"](
            self._cache, tvm.runtime.ShapeTuple([SEQUENCE]), tvm.runtime.ShapeTuple([len(ids)])
        )
        logits = self._machine[function](tokens, self._cache, self._weights)
        self._state["end_forward"](self._cache)
        self.length += len(ids)
        return logits.numpy()


def _weights(mlc: Path, params: list[dict[str, Any]]) -> Iterator[Array]:
    """The weights in the order in which a library takes them.

    They lie in one array: NumPy asks for large pages for one of megabytes, and matrices of a few megabytes each would
    be read from small ones, more slowly.
    """
    found = {
        record["name"]: (mlc / shard["dataPath"], record)
        for shard in read_cache(mlc)["records"]
        for record in shard["records"]
    }
    sizes = [np.dtype(one["dtype"]).itemsize * math.prod(one["shape"]) for one in params]
    ends = np.cumsum([ALIGNMENT, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
    memory = np.empty(int(ends[-1]), np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    for one, end, size in zip(params, ends, sizes, strict=False):
        file, record = found.get(one["name"], (None, None))
        if file is None or record is None or record["shape"] != one["shape"]:
            raise UserError(f"{mlc} and the library do not belong together: {one['name']}; export the model again")
        start = first + int(end) - ALIGNMENT
        weight = memory[start : start + size].view(one["dtype"]).reshape(one["shape"])
        stored = np.fromfile(file, np.float16, weight.size, offset=record["byteOffset"])
        weight[...] = stored.reshape(weight.shape)
        yield weight
