"""The competition's ranking, recomputed by hand, and the leaderboard of runs beside published entries."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from submit.leaderboard import entry_of, leaderboard, leaderboard_command, published, standings, text_table
from submit.published import PUBLISHED
from submit.ranking import TASKS, Entry, Throughput, front, places, points, rank
from submit.settings import LeaderboardCommand
from tests.submit.runs import C4, FOREIGN, SIX, write_phone, write_run, write_scores

GOOD = (50.0, 40.0, 30.0, 20.0, 40.0, 18.0)


def entry(name: str, *scores: float | None, **more: object) -> Entry:
    made = Entry(name, 2, dict(zip(SIX, scores, strict=False)), "a test")
    return replace(made, **more)  # type: ignore[arg-type]


def test_ties_share_the_better_place_and_what_was_not_measured_has_none() -> None:
    assert places([3.0, None, 5.0, 3.0, 1.0]) == [2, None, 1, 2, 4]
    assert [points(place) for place in (1, 2, 10, 11, 40)] == [10, 9, 1, 0, 0]


def test_published_entries_are_ranked_as_the_rule_gives() -> None:
    """Places by hand from the published table: CSQA, BBH, GSM8K, HumanEval, CHID, TruthfulQA."""
    tables = standings(published())
    by_hand = {
        2: {
            "Cauchy-3B-preview (Tinytron)": ((1, 1, 2, 1, 2, 1), 58),
            "nGPT 800M (NICSEffalg)": ((2, 2, 1, 2, 3, 2), 54),
            "GPT-2, 12 layers (Team NG)": ((3, 3, 3, 2, 1, 3), 51),
        },
        1: {
            "Tinytron": ((1, 1, 1, 1, 1, 1), 60),
            "NICSEffalg": ((3, 2, 3, 2, 2, 2), 52),
            "sriyachakravarthy": ((2, 3, 2, 3, 3, 3), 50),
        },
    }
    for track, expected in by_hand.items():
        found = {one.entry.name: (tuple(one.places[task] for task in SIX), one.points) for one in tables[track]}
        assert found == expected
        assert [one.place for one in tables[track]] == [1, 2, 3]
        assert all("throughput" not in one.places for one in tables[track])
    assert all(one.place is None for one in tables[None])
    tinytron = next(one.entry for one in tables[1] if one.entry.name == "Tinytron")
    assert tinytron.scores["commonsense_qa"] == pytest.approx((72.40 + 64.37 + 47.09) / 3)
    assert tinytron.scores["truthfulqa"] == pytest.approx(100 * (0.29 + 0.28 + 0.23) / 3)


def test_published_scores_are_those_of_the_table(shared: Path) -> None:
    text = (shared / "facts" / "scoring.md").read_text(encoding="utf-8").partition("## 4.")[2].partition("\n## 5")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    theirs = [tuple(map(float, row[1:7])) for row in rows if re.fullmatch(r"[\d.]+", row[1])]
    assert theirs == [one.scores for one in PUBLISHED]


def test_throughput_counts_double_on_one_phone_and_for_nobody_on_two() -> None:
    fast = entry("fast", 10.0, throughput=Throughput(50.0, "Phone A", phone=True))
    slow = entry("slow", 20.0, throughput=Throughput(40.0, "Phone A", phone=True))
    host = entry("host", 30.0, throughput=Throughput(900.0, "a server"))
    found = {one.entry.name: (one.points, one.places.get("throughput")) for one in rank([fast, slow, host])}
    assert found == {"fast": (8 + 20, 1), "slow": (9 + 18, 2), "host": (10, None)}
    other = replace(slow, throughput=Throughput(40.0, "Phone B", phone=True))
    assert all("throughput" not in one.places for one in rank([fast, other, host]))


def test_too_much_memory_disqualifies_and_marked_scores_take_no_place() -> None:
    large = entry("large", 90.0, memory=12.1e9)
    sample = entry("sample", 80.0, unranked=("sample",))
    outside = entry("outside", 70.0, remarks=("data outside the rules of track 2: my-corpus",), memory=12e9)
    found = rank([large, sample, outside, entry("plain", 60.0)])
    assert [(one.entry.name, one.place) for one in found] == [
        ("outside", 1), ("plain", 2), ("large", None), ("sample", None),
    ]  # fmt: skip
    shown = text_table(found)
    assert "large: disqualified: over 12 GB" in shown
    assert "outside: not measured" in shown
    assert "data outside the rules of track 2: my-corpus" in shown


def test_eleventh_places_get_nothing_and_longbench_is_a_task() -> None:
    many = [entry(f"{number:02d}", float(number)) for number in range(12)]
    assert [one.points for one in rank(many)] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0]
    assert [one.place for one in rank(many)][-2:] == [11, 11]
    long = replace(entry("long", 1.0), scores={"longbench": 5.0})
    assert rank([long])[0].points == 10
    assert len(TASKS) == 7


def test_the_pareto_front() -> None:
    found = [(1.0, 5.0), (2.0, 5.0), (3.0, 9.0), (4.0, 8.0), (0.5, 1.0)]
    assert front(found, less_is_better=True) == [4, 0, 2]
    assert front(found, less_is_better=False) == [2, 3]


def test_runs_stand_beside_published_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = write_scores(write_run(tmp_path / "runs" / "full"), GOOD)
    write_scores(full, (99.0,) * 6, name="sample", marks=("sample: a few items",))
    write_scores(full, (99.0,), name="commonsense_qa")
    write_phone(full, 30.0)
    limited = write_scores(write_run(tmp_path / "runs" / "limited"), (99.0,) * 6, marks=("limit: 8 rows",))
    other = [{"stage": "pretrain", "sources": [{"source": "sample", "weight": 1}]}]
    outside = write_scores(write_run(tmp_path / "runs" / "outside", data=other), (1.0, None, 1.0, 1.0, 1.0, 1.0))
    write_phone(outside, 99.0, emulated=True)
    out = tmp_path / "board.html"
    leaderboard_command(LeaderboardCommand([str(full), str(limited), str(outside)], str(out)))
    shown = capsys.readouterr().out
    track2 = shown.partition("Track 2")[2]
    assert re.search(r"1  full +79 ", track2)  # six first places but TruthfulQA's, and 20 for throughput
    assert re.search(r"-  limited +- ", track2)
    assert "limited: limit; not measured: throughput on a phone" in track2
    assert "outside: not measured: BBH, throughput on a phone; data outside the rules of track 2: sample" in track2
    text = out.read_text(encoding="utf-8")
    assert "Cauchy-3B-preview" in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")


def test_three_compressed_models_are_one_entry(tmp_path: Path) -> None:
    runs = [
        write_scores(write_run(tmp_path / name, data=[*FOREIGN, *C4]), tuple(score + shift for score in GOOD))
        for shift, name in enumerate(("phi", "llama", "qwen"))
    ]
    for run in runs:
        write_phone(run, 20.0, peak=13 * 10**9 if run.name == "qwen" else 10**9)
    words = ",".join(map(str, runs))
    ours = entry_of(f"ours={words}")
    assert ours.scores["commonsense_qa"] == pytest.approx(51.0)
    assert (ours.track, ours.models, ours.unranked, ours.remarks) == (1, 3, (), ())
    assert ours.throughput is not None
    assert ours.throughput.value == 20.0
    assert ours.disqualified
    alone = entry_of(str(runs[0]))
    assert (alone.track, alone.unranked) == (1, ("one model of 3",))
    scratch = write_scores(write_run(tmp_path / "scratch"), GOOD)
    with pytest.raises(UserError, match="names 1 runs; an entry of track 1 is the mean of 3"):
        entry_of(f"ours={runs[0]}")
    with pytest.raises(UserError, match=r"scratch was trained from scratch"):
        entry_of(f"ours={runs[0]},{runs[1]},{scratch}")


def test_a_run_without_scores_names_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "new")
    with pytest.raises(UserError, match=r"has no scores .*python -m scoring .*new/model"):
        entry_of(str(run))
    with pytest.raises(UserError, match="is no run folder"):
        entry_of(str(tmp_path))


def test_scores_of_the_model_before_are_not_the_model_s(tmp_path: Path) -> None:
    """A run that went on has another model than the one that was scored."""
    run = write_run(tmp_path / "run")
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(b"of step 10")
    write_scores(run, (99.0,) * 6)
    assert entry_of(str(run)).scores["gsm8k"] == 99
    weights.write_bytes(b"of step 20")
    with pytest.raises(UserError, match=r"run are of other weights than its model has now; python -m scoring"):
        entry_of(str(run))
    write_scores(run, (1.0,), name="some")
    assert entry_of(str(run)).scores == {"commonsense_qa": 1.0}


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = entry("<script>alert(1)</script>", *GOOD, remarks=("<b>",), parameters=1e9)
    page = leaderboard(standings([evil, *published()]))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_words_before_the_flags_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from submit.__main__ import main

    run, out = write_scores(write_run(tmp_path / "a b"), GOOD), tmp_path / "b.html"
    monkeypatch.setattr(sys, "argv", ["submit", "leaderboard", str(run), "--out", str(out)])
    main()
    assert "a b" in out.read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["submit", "leaderboard", "--out", str(out)])
    main()
    assert "a b" not in out.read_text(encoding="utf-8")
