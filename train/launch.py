"""How a training job comes to have its processes: torchrun's, SLURM's srun's, or our own children.

Imports nothing heavy: where this command starts the ranks itself, the parent only watches them. Every rank
finds itself in the environment variables that torchrun sets; SLURM's are translated into them.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from common import signals
from common.errors import UserError

GRACE_SECONDS = 15.0
"""How long the other ranks may take to say what happened to them after one has failed."""

PORT = 29_400
"""Lowest port that ranks under SLURM meet at; a job adds its number, so that two jobs on a node differ."""

ENVIRONMENT = {
    # When a collective times out, write which one it was and which ranks had reached it.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # A rank that loses the others says so in a line; torch's warnings would bury it under pages of C++ frames.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # The sizes of activations vary; segments that grow fragment less, so the memory plan holds.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""For NCCL, its reports, and the allocator."""

PARENT = "PALMTOP_PARENT"
"""Environment variable with the process id of the parent that watches a rank."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


@dataclass(frozen=True)
class Place:
    """Where this process stands in its job."""

    launcher: str
    """``alone``, ``torchrun`` or ``slurm``."""
    rank: int
    local_rank: int
    devices: int
    """Processes on a node."""
    nodes: int

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes

    @property
    def node(self) -> int:
        """Which of the nodes this is."""
        return self.rank // self.devices


def prepare_environment() -> None:
    """Set :data:`ENVIRONMENT`, before torch is imported, which reads it; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        if not (name == "PYTORCH_ALLOC_CONF" and "PYTORCH_CUDA_ALLOC_CONF" in os.environ):  # its older name
            os.environ.setdefault(name, value)


def join(devices: int | None, nodes: int | None) -> Place:
    """This process's place in its job; what ``torch.distributed`` needs to know stands in the environment after it.

    Where several devices of this machine are asked for and nobody has started a process for each, they are
    started here, and this one ends with them.
    """
    place = find_place(devices, nodes, os.environ)
    if place.launcher == "alone" and place.world_size > 1:
        sys.exit(run_ranks(place.devices))
    if place.launcher == "slurm":
        translate_slurm(place, os.environ)
    return place


def find_place(devices: int | None, nodes: int | None, environment: Mapping[str, str]) -> Place:
    """Read from the environment who started this process, and as which rank.

    Args:
        devices: what ``--devices`` asks for, processes on a node.
        nodes: what ``--nodes`` asks for.
        environment: usually ``os.environ``.

    Raises:
        UserError: flags and launcher disagree, or several nodes are asked for without one.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= environment.keys():
        world, local = int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_WORLD_SIZE", 1))
        place = Place("torchrun", int(environment["RANK"]), int(environment["LOCAL_RANK"]), local, world // local)
    elif _is_srun(environment) and not _is_shell(environment, devices):
        local = _tasks_per_node(environment)
        rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
        place = Place("slurm", rank, local_rank, local, int(environment["SLURM_STEP_NUM_TASKS"]) // local)
    else:
        place = Place("alone", 0, 0, devices or 1, nodes or 1)
        if place.nodes > 1:
            raise UserError(
                f"--nodes {nodes} needs a launcher on every node: srun, torchrun, or --slurm nodes={nodes},gpus=8 "
                "to submit a SLURM job"
            )
        return place
    for flag, asked, given in (("devices", devices, place.devices), ("nodes", nodes, place.nodes)):
        if asked is not None and asked != given:
            raise UserError(
                f"--{flag} {asked} is asked for, but {place.launcher} started {given} "
                f"({place.nodes} nodes × {place.devices} processes); leave --{flag} out"
            )
    return place


def _is_srun(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: it sets both variables, sbatch's script has the second alone."""
    return {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"} <= environment.keys()


def _is_shell(environment: Mapping[str, str], devices: int | None) -> bool:
    """Whether the one task of srun is a shell (``srun --pty bash``) in which ranks are yet to be started."""
    return environment["SLURM_STEP_NUM_TASKS"] == "1" and (devices or 1) > 1


def _tasks_per_node(environment: Mapping[str, str]) -> int:
    """The same number on every node, from SLURM's ``2(x4)``."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
    counts = {int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", text)}
    if len(counts) > 1:
        raise UserError(f"SLURM gave the nodes {text} tasks; every node needs as many: use --ntasks-per-node")
    return counts.pop()


def translate_slurm(place: Place, environment: MutableMapping[str, str]) -> None:
    """Set the variables that torchrun would set, from SLURM's."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    job = int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(PORT + job % 10_000))
    environment.update(_rank_variables(place))


def first_host(nodes: str) -> str:
    """The first host in SLURM's short form: ``gpu[07-09,12],big1`` is gpu07."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes.strip())
    if match is None:
        raise UserError(f"SLURM's list of nodes {nodes!r} cannot be read; set MASTER_ADDR to the first one's name")
    return match[1] + (match[2] or "")


def _rank_variables(place: Place) -> dict[str, str]:
    return {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_WORLD_SIZE": str(place.devices),
        "GROUP_RANK": str(place.node),
    }


def run_ranks(devices: int) -> int:
    """Start this command once for each device of this machine and watch over them.

    SIGTERM and SIGUSR1 are passed on (Ctrl-C reaches every process of a terminal by itself). When a rank
    fails, the others get :data:`GRACE_SECONDS` to end and are then killed: a job with a dead rank would
    otherwise wait for it for ever.

    Returns:
        The exit code: 0, that of the first rank that failed, or 128 + the signal that stopped them all.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = max(1, cores_here() // devices)
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            with suppress(ProcessLookupError):
                rank.send_signal(number)

    # Blocked while the ranks start: they inherit that, and a signal waits for their handlers.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for local in range(devices):
        place = Place("torchrun", local, local, devices, 1)
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | _rank_variables(place)
        environment.setdefault("OMP_NUM_THREADS", str(threads))  # ranks share the machine's cores
        environment[PARENT] = str(os.getpid())
        ranks.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment))
    early = signals.received()
    if early is not None:
        forward(early, None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPPING)
    return _watch(ranks)


def end_with_parent() -> None:
    """Die when the watching parent does, however it does (Linux): orphaned ranks would hold the GPUs."""
    if PARENT in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ[PARENT]):  # it died before the line above
            sys.exit(1)


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for the ranks to end; kills those that outlive a failed one by too long."""
    failed: subprocess.Popen[bytes] | None = None
    end = 0.0
    while [rank for rank in ranks if rank.poll() is None]:  # asks every one: any() would stop at the first
        if failed is None:
            failed = next((rank for rank in ranks if _has_failed(rank)), None)
            end = time.monotonic() + GRACE_SECONDS
            if failed is not None and failed.returncode < 0:
                name = signal.Signals(-failed.returncode).name
                print(f"error: rank {ranks.index(failed)} was killed by {name}", file=sys.stderr, flush=True)
        elif time.monotonic() > end:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    # Where all ended between two looks, 1 may be that of a rank that only lost the others.
    telling = sorted(ranks, key=lambda rank: rank.returncode in (0, 1))
    code = next((rank.returncode for rank in [failed, *telling] if rank is not None and rank.returncode), 0)
    return code if code >= 0 else 128 - code


def _has_failed(rank: subprocess.Popen[bytes]) -> bool:
    """Whether a rank has ended, and not because it was done or asked to stop."""
    stopped = [128 + number for number in signals.STOPPING]
    return rank.returncode is not None and rank.returncode not in (0, *stopped)


def cores_here() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
