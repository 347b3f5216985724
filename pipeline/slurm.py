"""Submit a recipe's stages as SLURM jobs, each waiting for those that it reads from."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.files import exclusive, write_json, write_text
from pipeline.recipe import to_yaml
from pipeline.settings import Recipe
from pipeline.stages import Task
from pipeline.state import FOLDER, State
from train.slurm import Request
from train.snapshot import CHECKOUT, take_snapshot
from train.submit import Script, ask, sbatch

TEMPLATE = CHECKOUT / "slurm" / "stage.sbatch"

ALONE = Request({"gpus": "0", "tasks": "1"})
"""What a stage gets that asks for neither GPUs nor tasks: one process."""


def submit(recipe: Recipe, every: Sequence[Task]) -> None:
    """Put the code, the recipe and a script for each stage to do into the recipe's folder, and submit the scripts.

    What a stage reads is looked at when its job starts: one that turns out to be done ends at once.

    Raises:
        UserError: there is no SLURM, it refuses a job, or jobs of this recipe are in its queue. Jobs that were
            submitted before the refused one are cancelled.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--slurm needs sbatch on the PATH: run this on a login node of a SLURM cluster")
    folder, new = recipe.folder / FOLDER, not recipe.folder.exists()
    with exclusive(folder, f"the recipe's folder {recipe.folder}"):
        refuse_beside_jobs(recipe)
        try:
            _submit(recipe, every, folder)
        except UserError:
            if new:  # and ours alone, as long as it is locked
                shutil.rmtree(recipe.folder, ignore_errors=True)
            raise


def _submit(recipe: Recipe, every: Sequence[Task], folder: Path) -> None:
    state = State(recipe.folder, every)
    pending: list[Task] = []
    for task in every:
        waits = any(one in pending for one in task.waits_for)
        if waits or not state.of(task).done:
            pending.append(task)
        else:
            print(f"{task.name}: done already")
    if not pending:
        print("everything is done; the same command without --slurm shows the results")
        return
    code = take_snapshot(recipe.folder)
    written = folder / "recipe.yaml"
    write_text(written, to_yaml(recipe))
    jobs: dict[str, str] = {}
    for task in pending:
        script = folder / f"{task.name}.sbatch"
        write_text(script, _script(recipe, task, written, code).text)
        before = [jobs[one.name] for one in task.waits_for if one.name in jobs]
        try:
            job = sbatch(script, *([f"--dependency=afterok:{':'.join(before)}"] if before else []))
        except UserError as error:
            if jobs:
                ask("scancel", *jobs.values())
            said = "; ".join(str(error).split(" sbatch: error: "))  # a line of sbatch's each
            raise UserError(f"SLURM refuses stage {task.name}, so none is submitted: {said}") from error
        jobs[task.name] = job
        write_json(folder / "jobs.json", jobs)
        after = f" after {', '.join(one.name for one in task.waits_for if one.name in jobs)}" if before else ""
        print(f"{task.name}: job {job}{after}\n   {task.shown}")
    print(f"log of a stage: {folder}/STAGE-JOB.log")
    print(f"queue:          squeue --jobs={','.join(jobs.values())}")
    print(f"end all:        scancel {' '.join(jobs.values())}")


def _script(recipe: Recipe, task: Task, written: Path, code: Path) -> Script:
    """The batch script of a stage."""
    request = task.stage.slurm or ALONE
    if not {"gpus", "tasks"} & set(request.values):
        request = Request({**request.values, **ALONE.values})
    program, *rest = task.words
    words = [program, *rest] if program == "-m" else [str(code / program), *rest]
    options = {
        "job-name": f"{recipe.name}-{task.name}",
        "chdir": str(Path.cwd()),
        "output": str((recipe.folder / FOLDER / f"{task.name}-%j.log").absolute()),
        "kill-on-invalid-dep": "yes",
        **({"signal": "USR1@300"} if task.kind.trains else {}),
        **request.options(),
    }
    return (
        Script(TEMPLATE.read_text(encoding="utf-8"))
        .with_options(options)
        .with_variables(
            {
                "python": shlex.quote(sys.executable),
                "code": shlex.quote(str(code)),
                "recipe": shlex.quote(str(written)),
                "stage": shlex.quote(task.name),
                "words": f"({shlex.join(words)})",
                "trains": "yes" if task.kind.trains else "no",
            }
        )
    )


def refuse_beside_jobs(recipe: Recipe) -> None:
    """Raise a UserError while jobs of the recipe wait or run: two at work on a stage would fight for its folder."""
    if shutil.which("squeue") is None:  # no cluster: the folder was copied from one
        return
    try:
        jobs = json.loads((recipe.folder / FOLDER / "jobs.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    alive = ask("squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs.values())}").stdout.split()
    if alive:
        raise UserError(
            f"jobs {', '.join(alive)} of {recipe.folder} wait in the queue or run; let them, or end them with "
            f"scancel {' '.join(alive)}"
        )
