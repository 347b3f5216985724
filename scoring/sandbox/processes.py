"""Ends processes whose own parent is gone."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from scoring.sandbox import libc

_PR_SET_CHILD_SUBREAPER = 36

_PATIENCE = 5.0
"""Seconds. A killed process is gone in milliseconds, unless it sits in a call that cannot be interrupted."""


def adopt_orphans() -> None:
    """From now on be the parent of every descendant whose parent ends.

    Left to process 1 they may stay as zombies for seconds, and these count towards the limits of a group.
    """
    if sys.platform == "linux":
        libc.call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans() -> None:
    """Kill all children of this process, theirs too, and wait until they are gone."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        with suppress(OSError):
            for child in Path("/proc/thread-self/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            time.sleep(0.001)
