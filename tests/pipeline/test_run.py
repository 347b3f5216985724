"""What is done is not done again, what has changed is, and what was killed goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import stages
from pipeline.recipe import read_recipe
from pipeline.run import run_recipe
from pipeline.stages import Kind, Place, tasks
from pipeline.state import State
from pipeline.table import show
from tests.conftest import ROOT

RECIPE = """
name: path
stages:
  one:
    command: stand in
    settings: {source: words.txt, text: "1"}
  two:
    command: stand in
    settings: {source: "${one}", text: "2"}
  three:
    command: stand in
    settings: {source: "${two}", text: "3"}
"""

STAND_IN = Kind(
    ("-m", "tests.pipeline.stand_in"),
    "tests.pipeline.stand_in:StandIn",
    lambda folder, settings: Place(Path(settings.out) / "result", whole=Path(settings.out)),
    defaults=lambda folder, given: {"out": str(folder)},
)

CHILD = """
import sys
from tests.pipeline.test_run import STAND_IN
from pipeline import stages
stages.KINDS["stand in"] = STAND_IN
from pipeline.__main__ import main
main()
"""
"""The command, with the stand-in among those that it knows."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setitem(stages.KINDS, "stand in", STAND_IN)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("0")
    (tmp_path / "path.yaml").write_text(RECIPE)
    return tmp_path


def run(*changes: str) -> None:
    recipe = read_recipe(Path("path.yaml"), changes)
    run_recipe(recipe, tasks(recipe))


def starts() -> list[int]:
    """How often each stage has been started on what is there now."""
    files = [Path("runs/path") / name / "starts" for name in ("one", "two", "three")]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def result() -> str:
    return Path("runs/path/three/result").read_text()


def test_a_recipe_runs_once(site: Path, capsys) -> None:
    run()
    assert result() == "0123"
    said = capsys.readouterr().out
    assert (
        "2/3 two    python -m tests.pipeline.stand_in --source runs/path/one/result --text 2 --out runs/path/two"
        in said
    )
    assert "three: runs/path/three/result" in said
    run()
    assert capsys.readouterr().out.count("done already") == 3
    assert starts() == [1, 1, 1]
    log = Path("runs/path/pipeline/two.log").read_text()
    assert log.startswith("$ python -m tests.pipeline.stand_in")
    assert "reading runs/path/one/result" in log


def test_other_settings_run_again_what_follows_and_nothing_before(site: Path, capsys) -> None:
    run()
    capsys.readouterr()
    run("two.text=z")
    assert result() == "01z3"
    said = capsys.readouterr().out
    assert said.count("done already") == 1
    assert "two    its inputs have changed; what it had made lies in runs/path/replaced/two-1" in said
    assert Path("runs/path/replaced/two-1/result").read_text() == "012"
    run("two.text=y")
    assert Path("runs/path/replaced/two-2/result").read_text() == "01z"


def test_contents_count_and_times_do_not(site: Path) -> None:
    run()
    os.utime("words.txt")
    os.utime("runs/path/one/result")
    run()
    assert starts() == [1, 1, 1]
    (site / "words.txt").write_text("x")
    run()
    assert result() == "x123"
    assert starts() == [1, 1, 1]
    assert sorted(path.name for path in Path("runs/path/replaced").iterdir()) == ["one-1", "three-1", "two-1"]


def test_a_stage_that_makes_the_same_again_changes_nothing_behind_it(site: Path) -> None:
    run()
    (site / "words.txt").write_text("01")
    run("one.text=")
    assert result() == "0123"
    assert starts() == [1, 1, 1]
    assert [path.name for path in Path("runs/path/replaced").iterdir()] == ["one-1"]


def test_a_result_that_is_gone_is_made_again(site: Path) -> None:
    run()
    Path("runs/path/two/result").unlink()
    run()
    assert result() == "0123"
    assert starts() == [1, 2, 1]


