"""``python -m pipeline RECIPE.yaml``: all stages of a recipe, here or as SLURM jobs."""

import sys
from pathlib import Path

from common.command import run_command

DESCRIPTION = """\
Carry out a recipe: every stage is a command that you could type, and is shown as that. What is done is not done again,
a stage whose command or inputs have changed is, and the same command goes on where a killed one was.

examples:
  python -m pipeline recipes/demo.yaml                                  all of it, small, offline, on a CPU
  python -m pipeline recipes/125m.yaml --plan --gpu l40s --price 0.8    time and cost
  python -m pipeline recipes/125m.yaml pretrain.tokens=1e9 folder=runs/short      other values for this time
  python -m pipeline recipes/1b.yaml --show                             the commands, and which are done
  python -m pipeline recipes/1b.yaml --slurm                            jobs that wait for each other
"""


def main() -> None:
    """The command."""
    run_command(_main)


def _main() -> None:
    from common.settings import parse
    from pipeline.recipe import read_recipe
    from pipeline.settings import PipelineCommand
    from pipeline.stages import tasks

    prog = "python -m pipeline"
    command = parse(PipelineCommand, sys.argv[1:], prog=prog, description=DESCRIPTION, positional="recipe changes")
    assert command.recipe is not None
    recipe = read_recipe(Path(command.recipe), command.changes)
    every = tasks(recipe)
    if command.show:
        from pipeline.table import show

        show(recipe, every)
    elif command.plan:
        from pipeline.plan import print_plan

        print_plan(recipe, every, command.gpu, command.price)
    elif command.slurm:
        from pipeline.slurm import submit

        submit(recipe, every)
    else:
        from pipeline.run import run_recipe

        run_recipe(recipe, every)


if __name__ == "__main__":
    main()
