"""Checkpoints: written whole or not at all, checked, kept, found again.

A checkpoint is a folder ``step-0001000`` of

* torch's distributed checkpoint (DCP) of the tensors of model and optimiser, by parameter name: it can
  be read back under another number of processes or another way of sharding;
* ``state.json``: step, tokens, the loader's positions, the run's settings;
* ``config.json``: the model's shape;
* ``checksums.json``: size and xxHash of each of the other files.

It is written under a temporary name, read back for its checksums, flushed and then renamed. Nothing that
reading one back does can execute code: tensors are read with ``weights_only``, and DCP's pickled
``.metadata`` by an unpickler that knows its few classes and nothing else.
"""

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from common.errors import UserError
from common.files import new_folder, require_space, write_json

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
    ("torch", "bfloat16"),
    ("torch", "float16"),
    ("torch", "int64"),
    ("pathlib", "PosixPath"),
}
"""All that the ``.metadata`` of tensors names."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they are kept.
        keep: how many of the newest stay.
        keep_for_good: whether the checkpoint of a step stays whatever its age.
    """

    def __init__(self, folder: Path, keep: int, keep_for_good: Callable[[int], bool] = lambda step: False) -> None:
        self.folder, self._keep, self._keep_for_good = folder, keep, keep_for_good

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], config: dict[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and remove those that are no longer kept.

        Args:
            step: optimiser steps taken.
            tensors: from :func:`training_tensors`.
            state: plain values for JSON.
            config: contents of ``config.json``.

        Raises:
            UserError: the disk is full; older checkpoints are untouched.
        """
        path = self.folder / f"step-{step:07d}"
        size = sum(tensor.nbytes for tensor in tensors.values())
        require_space(self.folder, size + 2**20, f"the checkpoint of step {step}")
        with new_folder(path) as temporary:
            write_json(temporary / "state.json", {"step": step, **state})
            write_json(temporary / "config.json", config)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp_save(tensors, storage_writer=FileSystemWriter(temporary, sync_files=False))
            write_json(temporary / "checksums.json", _checksums(temporary))
        self._remove_old(step)
        return path

    def newest_good(self, warn: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose files have their checksums; ``warn`` hears of each that has not."""
        for step in sorted(self.steps(), reverse=True):
            path = self.folder / f"step-{step:07d}"
            damage = damaged(path)
            if damage is None:
                return path
            warn(f"passing over the checkpoint {path}: {damage}")
        return None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in ascending order."""
        names = [path.name for path in self.folder.glob("step-*")] if self.folder.exists() else []
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{7,}", name))

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints beyond ``step``: the run goes back there and will write its own."""
        for later in (number for number in self.steps() if number > step):
            path = self.folder / f"step-{later:07d}"
            aside = self.folder / f"superseded-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def _remove_old(self, newest: int) -> None:
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[: -self._keep]:
            if not self._keep_for_good(step):
                # Renamed first, so that a kill in the middle leaves no half one under a good name.
                condemned = self.folder / f".step-{step:07d}.removed"
                shutil.rmtree(condemned, ignore_errors=True)
                (self.folder / f"step-{step:07d}").rename(condemned)
                shutil.rmtree(condemned, ignore_errors=True)


def training_tensors(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Every tensor that training depends on, by name: ``model.NAME`` and ``optimizer.NAME.KEY``."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def load(path: Path, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    """Read a checkpoint into ``model`` and, where given, ``optimizer``; returns its state.

    Raises:
        UserError: it is no checkpoint, is damaged, or holds a model of another shape.
    """
    state = read_state(path)
    damage = damaged(path)
    if damage is not None:
        raise UserError(f"the checkpoint {path} is damaged: {damage}")
    reader = _Reader(path)
    stored = reader.read_metadata().state_dict_metadata
    tensors = training_tensors(model, None)
    misfits = [name for name, tensor in tensors.items() if _shape(stored.get(name)) != tensor.shape]
    if misfits:
        found = _shape(stored.get(misfits[0]))
        raise UserError(f"the checkpoint {path} is of another model: its {misfits[0]} is {found}")
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            prefix = f"optimizer.{name}."
            for full in (known for known in stored if known.startswith(prefix)):
                shape = _shape(stored[full])
                # On the parameter's device, where fused AdamW keeps its step count too.
                value = torch.zeros(shape or (), dtype=torch.float32, device=parameter.device)
                optimizer.state[parameter][full.removeprefix(prefix)] = value
        tensors = training_tensors(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(tensors, storage_reader=reader)
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint; UserError when ``path`` is none."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint: its state.json cannot be read ({error})") from error


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


def _checksums(folder: Path) -> dict[str, list[Any]]:
    sums: dict[str, list[Any]] = {}
    for path in sorted(folder.iterdir()):
        if path.name == "checksums.json":
            continue
        digest = xxhash.xxh3_128()
        with open(path, "rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        sums[path.name] = [path.stat().st_size, digest.hexdigest()]
    return sums


def _shape(stored: Any) -> torch.Size | None:
    return stored.size if isinstance(stored, TensorStorageMetadata) else None


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
