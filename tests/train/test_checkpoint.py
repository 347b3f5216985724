import errno
import json
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from common.distributed import Job
from common.errors import UserError
from common.files import sweep
from train import checkpoint
from train.checkpoint import Checkpoints, damaged, load, newest_good, steps_in
from train.engine import Engine
from train.fabric import Fabric


def make(seed: int) -> Engine:
    """A small model and an AdamW that has made a step."""

    def value(name: str, shape: torch.Size) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(name)))

    engine = Engine(
        Fabric(accelerator="cpu", devices=1),
        Job(),
        build=lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        values=value,
        make_optimizers=lambda model: [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)],
        spike=6.0,
    )
    nll = engine.model(torch.ones(5, 4)).square().sum()
    engine.backward(nll)
    engine.update(0.1, 1.0, nll)
    return engine


def save(checkpoints: Checkpoints, step: int, seed: int = 0) -> Path:
    return checkpoints.save(step, make(seed).tensors(), {"tokens": step * 10}, {"hidden_size": 8})


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=2), 7)
    engine, other = make(0), make(1)
    assert load(path, other.tensors_to_load) == {"step": 7, "kept": False, "tokens": 70}
    before, after = engine.tensors(), other.tensors()
    assert before.keys() == after.keys()
    assert len([name for name in before if name.startswith("optimizer.")]) == 3 * 6
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [value.dtype for value in before.values()] == [value.dtype for value in after.values()]


def test_training_may_go_on_while_a_copy_is_written(tmp_path: Path) -> None:
    checkpoints, engine = Checkpoints(tmp_path, keep=2), make(0)
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    path = checkpoints.save(1, engine.tensors(), {}, {}, wait=False)
    with torch.no_grad():
        for tensor in engine.tensors().values():
            tensor.zero_()
    checkpoints.wait()
    load(path, engine.tensors_to_load)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors().items())


def test_the_newest_stay_and_some_for_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_for_good=lambda step: step % 4 == 0)
    for step in range(1, 11):
        save(checkpoints, step)
    assert steps_in(checkpoints.folder) == [4, 8, 9, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:07d}" for step in (4, 8, 9, 10)]


def test_what_was_kept_for_good_stays_whatever_a_later_run_would_keep(tmp_path: Path) -> None:
    save(Checkpoints(tmp_path, keep=1, keep_for_good=lambda step: step == 1), 1)
    later = Checkpoints(tmp_path, keep=1)
    for step in (2, 3):
        save(later, step)
    assert steps_in(tmp_path) == [1, 3]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "no state", "no checksums"])
def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)
    newest = save(checkpoints, 2)
    tensors = next(newest.glob("*.distcp"))
    data = bytearray(tensors.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(data[:-1])
    else:
        {"gone": tensors, "no state": newest / "state.json", "no checksums": newest / "checksums.json"}[damage].unlink()
    warnings: list[str] = []
    assert newest_good(checkpoints.folder, warnings.append) == tmp_path / "step-0000001"
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    with pytest.raises(UserError, match=r"damaged|no checkpoint"):
        load(newest, make(0).tensors_to_load)


def test_going_back_sets_later_ones_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.set_aside_after(1)
    assert steps_in(checkpoints.folder) == [1]
    assert damaged(tmp_path / "superseded-step-0000003") is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=1), 1)
    with pytest.raises(UserError, match=r"of another model: its model.0.weight is torch.Size\(\[8, 4\]\)"):
        load(path, lambda stored: {"model.0.weight": torch.zeros(9, 4)})


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/palmtop-exploited"),))


def test_reading_executes_nothing(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=1), 1)
    (path / ".metadata").write_bytes(pickle.dumps(Exploit()))
    (path / "checksums.json").write_text(json.dumps(checkpoint._checksums(path)))
    with pytest.raises(UserError, match=r"\.metadata names"):
        load(path, make(0).tensors_to_load)
    assert not Path("/tmp/palmtop-exploited").exists()


def test_a_full_disk_is_said_and_older_checkpoints_stay(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="no room on the disk"):
        save(checkpoints, 2)
    assert steps_in(checkpoints.folder) == [1]


def test_a_disk_that_fills_while_writing_is_said(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.FileSystemWriter, "write_data", full)
    with pytest.raises(UserError, match="the disk is full while writing"):
        save(checkpoints, 2)
    assert steps_in(checkpoints.folder) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]


OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
"""Audit events of what touches the file system."""


def killed_at(operation: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a fork that gets SIGKILL before its so-manieth file operation; whether it came to that."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if event in OPERATIONS:
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_at_every_file_operation_of_a_save_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    engine = make(0)
    tensors = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    kills = 0
    for over in (False, True):  # a new step, and one whose checkpoint is there already
        operation = 1
        while True:
            folder = tmp_path / f"{over}-{operation}"
            checkpoints = Checkpoints(folder, keep=1)
            save(checkpoints, 1)

            def again(folder: Path = folder, over: bool = over) -> None:
                Checkpoints(folder, keep=1).save(1 if over else 2, tensors, {"tokens": 5}, {})

            if not killed_at(operation, again):
                break
            kills += 1
            sweep(folder)
            good = newest_good(checkpoints.folder, pytest.fail)  # none is damaged, whatever the moment
            assert good is not None
            load(good, engine.tensors_to_load)
            save(checkpoints, 3)
            assert steps_in(checkpoints.folder) == [3]
            assert [path.name for path in folder.iterdir()] == ["step-0000003"]
            operation += 1
    assert kills >= 50
