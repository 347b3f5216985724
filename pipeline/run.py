"""Run a recipe's stages here, one after the other. A stage that is done is passed over, a killed one goes on."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console as RichConsole
from rich.text import Text

from common.console import Console, duration
from common.errors import UserError
from common.files import exclusive, readable_disk_errors
from pipeline.settings import Recipe
from pipeline.slurm import refuse_beside_jobs
from pipeline.stages import Task
from pipeline.state import FOLDER, State
from pipeline.table import closing

CHECKOUT = Path(__file__).absolute().parent.parent
PR_SET_PDEATHSIG = 1
LAST_LINES = 12
"""Of the log of a failed stage, that are shown."""


def run_recipe(recipe: Recipe, every: Sequence[Task]) -> None:
    """Run what is not done yet, and show what came of all.

    Raises:
        UserError: a stage refused its settings or inputs, failed, or another process or SLURM job runs this recipe.
        SystemExit: a signal came; with 128 + its number. The stage has been sent it and has ended.
    """
    console = Console()
    with exclusive(recipe.folder / FOLDER, f"the recipe's folder {recipe.folder}"):
        refuse_beside_jobs(recipe)
        state = State(recipe.folder, every)
        began = time.monotonic()
        for number, task in enumerate(every, 1):
            head = f"{number:2}/{len(every)} {task.name.ljust(max(len(one.name) for one in every))}"
            status = state.of(task)
            if status.done:
                console.say(f"{head}  done already, in {duration(status.seconds)}")
                continue
            aside = state.begin(task)
            if aside is not None:
                console.say(f"{head}  its inputs have changed; what it had made lies in {aside}")
            console.say(f"{head}  {task.shown}")
            _run(task, head, state.log(task))
            console.say(f"{head}  {duration(state.finish(task))}")
        console.say("")
        closing(every, console)
        console.say(
            f"\n{recipe.name} took {duration(time.monotonic() - began)} this time; everything is in {recipe.folder}"
        )


def _run(task: Task, head: str, log: Path) -> None:
    """Run one command; its output goes to the log, its last line is shown on a terminal."""
    program, *rest = task.words
    words = [sys.executable, *([program] if program == "-m" else [str(CHECKOUT / program)]), *rest]
    path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with readable_disk_errors(log), open(log, "a", encoding="utf-8") as output:
        output.write(f"$ {task.shown}\n")
        output.flush()
        child = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes once, from here, and not a second time from the terminal
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    with _passed_on(child) as received, _line(head) as show:
        while child.poll() is None:
            show(_last_lines(log, 1))
            time.sleep(0.2)
    if received:
        number = received[0]
        print(f"stopped by {number.name}; the same command goes on where it was", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)
    if child.returncode:
        how = f"code {child.returncode}" if child.returncode > 0 else signal.Signals(-child.returncode).name
        said = _last_lines(log, LAST_LINES)
        raise UserError(f"stage {task.name} ended with {how}:\n{said}\nits whole output: {log}\nalone: {task.shown}")


@contextmanager
def _passed_on(child: "subprocess.Popen[bytes]") -> Iterator[list[signal.Signals]]:
    """A block in which signals that ask this process to stop go to the child instead; those that came are listed."""
    received: list[signal.Signals] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        child.send_signal(number)

    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, pass_on) for number in asked]
    try:
        yield received
    finally:
        for number, handler in zip(asked, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _line(head: str) -> Iterator[Callable[[str], None]]:
    """One line on a terminal that says what a stage is doing; elsewhere nothing."""
    console = RichConsole(highlight=False)
    room = max(10, shutil.get_terminal_size().columns - len(head) - 6)
    with console.status(Text(head)) as status:
        yield lambda text: status.update(Text(f"{head}  {text.strip()[:room]}"))


def _last_lines(log: Path, count: int) -> str:
    """The last lines of a log that say anything."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-count:])


def _end_with_parent() -> None:
    """In the child: die when the pipeline is killed, or it would go on beside the next one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
