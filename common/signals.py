"""Catch the signals that ask a job to stop, from the first line of the program.

SLURM may signal a job up to a minute early, while its imports are still running, and the default
action of SIGUSR1 ends the process. So the doors (``train.py``, ``python -m train``) call
:func:`install` before they import anything heavy. The handler records the signal and says so; the training
loop looks at :func:`received` between two steps and saves there. Nothing is saved inside a handler.
"""

import os
import signal
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""The signals that ask a run to save and stop."""

_received: signal.Signals | None = None


def install() -> None:
    """Record SIGTERM, SIGUSR1 and SIGINT instead of dying from them.

    A second SIGINT (Ctrl-C pressed twice) interrupts at once. Whoever started this process may have blocked
    the signals, so that those which came before this line are not fatal but wait for it: they come now.
    """
    for number in STOPPING:
        signal.signal(number, _record)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def received() -> signal.Signals | None:
    """The first signal that came, or None."""
    return _received


def clear() -> None:
    """Forget what came and give the signals their default actions back."""
    global _received
    _received = None
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore() -> None:
    """Leave the signals to the parent: for worker processes, which get them with the group."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _record(number: int, frame: FrameType | None) -> None:
    global _received
    if _received is not None and number == signal.SIGINT:
        raise KeyboardInterrupt
    if _received is None:
        _received = signal.Signals(number)
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            return  # rank 0 speaks for all
        text = f"\n{_received.name} received: saving after this step (Ctrl-C once more stops at once)\n"
        os.write(2, text.encode())  # print is not safe here: it may have been interrupted itself
