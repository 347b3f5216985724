"""The process that starts boxes, one after the other, and watches what comes out of them.

    python -m scoring.sandbox.runner '{"binary": "/usr/bin/bwrap", ...}'

It is small, so that starting a process from it is cheap, and as root it becomes another user first: both would be
trouble in a process that holds a model. Standard input: a program as a line of JSON each. Standard output: a line
of JSON that says whether there can be boxes, then one for each program. The end of standard input ends it, in the
midst of a program too.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from common.errors import UserError
from scoring.sandbox import bubblewrap, child, processes, seccomp, user
from scoring.sandbox.messages import Outcome, Settings

OUTPUT_BYTES = 64 << 10
"""What is kept of a program's output: the end."""

START_SECONDS = 30.0
"""How long a box may take to be there."""


class BoxError(Exception):
    """The program was not run at all."""


@dataclass
class _Seen:
    """What came out of a box."""

    report: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)
    started: float | None = None
    """When the program began, in seconds of the monotonic clock."""
    timed_out: bool = False

    def take(self, part: bytes, is_report: bool) -> None:
        """Add what was read."""
        if not is_report:
            self.output = (self.output + part)[-OUTPUT_BYTES:]
            return
        self.report += part
        if self.started is None and self.report.startswith(child.BEGUN):
            self.started = time.monotonic()


class Runner:
    """Runs programs in boxes."""

    def __init__(self, settings: Settings):
        self._timeout = settings.timeout
        for group in settings.groups:  # boxes are born in them: to move each would take longer than to run it
            Path(group).write_text(str(os.getpid()))
        self._child = Path(__file__).with_name("child.py").read_text(encoding="utf-8")
        self._filter = None
        processes.adopt_orphans()
        if settings.binary is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="palmtop-bare-")  # removed when this process ends
            self._folder = self._own_folder.name
            self._command = [settings.interpreter.executable, *bubblewrap.PYTHON_OPTIONS]
            self._environment = bubblewrap.ENVIRONMENT | {"HOME": self._folder}
            return
        self._folder, self._environment = "/", {}
        self._filter = seccomp.filter_file()
        self._command = bubblewrap.command(settings.binary, settings.interpreter, self._filter)
        if os.geteuid() == 0:
            user.become_unused_user(bubblewrap.needed_folders(settings.binary, settings.interpreter))

    def run(self, program: str) -> Outcome:
        """Run one program; BoxError when its box could not be had."""
        secret = os.urandom(child.SECRET_BYTES)
        source = program.encode("utf-8", "surrogatepass")
        reports, report = os.pipe()
        try:
            process = self._start(report, len(source))
        finally:
            os.close(report)
        seen = _Seen()
        try:
            _send(process, source, secret)
            self._watch(process, reports, seen, len(child.BEGUN) + len(secret))
        finally:
            seconds = time.monotonic() - seen.started if seen.started is not None else 0.0
            _end(process, seen)
            os.close(reports)
        return _outcome(seen, secret, seconds, process.returncode, self._timeout)

    def _start(self, report: int, length: int) -> "subprocess.Popen[bytes]":
        passed_on = [report]
        if self._filter is not None:
            os.lseek(self._filter, 0, os.SEEK_SET)
            passed_on.append(self._filter)
        return subprocess.Popen(
            [*self._command, "-c", self._child, str(report), str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._folder,
            env=self._environment,
            pass_fds=passed_on,
            start_new_session=True,
        )

    def _watch(self, process: "subprocess.Popen[bytes]", reports: int, seen: _Seen, expected: int) -> None:
        """Read until the report is complete or can no longer come."""
        assert process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            for source in (reports, process.stdout, sys.stdin):
                selector.register(source, selectors.EVENT_READ)
            while len(seen.report) < expected:
                left = deadline - time.monotonic()
                if left <= 0:
                    seen.timed_out = True
                    return
                for key, _ in selector.select(left):
                    if key.fileobj is sys.stdin:
                        sys.exit("whoever asked is gone")  # nothing else comes before the answer
                    had_started = seen.started is not None
                    part = os.read(key.fd, OUTPUT_BYTES)
                    seen.take(part, key.fd == reports)
                    if seen.started is not None and not had_started:
                        deadline = seen.started + self._timeout
                    if not part and key.fd == reports:
                        with suppress(subprocess.TimeoutExpired):  # for the exit status
                            process.wait(0.5)
                        return
                    if not part:
                        selector.unregister(key.fileobj)


def _send(process: "subprocess.Popen[bytes]", source: bytes, secret: bytes) -> None:
    """Hand over the program, then the secret.

    The secret is a write of its own: one that short is whole in the pipe or not at all, and read by one call.
    """
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin as pipe:
        pipe.write(source)
        pipe.flush()
        pipe.write(secret)


def _end(process: "subprocess.Popen[bytes]", seen: _Seen) -> None:
    """Kill all that the program started, and take what it had written."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    processes.end_orphans()
    assert process.stdout is not None
    with process.stdout as output:
        os.set_blocking(output.fileno(), False)
        while part := output.read(OUTPUT_BYTES):
            seen.take(part, is_report=False)


def _outcome(seen: _Seen, secret: bytes, seconds: float, status: int, timeout: float) -> Outcome:
    lines = seen.output.decode(errors="replace").strip().splitlines()
    last = lines[-1][:200] if lines else f"exit status {status}"
    if seen.started is None:
        raise BoxError("it took too long to start" if seen.timed_out else last)
    if bytes(seen.report) == child.BEGUN + secret:
        return Outcome(True, "passed", seconds)
    if seen.timed_out:
        return Outcome(False, f"not done after {timeout:g} s", seconds)
    if len(seen.report) > len(child.BEGUN):
        return Outcome(False, "wrote where the verdict is reported", seconds)
    if status == 1:  # what an uncaught exception gives
        return Outcome(False, f"failed: {last}", seconds)
    return Outcome(False, f"ended before its tests did, with exit status {status}", seconds)


def _say(answer: dict[str, Any], stream: IO[str]) -> None:
    print(json.dumps(answer), file=stream, flush=True)


def main() -> None:
    """Answer until standard input ends."""
    try:
        runner = Runner(Settings.loads(sys.argv[1]))
    except (UserError, OSError) as error:
        _say({"error": str(error)}, sys.stdout)
        return
    _say({}, sys.stdout)
    for line in iter(sys.stdin.readline, ""):
        try:
            _say(asdict(runner.run(json.loads(line))), sys.stdout)
        except (BoxError, OSError) as error:
            _say({"error": str(error)}, sys.stdout)


if __name__ == "__main__":
    main()
