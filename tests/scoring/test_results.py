import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoring.results import COLUMNS, Score, TaskResult, interval, means

SIX = ("commonsense_qa", "bbh", "gsm8k", "humaneval", "chid", "truthfulqa")


def result(name: str, score: float | None) -> TaskResult:
    return TaskResult(name, score, None if score is None else (score - 1, score + 1), 20.0, 8)


def full_score() -> Score:
    found = Score(
        "m", [], {}, [result(name, score) for name, score in zip(SIX, (72.9, 67.9, 84.4, 68.3, 69.4, 28), strict=True)]
    )
    found.speed = {
        "throughput": 3.25,
        "peak_memory": 5.5e9,
        "peak_memory_of": "what torch allocated",
        "forward_tokens": 2000,
        "device": "a GPU",
        "dtype": "float16",
        "prefill": {"median": 900.0, "lower": 890.0, "upper": 910.0},
        "decode": {"median": 50.0, "lower": 49.0, "upper": 51.0},
    }
    return found


def test_the_starting_kits_table(tmp_path: Path) -> None:
    full_score().write(tmp_path)
    heads, values = (line.split(",") for line in (tmp_path / "Results.csv").read_text().splitlines())
    assert heads == [
        "CommonsenseQA",
        "BIG-Bench-Hard",
        "GSM8K",
        "LongBench",
        "HumanEval",
        "CHID",
        "TruthfulQA",
        "Throughput",
        "Memory-Usage",
    ]
    assert values == ["72.9", "67.9", "84.4", "", "68.3", "69.4", "0.28", "3.25", "5.5"]
    stored = json.loads((tmp_path / "score.json").read_text())
    assert stored["competition"][0]["score"] == 72.9
    assert "GB" in stored["units"]["Memory-Usage"]


def test_a_marked_score_is_marked_wherever_it_is_shown(tmp_path: Path) -> None:
    found = full_score()
    found.marks, found.means = ["sample: a few items", "limit: 8 rows a task"], means([10.0] * 6)
    found.write(tmp_path)
    assert [path.name for path in tmp_path.glob("*.csv")] == ["Results-sample-limit.csv"]
    shown = found.rows()
    assert all("(sample, limit)" in shown[name] for name in (*SIX, "geometric mean"))


def test_what_was_not_run_is_blank_and_has_no_mean() -> None:
    found = Score("m", [], {}, [result(name, None if name == "humaneval" else 50.0) for name in SIX])
    assert found.csv().splitlines()[1] == "50,50,50,,,50,0.5,,"
    assert found.rows()["humaneval"] == "not run"
    assert found.rows()["geometric mean"] == "none: it needs all six tasks, and there is no score of humaneval"


@pytest.mark.parametrize("scores", [{"gsm8k": 5.0}, dict.fromkeys(SIX, 50.0) | {"humaneval": None}])
def test_a_score_that_lacks_tasks_is_never_called_full(scores: dict[str, float | None], tmp_path: Path) -> None:
    found = Score("m", [], {}, [result(name, score) for name, score in scores.items()])
    found.write(tmp_path)
    assert [path.name for path in tmp_path.glob("*.csv")] == ["Results-incomplete.csv"]
    assert json.loads((tmp_path / "score.json").read_text())["missing"] == [
        name for name in SIX if scores.get(name) is None
    ]
    full_score().write(tmp_path)
    assert [path.name for path in tmp_path.glob("*.csv")] == ["Results.csv"]
    assert json.loads((tmp_path / "score.json").read_text())["missing"] == []


def test_longbench_is_filled_where_that_group_ran() -> None:
    found = full_score()
    found.tasks = {"longbench": {"alias": "longbench", "score,none": 0.123}}
    assert dict(zip(COLUMNS, found.csv().splitlines()[1].split(","), strict=False))["LongBench"] == "12.3"


def test_means_of_known_scores() -> None:
    found = means([1.0, 10.0, 100.0])
    assert found.geometric == pytest.approx(10)
    assert found.arithmetic == pytest.approx(37)
    assert found.shifted_geometric == pytest.approx((2 * 11 * 101) ** (1 / 3) - 1)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_a_zero_makes_the_geometric_mean_zero_and_no_other(scores: list[float]) -> None:
    found = means([0.0, *scores])
    assert found.geometric == 0
    assert (found.shifted_geometric > 0) == any(score > 1e-300 for score in scores) or max(scores) < 1e-12
    assert found.shifted_geometric <= found.arithmetic + 1e-9


def test_the_interval_of_a_share_is_the_binomials() -> None:
    low, high = interval([[100.0] * 300 + [0.0] * 700], seed=0) or (0, 0)
    spread = 100 * 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((30 - spread, 30 + spread), abs=0.35)


def test_the_interval_of_subtasks_weighs_each_alike() -> None:
    # One part knows everything, one nothing: no doubt is left, whatever their sizes.
    assert interval([[100.0] * 5, [0.0] * 500], seed=1) == (50.0, 50.0)
    assert interval([[100.0], []], seed=1) is None
    assert interval([], seed=1) is None
