"""Run a training command again and again, killing it, until it is finished.

Started as a program of its own with one JSON argument: ``argv`` of the command, ``kills`` (a list of
{"step", "signal", "workers"}), the run folder and the last workers. The modules are imported once; each attempt is
a fork, so that an attempt costs a fraction of a second instead of the imports.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path


def last_step(metrics: Path) -> int:
    """The last step in a run's metrics, 0 before there are any."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads(metrics.read_text().splitlines()[-1])["step"])
    return 0


def attempt(argv: list[str]) -> int:
    """Start the command in a child; returns its process id."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        sys.argv = ["train.py", *argv]
        code = 1
        try:
            from train.__main__ import main

            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def main() -> None:
    """Attempt until finished; prints how each attempt ended."""
    plan = json.loads(sys.argv[1])
    from common import signals

    signals.install()  # inherited by the forks, as a real start has it from its first line
    import train.pretrain  # noqa: F401  (imported before the forks, once)

    metrics = Path(plan["run"]) / "metrics.jsonl"
    for kill in [*plan["kills"], None]:
        workers = plan["last_workers"] if kill is None else kill["workers"]
        began = last_step(metrics)
        child = attempt([*plan["argv"], "--loader.workers", str(workers)])
        time.sleep(0.05)  # a forked Python drops signals that come before it has settled; a started one does not
        status = None
        while kill is not None and status is None:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = code
            elif last_step(metrics) >= kill["step"]:
                os.kill(child, getattr(signal, kill["signal"]))
                status = os.waitpid(child, 0)[1]
            else:
                time.sleep(0.002)
        if status is None:
            status = os.waitpid(child, 0)[1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # data workers of a killed trainer
        print(
            json.dumps({"from": began, "to": last_step(metrics), "code": os.waitstatus_to_exitcode(status)}), flush=True
        )


if __name__ == "__main__":
    main()
