"""What is told of a model folder before anything of it is read, the same by every command."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from common.errors import UserError
from models.folder import INDEX, check_model, check_out, stage_of, weight_files
from models.hf import WeightFiles

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def folder(micro_model: Path, tmp_path: Path) -> Path:
    """A model folder of its own to spoil."""
    return Path(shutil.copytree(micro_model, tmp_path / "model"))


def in_shards(folder: Path) -> None:
    """Leave an index of two files, and both files."""
    with safe_open(folder / "model.safetensors", framework="np") as tensors:
        names = list(tensors.keys())
    index = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    shutil.copy(folder / "model.safetensors", folder / SHARDS[0])
    (folder / "model.safetensors").rename(folder / SHARDS[1])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / SHARDS[1]).unlink()


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "there is no model folder {}"),
        (as_file, "{} is a file; give a model folder"),
        (lambda folder: (folder / "config.json").unlink(), "{} is no model folder: it has no config.json (a run's mod"),
        (lambda folder: (folder / "model.safetensors").unlink(), "{} has no weights: model.safetensors is missing"),
        (pickled, "{} has its weights only as pickle (pytorch_model.bin), which can run code when it is read"),
        (without_a_shard, f"{{}} has no {SHARDS[1]}, which its {INDEX} names; copy it there"),
    ],
)
def test_what_is_no_model_folder_is_told(folder: Path, spoil, message: str) -> None:
    check_model(folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        check_model(folder)
    assert str(error.value).startswith(message.format(folder))


def test_weights_are_read_from_the_files_that_transformers_takes(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    in_shards(folder)
    assert [file.name for file in weight_files(folder)] == SHARDS
    (folder / SHARDS[0]).unlink()
    with pytest.raises(UserError, match=SHARDS[0]):
        WeightFiles(folder)
    (folder / "model.safetensors").write_bytes(whole)  # the index is of an earlier save
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]


def test_nothing_but_a_command_s_own_is_replaced(folder: Path) -> None:
    for out in (folder, folder.parent):
        with pytest.raises(UserError, match=f"--out {out} is the model's own folder; choose another"):
            check_out(out, folder, own=True)
    other = folder.with_name("other")
    check_out(other, folder, own=False)
    other.mkdir()
    check_out(other, folder, own=True)
    with pytest.raises(UserError, match="is there already and was not made by this command; choose another --out"):
        check_out(other, folder, own=False)
    assert stage_of(other) is None
    (other / "palmtop.json").write_text('{"stage": "prune"}')
    assert stage_of(other) == "prune"
