"""Checkpoints: written whole or not at all, checked, kept, found again.

A checkpoint is a folder ``step-0001000`` of

* torch's distributed checkpoint (DCP) of the tensors of model and optimiser, by parameter name: it can
  be read back under another number of processes or another way of sharding;
* ``state.json``: step, whether it is kept for good, tokens, the loader's positions, the run's settings;
* ``config.json``: the model's shape;
* ``checksums.json``: size and xxHash of each of the other files.

It is written under a temporary name, flushed, read back for its checksums and then renamed; each rank writes,
flushes and sums its own files, and rank 0 renames when all are done. Nothing that
reading one back does can execute code: tensors are read with ``weights_only``, and DCP's pickled
``.metadata`` by an unpickler that knows its few classes and nothing else.
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from common.distributed import Job
from common.errors import UserError
from common.files import empty_folder, readable_disk_errors, replace_folder, require_space, sync, write_json
from train.records import read_state

# One process alone is meant. For good, because filters of warnings are the whole process's, not a thread's.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "float64"),
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("torch", "int64"),
    ("pathlib", "PosixPath"),
}
"""All that the ``.metadata`` of tensors names."""


class Checkpoints:
    """The checkpoints of a run.

    Every rank has one and calls :meth:`save` at the same steps. The tensors are copied to host memory, and a
    thread writes the copy while training goes on; the thread has a process group of its own, for its
    collectives must not mix with those of the training.

    Args:
        folder: where they are kept, on a disk that all nodes see.
        keep: how many of the newest stay.
        keep_for_good: whether the checkpoint of a step stays whatever its age. It says so itself: what a later run
            with other settings would keep does not matter to it.
        job: the ranks that save together, with a group that nothing else uses.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_for_good: Callable[[int], bool] = lambda step: False,
        job: Job | None = None,
    ) -> None:
        self.folder, self._keep, self._keep_for_good = folder, keep, keep_for_good
        self._job = job or Job()
        self._host = HostMemory()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        config: dict[str, Any],
        *,
        wait: bool = True,
    ) -> Path:
        """Write the checkpoint of ``step`` and remove those that are no longer kept.

        Args:
            step: optimiser steps taken.
            tensors: from :meth:`train.engine.Engine.tensors_to_save`; each rank gives its share.
            state: plain values for JSON; rank 0's is written.
            config: contents of ``config.json``.
            wait: until it is written; otherwise only until the tensors are copied, and an error comes up
                with the next call of :meth:`save` or :meth:`wait`.

        Raises:
            UserError: the disk is full; older checkpoints are untouched.
        """
        self.wait()
        path = self.folder / f"step-{step:07d}"
        if wait:
            self._write(path, step, tensors, state, config)
        else:
            self._writing = self._writer.submit(self._write, path, step, self._host.copy(tensors), state, config)
        return path

    def wait(self) -> None:
        """Until what is being written is written; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(self) -> None:
        """Let what is being written end, whatever comes of it."""
        self._writer.shutdown()

    def _write(
        self, path: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], config: dict[str, Any]
    ) -> None:
        """Write a checkpoint together with the other ranks; raises on all of them what went wrong on any."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self._write_files(temporary, path, step, tensors, state, config)
        except BaseException:
            if self._job.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write_files(
        self,
        temporary: Path,
        path: Path,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        config: dict[str, Any],
    ) -> None:
        with self._together():
            sizes = self._job.gather(sum(_local_bytes(tensor) for tensor in tensors.values()))
            if self._job.rank == 0:
                empty_folder(temporary)
                require_space(self.folder, sum(sizes) + 2**20, f"the checkpoint of step {step}")
        with self._together() as results, readable_disk_errors(path):
            self._write_tensors(temporary, tensors)
            results.append(_sync_and_sum(temporary, f"__{self._job.rank}_*.distcp"))
        with self._together(), readable_disk_errors(path):
            if self._job.rank == 0:
                write_json(temporary / "state.json", {"step": step, "kept": self._keep_for_good(step), **state})
                write_json(temporary / "config.json", config)
                sums = {name: values for part in results for name, values in part.items()}
                sums |= _sync_and_sum(temporary, ".metadata") | _sync_and_sum(temporary, "*.json")
                write_json(temporary / "checksums.json", sums)
                replace_folder(temporary, path)
                self._remove_old(step)

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Each rank writes its shards; raises the first of the ranks' errors."""
        try:
            # Without copying ahead: that would wait for the GPU's stream, where the training runs, time and again.
            writer = FileSystemWriter(folder, sync_files=False, per_thread_copy_ahead=0)
            dcp_save(tensors, storage_writer=writer, process_group=self._job.group)
        except CheckpointException as error:  # a BaseException around what happened
            raise next(iter(error.failures.values()))[0] from None

    @contextmanager
    def _together(self) -> Iterator[list[dict[str, list[Any]]]]:
        """A block whose error on one rank is raised on all; what ranks append to its list, rank 0 gets from all."""
        results: list[dict[str, list[Any]]] = []
        error: BaseException | None = None
        try:
            yield results
        except BaseException as raised:
            error = raised
            results.clear()
        outcomes = self._job.gather((str(error) if error else "", isinstance(error, UserError), list(results)))
        message, known = self._job.broadcast(next(((m, k) for m, k, _ in outcomes if m), ("", False)))
        if error is not None:
            raise error
        if message:
            raise UserError(message) if known else RuntimeError(f"another rank could not save: {message}")
        results[:] = [result for _, _, gathered in outcomes for result in gathered]

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints beyond ``step``: the run goes back there and will write its own."""
        for later in (number for number in steps_in(self.folder) if number > step):
            path = self.folder / f"step-{later:07d}"
            aside = self.folder / f"superseded-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def _remove_old(self, newest: int) -> None:
        steps = [step for step in steps_in(self.folder) if step <= newest]
        for step in steps[: -self._keep]:
            path = self.folder / f"step-{step:07d}"
            if not kept_for_good(path):
                # Renamed first, so that a kill in the middle leaves no half one under a good name.
                condemned = self.folder / f".{path.name}.removed"
                shutil.rmtree(condemned, ignore_errors=True)
                path.rename(condemned)
                shutil.rmtree(condemned, ignore_errors=True)


class HostMemory:
    """Holds a copy of tensors; its memory is kept from one copy to the next, for pinning it costs more than a copy."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in host memory, DTensors as such; good until the next call."""
        copies = {name: self._take(name, tensor) for name, tensor in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _take(self, name: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            # Not DTensor.from_local: that would move the copy to the mesh's device.
            return DTensor(self._take(name, tensor.to_local()), tensor._spec, requires_grad=False)
        held = self._held.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._held[name] = held
        return held.copy_(tensor, non_blocking=True)


def steps_in(folder: Path) -> list[int]:
    """Steps that have a checkpoint in a folder of checkpoints, in ascending order."""
    names = [path.name for path in folder.glob("step-*")] if folder.exists() else []
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{7,}", name))


def kept_for_good(path: Path) -> bool:
    """Whether a checkpoint stays whatever its age; one that cannot be read does not."""
    try:
        return bool(read_state(path).get("kept", False))
    except UserError:
        return False


def newest_good(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files have their checksums; ``warn`` hears of each that has not."""
    for step in reversed(steps_in(folder)):
        path = folder / f"step-{step:07d}"
        damage = damaged(path)
        if damage is None:
            return path
        warn(f"passing over the checkpoint {path}: {damage}")
    return None


def load(
    path: Path,
    into: Callable[[dict[str, torch.Size]], dict[str, Tensor]],
    *,
    verified: bool = False,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Read a checkpoint's tensors, each rank its shards; returns its state.

    Args:
        path: the checkpoint.
        into: from names and shapes of what is stored to the tensors to read: all that it gives must be
            stored in the shape that it has there.
        verified: the checksums have been compared already.
        group: of all ranks, for talk between hosts; None when this process reads alone.

    Raises:
        UserError: it is no checkpoint, is damaged, or holds a model of another shape.
    """
    state = read_state(path)
    damage = None if verified else damaged(path)
    if damage is not None:
        raise UserError(f"the checkpoint {path} is damaged: {damage}")
    reader = _Reader(path)
    metadata = reader.read_metadata().state_dict_metadata
    stored = {name: tensor.size for name, tensor in metadata.items() if isinstance(tensor, TensorStorageMetadata)}
    tensors = into(stored)
    misfits = [name for name, tensor in tensors.items() if stored.get(name) != tensor.shape]
    if misfits:
        raise UserError(f"the checkpoint {path} is of another model: its {misfits[0]} is {stored.get(misfits[0])}")
    dcp_load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint by the model's names, in host memory, by this process alone."""
    reader = _Reader(path)
    metadata = reader.read_metadata().state_dict_metadata
    weights = {
        name.removeprefix("model."): torch.empty(tensor.size)
        for name, tensor in metadata.items()
        if name.startswith("model.") and isinstance(tensor, TensorStorageMetadata)
    }
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    dcp_load(tensors, storage_reader=reader, no_dist=True)
    return weights


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((path / "checksums.json").read_text(encoding="utf-8"))
        found = _checksums(path)
    except (OSError, ValueError) as error:
        return f"its checksums cannot be read ({error})"
    for name, (size, digest) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != [size, digest]:
            return (
                f"{name} has {found[name][0]:,} bytes of {size:,}" if found[name][0] != size else f"{name} has changed"
            )
    return None


def _checksums(folder: Path, pattern: str = "*") -> dict[str, list[Any]]:
    sums: dict[str, list[Any]] = {}
    for path in sorted(folder.glob(pattern)):
        if path.name == "checksums.json":
            continue
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        sums[path.name] = [path.stat().st_size, digest.hexdigest()]
    return sums


def _sync_and_sum(folder: Path, pattern: str) -> dict[str, list[Any]]:
    """Flush the files of a pattern to the disk, and read them back for their checksums."""
    for path in folder.glob(pattern):
        sync(path)
    return _checksums(folder, pattern)


def _local_bytes(tensor: Tensor) -> int:
    """Bytes of this rank's part of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


class _Reader(FileSystemReader):
    """DCP's reader, but for the pickle of its metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Reads what DCP writes for tensors; refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_CLASSES:
            raise UserError(f"the checkpoint's .metadata names {module}.{name}, which no checkpoint of tensors holds")
        return super().find_class(module, name)
