"""A copy of the code in the run folder: a job that waits in a queue, or starts again, runs what was submitted.

``python -m train.snapshot`` with the words of a training command makes it for slurm/train.sbatch. Imports
nothing heavy.
"""

import os
import shutil
import sys
from pathlib import Path

from common.command import run_command
from common.files import exclusive, new_folder
from common.run_folder import COMMIT_FILE, git_commit
from common.settings import parse

CHECKOUT = Path(__file__).absolute().parent.parent

NOT_COPIED = ("tests", "bench")
"""Packages that no run imports."""


def take_snapshot(run: Path) -> Path:
    """Copy the code into a run's folder, in place of an earlier copy; returns the copy's path.

    Raises:
        UserError: the run is under way.
    """
    code = run.absolute() / "code"
    if code == CHECKOUT:  # the copy itself submits
        return code
    with exclusive(run, f"the run {run}"), new_folder(code) as folder:
        for path in CHECKOUT.iterdir():
            if path.suffix == ".py" or path.name in ("pyproject.toml", "LICENSE"):
                shutil.copy2(path, folder / path.name)
            elif path.name in ("recipes", "slurm") or ((path / "__init__.py").exists() and path.name not in NOT_COPIED):
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / COMMIT_FILE).write_text((git_commit() or "") + "\n", encoding="utf-8")
    return code


def main() -> None:
    """Make the copy at a job's first start, and print where it is."""
    from train.settings import TrainCommand, run_name, run_path

    run = run_path(
        run_name(parse(TrainCommand, sys.argv[1:], prog="python -m train.snapshot", description=__doc__ or ""))
    )
    code = run.absolute() / "code"
    again = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    print(code if again and code.exists() else take_snapshot(run))


if __name__ == "__main__":
    run_command(main)
