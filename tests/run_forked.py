"""Run commands of the project one after the other, each in a fork of this process, which has imported all of it once.

    python -m tests.run_forked '[["train.py", "--size", "tiny", ...], ["-m", "sft", ...]]'

Prints for each command a line of JSON: its exit code and its output. A command costs what it does and not the imports.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback


def run(words: list[str]) -> tuple[int, str]:
    """The exit code and the output of a command, as ``python WORDS`` would give them."""
    if "--devices" in words:  # starts itself once for each, which a fork cannot
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(_be(words))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def _be(words: list[str]) -> int:
    """Become the command; returns its exit code."""
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


def main() -> None:
    """Import, then run what the argument asks for."""
    import train.pretrain  # noqa: F401

    for words in json.loads(sys.argv[1]):
        code, output = run(words)
        print(json.dumps({"code": code, "output": output}), flush=True)


if __name__ == "__main__":
    main()
