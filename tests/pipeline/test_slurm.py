"""Stages as SLURM jobs: scripts, dependencies, what is submitted again. tests/slurm has a real SLURM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline import job, stages
from pipeline.recipe import read_recipe
from pipeline.run import run_recipe
from pipeline.slurm import submit
from pipeline.stages import tasks
from tests.conftest import ROOT
from tests.pipeline.test_run import RECIPE, STAND_IN

SBATCH = """#!/bin/sh
count=$(($(cat {folder}/count 2>/dev/null || echo 100) + 1))
echo $count > {folder}/count
echo "$@" >> {folder}/asked
if [ -f {folder}/refuse ] && [ $count -ge 102 ]; then
    printf 'sbatch: error: %s\\n' "no such partition" "not taken" >&2
    exit 1
fi
echo $count
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Path:
    """A folder with a recipe, and SLURM's commands that note what they are asked."""
    monkeypatch.setitem(stages.KINDS, "stand in", STAND_IN)
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {
        "sbatch": SBATCH.format(folder=tmp_path),
        "squeue": f"#!/bin/sh\ncat {tmp_path}/queue 2>/dev/null\n",
        "scancel": f"#!/bin/sh\necho scancel $@ >> {tmp_path}/asked\n",
        "srun": '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "words.txt").write_text("0")
    (tmp_path / "path.yaml").write_text(RECIPE.replace('text: "2"}', 'text: "2"}\n    slurm: gpus=2,time=10'))
    return tmp_path


def submitted(*changes: str) -> list[str]:
    recipe = read_recipe(Path("path.yaml"), changes)
    asked = Path("asked")
    asked.unlink(missing_ok=True)
    submit(recipe, tasks(recipe))
    return asked.read_text().splitlines() if asked.exists() else []


def carry_out(name: str, monkeypatch) -> int:
    """What a stage's job does around its command; the command itself where there is something to do."""

    def note(word: str) -> None:
        monkeypatch.setattr(sys, "argv", ["job", word, "runs/path/pipeline/recipe.yaml", name])
        job.main()

    try:
        note("begin")
    except SystemExit as end:
        return int(str(end.code))
    task = next(one for one in tasks(read_recipe(Path("runs/path/pipeline/recipe.yaml"))) if one.name == name)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *task.words], check=True, env=environment, capture_output=True)
    note("finish")
    return 0


def test_stages_wait_for_what_they_read(site: Path, capsys) -> None:
    asked = submitted()
    folder = Path("runs/path/pipeline")
    assert asked == [
        f"--parsable {folder}/one.sbatch",
        f"--parsable --dependency=afterok:101 {folder}/two.sbatch",
        f"--parsable --dependency=afterok:102 {folder}/three.sbatch",
    ]
    assert json.loads((folder / "jobs.json").read_text()) == {"one": "101", "two": "102", "three": "103"}
    said = capsys.readouterr().out
    assert "two: job 102 after one\n   python -m tests.pipeline.stand_in" in said
    assert "scancel 101 102 103" in said
    two = (folder / "two.sbatch").read_text()
    for line in (
        "--job-name=path-two",
        "--gpus-per-node=2",
        "--ntasks-per-node=2",
        "--time=10",
        "--kill-on-invalid-dep=yes",
    ):
        assert f"#SBATCH {line}\n" in two
    assert "--signal" not in two
    assert "--gpus-per-node" not in (folder / "one.sbatch").read_text()
    assert (site / "runs/path/code/pipeline/job.py").exists()


def test_a_recipe_s_jobs_are_submitted_once(site: Path) -> None:
    submitted()
    Path("queue").write_text("102\n103\n")
    with pytest.raises(UserError, match="jobs 102, 103 of runs/path wait in the queue or run"):
        submitted()


def test_a_recipe_is_not_run_here_beside_its_jobs(site: Path, monkeypatch) -> None:
    submitted()
    Path("queue").write_text("102\n103\n")
    recipe = read_recipe(Path("path.yaml"))
    with pytest.raises(UserError, match="jobs 102, 103 of runs/path wait in the queue or run"):
        run_recipe(recipe, tasks(recipe))
    assert not Path("runs/path/one").exists()
    Path("queue").unlink()
    run_recipe(recipe, tasks(recipe))
    assert Path("runs/path/three/result").read_text() == "0123"
    monkeypatch.setenv("PATH", "/nowhere")
    run_recipe(recipe, tasks(recipe))


def test_what_is_done_is_not_submitted_and_what_turns_out_to_be_ends_at_once(site: Path, monkeypatch, capsys) -> None:
    submitted()
    assert [carry_out(name, monkeypatch) for name in ("one", "two", "three")] == [0, 0, 0]
    assert Path("runs/path/three/result").read_text() == "0123"
    capsys.readouterr()
    assert submitted() == []
    assert "everything is done" in capsys.readouterr().out
    assert [line.rsplit("/", 1)[1] for line in submitted("two.text=z")] == ["two.sbatch", "three.sbatch"]
    assert carry_out("two", monkeypatch) == 0
    assert carry_out("three", monkeypatch) == 0
    assert Path("runs/path/three/result").read_text() == "01z3"
    (site / "words.txt").write_text("01")
    assert len(submitted("two.text=z", "one.text=")) == 3
    assert [carry_out(name, monkeypatch) for name in ("one", "two", "three")] == [0, job.DONE, job.DONE]


def test_a_refused_job_takes_the_others_with_it(site: Path) -> None:
    Path("refuse").touch()
    with pytest.raises(UserError) as error:
        submitted()
    assert str(error.value) == "SLURM refuses stage two, so none is submitted: no such partition; not taken"
    assert Path("asked").read_text().splitlines()[-1] == "scancel 101"
    assert not Path("runs/path").exists()
    Path("runs/path/mine").mkdir(parents=True)
    with pytest.raises(UserError, match="no such partition"):
        submitted()
    assert Path("runs/path/mine").exists()


def test_without_slurm_it_says_so(site: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="needs sbatch on the PATH"):
        submitted()


def test_the_script_of_a_stage_runs(site: Path) -> None:
    """As SLURM would start it, on a corpus that is no bother."""
    Path("real.yaml").write_text(
        "name: real\nstages:\n  words:\n    command: data tokenizer\n    settings: {data: sample, vocab: 512}\n"
    )
    recipe = read_recipe(Path("real.yaml"))
    submit(recipe, tasks(recipe))
    script = Path("runs/real/pipeline/words.sbatch")
    first = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "$ python -m data tokenizer --data sample --vocab 512 --out runs/real/words" in first.stdout
    assert (site / "runs/real/words/tokenizer.json").exists()
    again = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, "words: done already\n")
