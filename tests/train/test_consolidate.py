"""A model folder from a checkpoint, by the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from models.hf import load_model
from tests.forked import forked

WORDS = """--tokens 2560 --batch-tokens 256 --seq-len 32 --device cpu --precision 32 --eval.every 0 --checkpoint.every 4
--schedule.decay 512 --log.tensorboard false --loader.streams 8""".split()


@pytest.fixture(scope="module")
def run(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    done = forked().run("train.py", *WORDS, "--run", folder, "--data", corpus, "--init", micro_model)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_newest_checkpoint_is_the_models_folder_again(run: Path) -> None:
    before = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    done = forked().run("train.py", "consolidate", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"model: {run / 'model'}\n"
    assert (run / "model" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_by_its_path_goes_where_it_is_told(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step-0000004"
    done = forked().run("-m", "train", "consolidate", path, "--out", tmp_path / "model")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "model" / "palmtop.json").read_text())["steps"] == 4
    earlier, last = load_model(tmp_path / "model"), load_model(run / "model")
    assert not torch.equal(earlier.embedding.weight, last.embedding.weight)


def test_wrong_input_is_one_line(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    for shard in (broken / "checkpoints").glob("*/*.distcp"):
        shard.write_bytes(b"")
    for words, says in [
        ((tmp_path / "nothing",), "neither a checkpoint nor a run"),
        ((broken / "checkpoints" / "step-0000004",), "is damaged"),
        ((), "SOURCE is missing"),
    ]:
        done = forked().run("train.py", "consolidate", *words)
        assert done.returncode == 2
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_what_is_no_model_folder_is_not_replaced(run: Path) -> None:
    for out, message in (
        (run, "is there already and holds no palmtop.json"),
        (run / "metrics.jsonl", "metrics.jsonl is a file; give the name of a folder"),
    ):
        done = forked().run("train.py", "consolidate", run, "--out", out)
        assert done.returncode == 2
        assert message in done.stderr
    assert (run / "checkpoints").exists()
    assert (run / "metrics.jsonl").is_file()
