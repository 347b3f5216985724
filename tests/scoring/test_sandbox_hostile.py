"""Hostile programs, started by root and by a user: each contained and failed, the host as it was."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scoring.sandbox import Outcome, available, run_programs
from tests.conftest import ROOT
from tests.scoring.sandbox_hostile import FORGERIES, PROGRAMS

pytestmark = pytest.mark.skipif(available() is not None, reason="needs user namespaces and bubblewrap")

STARTERS = ["root", "user"] if os.geteuid() == 0 else ["user"]
TIMEOUT = 1.5


@dataclass
class Battle:
    """What became of the programs, and of the host."""

    outcomes: dict[str, Outcome]
    after: Outcome
    """Of an honest program that came last."""
    connections: int
    canary: str


@pytest.fixture(scope="module", params=STARTERS)
def battle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Battle]:
    canary = Path("/var/tmp", f"palmtop-canary-{os.getpid()}")
    canary.write_text("untouched")
    canary.chmod(0o666)
    connections: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET_VARIABLE", "1")
        threading.Thread(target=_accept, args=(server, connections), daemon=True).start()
        words = {"CANARY": str(canary), "PORT": str(server.getsockname()[1])}
        programs = [*PROGRAMS.values(), "assert True"]
        for word, value in words.items():
            programs = [program.replace(word, value) for program in programs]
        *outcomes, after = _run(programs, as_root=request.param == "root")
        server.shutdown(socket.SHUT_RDWR)
    yield Battle(dict(zip(PROGRAMS, outcomes, strict=True)), after, len(connections), canary.read_text())
    canary.unlink()


def _accept(server: socket.socket, connections: list[object]) -> None:
    try:
        while True:
            connections.append(server.accept())
    except OSError:
        return


def _run(programs: list[str], as_root: bool) -> list[Outcome]:
    if as_root or os.geteuid() != 0:
        return run_programs(programs, timeout=TIMEOUT)
    words = [sys.executable, "-m", "tests.scoring.sandbox_as_user"]
    request = json.dumps({"programs": programs, "timeout": TIMEOUT})
    done = subprocess.run(words, cwd=ROOT, input=request, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [Outcome(**values) for values in json.loads(done.stdout)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_is_contained_and_failed(battle: Battle, name: str) -> None:
    outcome = battle.outcomes[name]
    assert not outcome.passed, outcome
    assert outcome.seconds < TIMEOUT + 1
    assert not outcome.reason.startswith("its watcher"), outcome


def test_the_host_is_as_it_was(battle: Battle) -> None:
    assert battle.canary == "untouched"
    assert battle.connections == 0
    assert battle.after.passed
    assert not list(Path("/").glob("palmtop-was-here")) + list(Path("/usr").glob("palmtop-was-here"))
    # Those of this process: other tests may have boxes at this moment, too.
    assert not list(Path("/sys/fs/cgroup").glob(f"**/palmtop-sandbox-{os.getpid()}-*"))


def test_nothing_is_left_running(battle: Battle) -> None:
    left, until = boxed(), time.monotonic() + 60
    while left and time.monotonic() < until:  # those of tests beside this one go by themselves
        time.sleep(0.2)
        left &= boxed()
    assert not left


def boxed() -> set[Path]:
    """Processes that came out of a box, in /proc: all have child.py's text, unless they became another."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "refuse_to_look" in line:
            found.add(process)
    return found


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_fails_for_what_it_did(battle: Battle, name: str) -> None:
    """And not, say, because it has a mistake in it."""
    reason = battle.outcomes[name].reason
    assert not any(mistake in reason for mistake in ("SyntaxError", "NameError", "TypeError", "AttributeError")), reason