def test_a_failed_stage_shows_why_and_goes_on_in_its_place(site: Path) -> None:
    with pytest.raises(UserError) as failed:
        run("two.code=7")
    said = str(failed.value)
    assert said.startswith("stage two ended with code 7:\n")
    assert "it cannot be done" in said
    assert "runs/path/pipeline/two.log" in said
    assert "alone: python -m tests.pipeline.stand_in --source runs/path/one/result" in said
    with pytest.raises(UserError):
        run("two.code=7")
    assert starts() == [1, 2, 0]


def test_a_stage_that_leaves_nothing_has_failed(site: Path, monkeypatch) -> None:
    elsewhere = Kind(STAND_IN.words, STAND_IN.settings, lambda folder, settings: Place(folder / "other"))
    monkeypatch.setitem(stages.KINDS, "stand in", elsewhere)
    with pytest.raises(UserError, match="stage one ended without runs/path/one/other"):
        run("one.out=runs/path/one")


def test_one_recipe_runs_once_at_a_time(site: Path) -> None:
    from common.files import exclusive

    with exclusive(Path("runs/path/pipeline"), "it"), pytest.raises(UserError, match="in use by another process"):
        run()


def test_what_is_to_do_can_be_shown(site: Path, capsys) -> None:
    run()
    capsys.readouterr()
    recipe = read_recipe(Path("path.yaml"), ["two.text=z"])
    show(recipe, tasks(recipe))
    lines = re.sub(r"in \d+s", "in 0s", capsys.readouterr().out).splitlines()
    assert [line for line in lines if not line.startswith("   ")] == [
        " 1 one: done, in 0s",
        " 2 two: its inputs have changed",
        " 3 three: waits for two",
    ]
    assert starts() == [1, 1, 1]


def test_what_other_stages_write_into_a_result_is_not_part_of_it(site: Path, monkeypatch) -> None:
    """An export's bench.json does not make the export another one."""
    whole = Kind(
        STAND_IN.words,
        STAND_IN.settings,
        lambda folder, settings: Place(Path(settings.out)),
        defaults=STAND_IN.defaults,
    )
    monkeypatch.setitem(stages.KINDS, "stand in", whole)
    Path("path.yaml").write_text(RECIPE.replace('text: "2"', 'text: "2", out: runs/path/one/inside'))
    recipe = read_recipe(Path("path.yaml"))
    every = tasks(recipe)
    run_recipe(recipe, every)
    assert all(State(recipe.folder, every).of(task).done for task in every)
    (Path("runs/path/one/inside") / "result").write_text("other")
    status = [State(recipe.folder, every).of(task).done for task in every]
    assert status == [True, True, False]


def start(site: Path, *changes: str) -> "subprocess.Popen[str]":
    """The command, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, "path.yaml", *changes],
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_and_ends_the_recipe(site: Path, number: signal.Signals) -> None:
    child = start(site, "two.seconds=60")
    wait_for(site / "runs/path/two/starts")
    child.send_signal(number)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    assert f"stopped by {number.name}; the same command goes on where it was" in said
    assert json.loads((site / "runs/path/pipeline/two.json").read_text())["state"] == "begun"


def test_a_killed_recipe_leaves_nothing_running_and_goes_on(site: Path) -> None:
    child = start(site, "two.seconds=60")
    wait_for(site / "runs/path/two/starts")
    stage = int(subprocess.run(["pgrep", "--parent", str(child.pid)], capture_output=True, text=True).stdout)
    child.kill()
    child.communicate()
    end = time.monotonic() + 10
    while Path(f"/proc/{stage}").exists() and "Z" not in Path(f"/proc/{stage}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)
    run()
    assert result() == "0123"
    assert starts()[0] == 1


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['pipeline', '--help']\ntry: runpy.run_module('pipeline', run_name='__main__')\n"
    )
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m pipeline recipes/demo.yaml" in done.stdout
