"""The report in its file and in print."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from models.hf_config import read_values
from pruning.perplexity import Measured
from pruning.plan import candidates
from pruning.report import FILE, Stage, plan_table, rank_table, stage_table, write_report
from pruning.settings import ShapeSettings, Target
from pruning.shapes import Shape


@pytest.fixture
def stages(micro_model: Path) -> list[Stage]:
    texts = [Measured("c4", 3.0, 1000, 4000), Measured("/a/long/path/to/some/other/text", 4.0, 500, 2000)]
    before = Stage.of("before", micro_model, 64, texts)
    smaller = replace(before.shape, ffn=32, vocab=256)
    worse = tuple(replace(one, loss=one.loss + 0.5) for one in texts)
    return [before, replace(before, name="after", shape=smaller, parameters=before.parameters // 2, losses=worse)]


def test_a_stage_is_what_the_folder_holds(stages: list[Stage], micro_model: Path) -> None:
    before = stages[0]
    assert before.shape == Shape(2, 64, 2, 1, before.shape.vocab)
    assert before.phone.weights == 2 * before.parameters
    assert 4 * before.parameters < before.file_bytes < 4 * before.parameters + 10_000  # fp32 and a header
    assert before.file_bytes == (micro_model / "model.safetensors").stat().st_size


def test_the_file_keeps_what_was_there(stages: list[Stage], tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"method": "energy", "stages": []}')
    write_report(tmp_path, stages, {"tried": 3})
    found = json.loads((tmp_path / FILE).read_text())
    assert (found["method"], found["tried"]) == ("energy", 3)
    before, after = found["stages"]
    assert after["losses"][0]["perplexity"] / before["losses"][0]["perplexity"] == pytest.approx(1.6487, abs=1e-4)
    assert before["losses"][0]["bits_per_byte"] == pytest.approx(3 * 1000 / 0.693147 / 4000, abs=1e-4)
    assert before["phone"]["passes_opencl_gate"]
    assert before["shape"]["ffn"] == 64
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match=r"pruning.json cannot be read: .*prune the model again"):
        write_report(tmp_path, stages)


def test_stages_stand_side_by_side(stages: list[Stage]) -> None:
    scored = [replace(stage, scores={"gsm8k": 12.5, "humaneval": None}) for stage in stages]
    table = stage_table(scored)
    words = " ".join(table.split())
    for line in (
        "feed-forward width 64 32",
        "parameters 35,040 17,520 (-50.0%)",
        "perplexity, c4 20.09 33.12 (1.65x)",
        "bits/byte, …path/to/some/other/text 1.4427 1.6230",
        "gsm8k 12.50 12.50",
        "humaneval not run not run",
        "MLC's OpenCL gate passes passes",
        "Perplexities of different vocabularies cannot be compared",
        "reads 50 GB/s",
    ):
        assert line in words, table
    assert "different vocabularies" not in stage_table(stages[:1])


def test_the_plan_and_the_trials_in_print(micro_model: Path) -> None:
    values = read_values(micro_model)
    found = candidates(values, ShapeSettings(params=Target.parse("0.8"), vocab="keep"), None)
    plan = plan_table(values, found, found[:1]).splitlines()
    assert plan[1].startswith("now ")
    assert plan[2].startswith("try 1")
    assert len(plan) == 2 + len(found)
    ranked = rank_table([found[0]] * 2, [1.5, 1.25]).splitlines()
    assert ranked[2].startswith("kept")
    assert ranked[2].endswith("1.2500")
