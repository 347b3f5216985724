"""Which model was scored: what changes the answers changes the hash, and nothing else does."""

import json
import shutil
from pathlib import Path

import pytest

from pruning.report import Stage, write_report
from scoring.fingerprint import fingerprint


@pytest.fixture
def folder(micro_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(micro_model, tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_what_decides_answers_counts(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    with open(folder / name, "ab") as file:
        file.write(b" ")
    assert fingerprint(folder) != before


def test_records_of_how_a_model_was_made_do_not_count(folder: Path) -> None:
    """pruning adds a stage's scores to its record once they are made."""
    before = fingerprint(folder)
    (folder / "palmtop.json").write_text(json.dumps({"stage": "prune"}))
    write_report(folder, [Stage.of("after the cut", folder, 64, [])])
    assert (folder / "pruning.json").exists()
    assert fingerprint(folder) == before
