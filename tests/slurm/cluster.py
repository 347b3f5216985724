"""A SLURM cluster for tests: the real daemons, two nodes on this machine, thrown away afterwards.

Nothing of it touches the machine: it has a munge key and socket, ports and folders of its own, and its nodes
are called 127.0.0.1 and 127.0.0.2, names that every Linux resolves to itself. Each node says that it has four
CPUs and two GPUs, whatever there is.
"""

import getpass
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

NODES = ("127.0.0.1", "127.0.0.2")
CPUS = 4

CONFIG = """
ClusterName=palmtop
FirstJobId={first}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""
"""``cred_expire``: a requeued job waits for so long; where nobody sets it, for 120 s. Ranks meet at a port by the job's
number, so that two clusters at once need different numbers."""


def missing() -> str | None:
    """What keeps a cluster from being started here, and how to put it right."""
    if shutil.which("slurmctld") is None or shutil.which("munged") is None:
        return "needs SLURM: apt-get install --no-install-recommends slurm-wlm munge"
    return None if os.geteuid() == 0 else "needs root, for slurmd starts other users' jobs: sudo make test"


class Cluster:
    """A running cluster; a context manager that leaves no process behind.

    Args:
        root: an empty folder with a short path, for there is a socket in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        root = self.root
        self._configure()
        files = {name: str(root / f"munge{name}") for name in (".key", ".socket", ".pid", ".log", ".seed")}
        self._daemon("munged", "--foreground", "--force", *(f"--{_MUNGE[n]}={path}" for n, path in files.items()))
        until(lambda: (root / "munge.socket").exists(), 10)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-c", "-N", node)
        until(lambda: self.ask("sinfo", "--noheader", "--states=idle", "--format=%D").strip() == str(len(NODES)), 30)

    def _configure(self) -> None:
        root, ports = self.root, free_ports(1 + len(NODES))
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} Gres=gpu:2 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        for folder in ("state", *(f"spool.{node}" for node in NODES)):
            (root / folder).mkdir()
        (root / "munge.key").write_bytes(os.urandom(1024))
        (root / "munge.key").chmod(0o600)
        first = random.randrange(1, 9_000)
        config = CONFIG.format(host=host, user=user, port=ports[0], root=root, nodes=nodes, first=first)
        (root / "slurm.conf").write_text(config)
        gpus = (f"NodeName=127.0.0.[1-2] Name=gpu File={device}\n" for device in ("/dev/null", "/dev/zero"))
        (root / "gres.conf").write_text("AutoDetect=off\n" + "".join(gpus))

    def _daemon(self, *words: str) -> None:
        environment = os.environ | self.environment
        with open(self.root / f"{words[0]}.out", "ab") as output:
            # In a session of its own: Ctrl-C in the tests' terminal must not reach it before stop() does.
            daemon = subprocess.Popen(
                words, cwd=self.root, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self._daemons.append(daemon)

    def stop(self) -> None:
        """Kill the daemons, the jobs and everything they have started."""
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        until(self._kill_all, 20)

    def _kill_all(self) -> bool:
        """Kill what is left; returns whether nothing was."""
        left = self._processes()
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return not left

    def _processes(self) -> list[psutil.Process]:
        """What works in this cluster's folder (the daemons' children) or has its configuration (the jobs)."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                here = process.cwd() == str(self.root)
                if here or process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
        return found

    def ask(self, *words: str, **environment: str) -> str:
        """What a command of SLURM's prints."""
        everything = os.environ | self.environment | environment
        return subprocess.run(words, env=everything, capture_output=True, text=True, timeout=60, check=False).stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        shown = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def ranks(self, number: str) -> dict[int, psutil.Process]:
        """The Python processes of a job's ranks."""
        found = {}
        for process in self._processes():
            with suppress(psutil.Error):
                environment = process.environ()
                mine = environment.get("SLURM_JOB_ID") == number and "SLURM_STEP_NUM_TASKS" in environment
                if mine and "train.py" in " ".join(process.cmdline()):
                    found.setdefault(int(environment["SLURM_PROCID"]), process)
        return found


_MUNGE = {".key": "key-file", ".socket": "socket", ".pid": "pid-file", ".log": "log-file", ".seed": "seed-file"}


def until(condition: Callable[[], object], seconds: float, what: Callable[[], object] = lambda: "") -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come to this in {seconds} s: {what()}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens at, below those that the system gives to clients."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports
