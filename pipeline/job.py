"""``python -m pipeline.job begin|finish RECIPE STAGE``: what slurm/stage.sbatch does before and after a stage."""

import sys
from pathlib import Path

from common.command import run_command
from pipeline.recipe import read_recipe
from pipeline.stages import tasks
from pipeline.state import State

DONE = 3
"""Exit code of ``begin`` where there is nothing to do."""


def main() -> None:
    """Note that a stage begins, unless it is done; or that it has ended well."""
    word, path, name = sys.argv[1:]
    recipe = read_recipe(Path(path))
    every = tasks(recipe)
    task, state = next(one for one in every if one.name == name), State(recipe.folder, every)
    if word == "finish":
        state.finish(task)
        return
    if state.of(task).done:
        print(f"{name}: done already")
        raise SystemExit(DONE)
    aside = state.begin(task)
    if aside is not None:
        print(f"its inputs have changed; what it had made lies in {aside}")
    print(f"$ {task.shown}", flush=True)


if __name__ == "__main__":
    run_command(main)
