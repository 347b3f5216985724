import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import UserError
from train import checkpoint
from train.checkpoint import Checkpoints, damaged, load, training_tensors


def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model and an AdamW that has made a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(checkpoints: Checkpoints, step: int, seed: int = 0) -> Path:
    model, optimizer = make(seed)
    return checkpoints.save(step, training_tensors(model, optimizer), {"tokens": step * 10}, {"hidden_size": 8})


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=2), 7)
    model, optimizer = make(0)
    other, empty = make(1)
    empty = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    assert load(path, other, empty) == {"step": 7, "tokens": 70}
    before, after = training_tensors(model, optimizer), training_tensors(other, empty)
    assert before.keys() == after.keys()
    assert len([name for name in before if name.startswith("optimizer.")]) == 3 * 6
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [value.dtype for value in before.values()] == [value.dtype for value in after.values()]


def test_the_newest_stay_and_some_for_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, keep_for_good=lambda step: step % 4 == 0)
    for step in range(1, 11):
        save(checkpoints, step)
    assert checkpoints.steps() == [4, 8, 9, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:07d}" for step in (4, 8, 9, 10)]


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
    assert checkpoints.newest_good(warnings.append) == tmp_path / "step-0000001"
    assert len(warnings) == 1
    assert str(newest) in warnings[0]
    with pytest.raises(UserError, match=r"damaged|no checkpoint"):
        load(newest, *make(0))


@pytest.mark.parametrize("stage", ["state.json", "dcp", "checksums.json", "rename"])
def test_a_save_that_dies_leaves_nothing_under_a_good_name(tmp_path: Path, stage: str, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    real_json = checkpoint.write_json
    if stage == "dcp":
        monkeypatch.setattr(checkpoint, "dcp_save", killed)
    elif stage == "rename":
        real_rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda p, t: killed() if Path(t).name == "step-0000002" else real_rename(p, t)
        )
    else:
        monkeypatch.setattr(checkpoint, "write_json", lambda p, v: killed() if p.name == stage else real_json(p, v))
    with pytest.raises(Killed):
        save(checkpoints, 2)
    monkeypatch.undo()
    assert checkpoints.steps() == [1]
    assert damaged(tmp_path / "step-0000001") is None
    save(checkpoints, 2)
    assert checkpoints.steps() == [2]


def test_going_back_sets_later_ones_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.set_aside_after(1)
    assert checkpoints.steps() == [1]
    assert damaged(tmp_path / "superseded-step-0000003") is None


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=1), 1)
    with pytest.raises(UserError, match=r"of another model: its model.0.weight is torch.Size\(\[8, 4\]\)"):
        load(path, nn.Sequential(nn.Linear(4, 9)), None)


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/palmtop-exploited"),))


def test_reading_executes_nothing(tmp_path: Path) -> None:
    path = save(Checkpoints(tmp_path, keep=1), 1)
    (path / ".metadata").write_bytes(pickle.dumps(Exploit()))
    (path / "checksums.json").write_text(json.dumps(checkpoint._checksums(path)))
    with pytest.raises(UserError, match=r"\.metadata names"):
        load(path, *make(0))
    assert not Path("/tmp/palmtop-exploited").exists()


def test_a_full_disk_is_said_and_older_checkpoints_stay(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="no room on the disk"):
        save(checkpoints, 2)
    assert checkpoints.steps() == [1]
