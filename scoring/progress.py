"""How far a run of many tasks is."""

import sys
import time
from collections import Counter
from collections.abc import Iterable

from common.console import Console, duration

FILE_SECONDS = 20.0
"""Between two lines in a file."""

TERMINAL_SECONDS = 0.2
"""Between two changes of a terminal's one line."""


class Progress:
    """Shows answers done of each task, and the time that its others will take at the pace so far. Use it as a context.

    Args:
        console: where.
        expected: the task of every answer that there will be.
        done: the task of every answer that there is.
    """

    def __init__(self, console: Console, expected: Iterable[str], done: Iterable[str] = ()) -> None:
        self._console, self._expected, self._done = console, Counter(expected), Counter(done)
        self._pause = TERMINAL_SECONDS if sys.stdout.isatty() else FILE_SECONDS
        self._task, self._before = "", 0
        self._began = self._latest = self._told = time.monotonic()

    def __enter__(self) -> "Progress":
        self._console.start(self._expected.total(), self._done.total())
        return self

    def __exit__(self, *error: object) -> None:
        self._console.stop()

    def add(self, task: str, count: int = 1) -> None:
        """Count answers of a task; those of one task come one after the other."""
        if task != self._task:  # it has been worked on since the last answer of the one before
            self._task, self._before, self._began = task, self._done[task], self._latest
        self._latest = time.monotonic()
        self._done[task] += count
        done, expected = self._done[task], self._expected[task]
        if done < expected and self._latest - self._told < self._pause:
            return
        self._told = self._latest
        pace = (self._latest - self._began) / (done - self._before)
        status = {task: f"{done:,}/{expected:,}"} | (
            {"left": duration(pace * (expected - done))} if done < expected else {}
        )
        self._console.progress(self._done.total(), self._expected.total(), status)
