"""Commands of the project, each in a fork of a Python that has imported it once.

A command then costs what it does, and not the five seconds of processor time that its imports take. What must be a
process of its own is not for here: help and start-up, signals before Python's first line, ranks that a launcher starts.
"""

import contextlib
import functools
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Forked:
    """A Python that has imported the project and waits for commands; it ends with this process.

    Args:
        environment: on top of this process's, for imports too, as the hub's address is read by them.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str | Path, folder: Path = ROOT, timeout: int = 300) -> subprocess.CompletedProcess[str]:
        """``python WORDS`` in a folder; after ``timeout`` seconds it is killed."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as outputs:
            said = [Path(outputs) / name for name in ("stdout", "stderr")]
            request = {"words": [str(word) for word in words], "folder": str(folder), "timeout": timeout}
            self._server.stdin.write(json.dumps(request | {"outputs": [str(path) for path in said]}) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            out, err = (path.read_text(encoding="utf-8", errors="replace") for path in said)
        return subprocess.CompletedProcess([sys.executable, *request["words"]], code, out, err)


@functools.cache
def forked() -> Forked:
    """The one of this test process."""
    return Forked()


def serve() -> None:
    """Import, then answer every request on standard input with an exit code."""
    for module in ("train.pretrain", "sft.finetune", "transformers.models.qwen3.modeling_qwen3", "lm_eval.evaluator"):
        importlib.import_module(module)

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(become(**request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(words: list[str], folder: str, timeout: int, outputs: list[str]) -> int:
    """Be the command in this process; returns its exit code."""
    signal.alarm(timeout)
    os.chdir(folder)
    for number, path in enumerate(["/dev/null", *outputs]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    devices = [value for flag, value in pairwise(words) if flag == "--devices"]
    if devices and devices[-1] != "1":  # starts itself once for each, which a fork cannot
        return subprocess.run([sys.executable, *words], check=False).returncode
    code = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
