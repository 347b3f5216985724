"""Jobs on a real SLURM: two nodes, signals, a time limit that strikes, a rank that dies.

The jobs run two at a time on threads, each with the story of what happens to it; the tests look at what came of
them. Most of a job's time is Python's imports and SLURM's waiting.
"""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, run_command
from tests.slurm.cluster import Cluster, missing, until

STEPS = 60
RUN = f"""
--tokens {STEPS * 256} --batch-tokens 256 --seq-len 32 --device cpu --precision 32 --strategy ddp
--micro-batch 1 --checkpoint.every 25 --eval.every 0 --log.every 5 --log.tensorboard false --loader.streams 8
""".split()
UNDER_WAY = ("PENDING", "RUNNING", "SIGNALING", "COMPLETING", "REQUEUED")


@dataclass
class Job:
    """A submitted run."""

    cluster: Cluster
    number: str
    run: Path
    said: str = ""
    """What submitting it printed."""
    seconds: float = 0
    """How long something took."""

    def __getitem__(self, key: str) -> str:
        """What SLURM says of it."""
        return self.cluster.job(self.number)[key]

    @property
    def log(self) -> str:
        path = Path(self["StdOut"])
        return path.read_text() if path.exists() else ""

    def losses(self) -> dict[int, float]:
        """Step to loss."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half written
        return {record["step"]: record["loss"] for record in records if "loss" in record}

    def wait(self, condition: Callable[[], object]) -> None:
        until(condition, 150, lambda: f"{self.cluster.job(self.number)}\n{self.log[-3000:]}")

    def wait_for_steps(self) -> None:
        """Wait until it has taken more steps than now."""
        goal = len(self.losses()) + 4
        self.wait(lambda: len(self.losses()) >= goal)

    def wait_for_restart(self, number: int) -> None:
        self.wait(lambda: int(self["Restarts"]) >= number)

    def set_limit(self, minutes: int) -> None:
        """Change the time limit; SLURM refuses while the job ends or starts."""

        def changed() -> bool:
            self.cluster.ask("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")
            return self["TimeLimit"] == f"00:{minutes:02}:00"

        self.wait(changed)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the ranks until SIGUSR1 has come to them, however fast the machine is."""
        ranks = self.cluster.ranks(self.number).values()
        for rank in ranks:
            rank.suspend()
        yield
        self.wait(lambda: all(has_been_told(rank) for rank in ranks))
        for rank in ranks:
            rank.resume()

    def wait_for_end(self) -> str:
        self.wait(lambda: self["JobState"] not in UNDER_WAY)
        return self["JobState"]


def has_been_told(rank: psutil.Process) -> bool:
    """Whether SIGUSR1 waits for a held process, or has let it go: after some signals SLURM sends SIGCONT."""
    status = Path(f"/proc/{rank.pid}/status").read_text()
    waiting = re.search(r"^ShdPnd:\s*(\w+)", status, re.M)
    assert waiting is not None
    return bool(int(waiting[1], 16) >> (signal.SIGUSR1 - 1) & 1) or rank.status() != psutil.STATUS_STOPPED


@dataclass
class Site:
    """A cluster, and what to train on it."""

    cluster: Cluster
    words: list[str]
    folder: Path

    def submit(self, name: str, request: str, **environment: str) -> Job:
        """Submit with ``--slurm``, from a folder that is not the checkout."""
        done = run_command(
            *(ROOT / "train.py", *RUN, *self.words, "--run", name, "--slurm", request),
            environment=self.cluster.environment | environment,
            folder=self.folder,
        )
        assert done.returncode == 0, done.stderr
        return Job(self.cluster, done.stdout.split()[1].rstrip(":"), self.folder / "runs" / name, done.stdout)


def uninterrupted(site: Site) -> Job:
    job = site.submit("whole", "nodes=2,gpus=1,cpus=1,time=10")
    job.wait_for_end()
    return job


def signalled(site: Site) -> Job:
    """SIGUSR1 before Python is there, and in the middle; on a cluster that takes its time to requeue."""
    slow = site.folder / "slow"
    slow.mkdir()
    (slow / "scontrol").write_text(f'#!/bin/sh\nsleep 2\nexec {shutil.which("scontrol")} "$@"\n')
    (slow / "scontrol").chmod(0o755)
    job = site.submit("signalled", "nodes=2,gpus=0,tasks=1,cpus=1,time=10", PATH=f"{slow}:{os.environ['PATH']}")
    job.wait(lambda: len(site.cluster.ranks(job.number)) == 2)
    site.cluster.ask("scancel", "--signal=USR1", job.number)
    job.wait_for_restart(1)
    job.wait_for_steps()
    with job.held():
        site.cluster.ask("scancel", "--signal=USR1", job.number)
    job.wait_for_restart(2)
    job.wait_for_end()
    return job


def limited(site: Site) -> Job:
    """A time limit that strikes twice.

    SLURM looks at limits every 30 seconds, and the shortest is a minute. So that a strike does not come before
    the first step on a slow machine, again and again, the limit is far away until there are steps.
    """
    job = site.submit("limited", "nodes=2,gpus=0,tasks=1,cpus=1,time=10,signal=90")
    for strike in (1, 2):
        job.wait_for_steps()
        with job.held():
            job.set_limit(int(job["RunTime"].split(":")[1]) + 2)
        job.wait_for_restart(strike)
        job.set_limit(10)
    job.wait_for_end()
    return job


def bereft(site: Site) -> Job:
    """One of two ranks is killed; submitted by hand with the script as it stands."""
    run = site.folder / "bereft"
    words = [*RUN, "--run", str(run), *(str((site.folder / word).resolve()) for word in site.words[1::2])]
    words[-2:] = ["--data", words[-2], "--init", words[-1]]
    options = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --time=10 --parsable".split()
    output = f"--output={site.folder}/by-hand-%j.log"
    environment = {"PYTHON": sys.executable}
    number = site.cluster.ask(
        *("sbatch", *options, output, f"--chdir={ROOT}", "slurm/train.sbatch", *words), **environment
    ).strip()
    job = Job(site.cluster, number, run)
    job.wait_for_steps()
    site.cluster.ranks(number)[1].kill()
    began = time.monotonic()
    job.wait_for_end()
    job.seconds = time.monotonic() - began
    return job


def cancelled(site: Site) -> Job:
    job = site.submit("cancelled", "nodes=2,gpus=0,tasks=1,cpus=1,time=10")
    job.wait_for_steps()
    site.cluster.ask("scancel", job.number)
    job.wait_for_end()
    return job


@pytest.fixture(scope="module")
def site(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site")
    # As a user would write them: from where the job is submitted.
    words = ["--data", os.path.relpath(corpus, folder), "--init", os.path.relpath(micro_model, folder)]
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield Site(cluster, words, folder)


@pytest.fixture(scope="module")
def jobs(site: Site) -> Iterator[dict[str, Future[Job]]]:
    """Every job by the name of its story, under way or done."""
    stories = (limited, signalled, uninterrupted, bereft, cancelled)  # the longest first
    with ThreadPoolExecutor(2) as threads:
        yield {story.__name__: threads.submit(story, site) for story in stories}
        threads.shutdown(cancel_futures=True)


def test_a_job_on_two_nodes_trains(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["uninterrupted"].result()
    assert job["JobState"] == "COMPLETED", job.log
    assert (job["NumNodes"], job["NumTasks"], job["Restarts"]) == ("2", "2", "0")
    assert list(job.losses()) == list(range(1, STEPS + 1))
    assert "devices          2 × CPU" in job.log
    assert (job.run / "model" / "model.safetensors").exists()
    assert json.loads((job.run / "env.json").read_text())["git"] == (job.run / "code" / "COMMIT").read_text().strip()
    assert f"tail -F runs/whole/slurm-{job.number}.log" in job.said


def test_sigusr1_saves_and_queues_again(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["signalled"].result()
    assert job["JobState"] == "COMPLETED", job.log
    assert job["Restarts"] == "2"
    assert "stopped by SIGUSR1 after step 0;" in job.log
    assert job.log.count(f"job {job.number} is in the queue again") == 2
    assert job.losses() == jobs["uninterrupted"].result().losses()


def test_a_time_limit_that_strikes_again_and_again_changes_nothing(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["limited"].result()
    assert job["JobState"] == "COMPLETED", job.log
    assert job["Restarts"] == "2"
    stops = [int(step) for step in re.findall(r"stopped by SIGUSR1 after step (\d+)", job.log)]
    assert len(stops) == 2
    assert 0 < stops[0] < stops[1] < STEPS
    assert job.losses() == jobs["uninterrupted"].result().losses()


def test_a_dead_rank_ends_the_job_at_once_and_is_named_first(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["bereft"].result()
    assert job["JobState"] == "FAILED"
    assert job.seconds < 60
    first = re.search(r".*(error|lost contact|Traceback).*", job.log)
    assert first is not None
    assert first[0] == "srun: error: 127.0.0.2: task 1: Killed"
    assert "rank 0 ends, for it lost contact" in job.log


def test_scancel_saves_and_ends(jobs: dict[str, Future[Job]]) -> None:
    job = jobs["cancelled"].result()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("CANCELLED", "143:0", "0")
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", job.log)
    assert stopped is not None
    assert (job.run / "checkpoints" / f"step-{int(stopped[1]):07d}" / "state.json").exists()


def test_only_what_srun_starts_is_a_rank(site: Site, tmp_path: Path) -> None:
    code = (
        "import os; from train.launch import join; place = join(None, None); "
        "print(place.launcher, place.rank, place.local_rank, place.devices, place.nodes, os.environ.get('MASTER_ADDR'))"
    )
    python = shlex.join([sys.executable, "-c", code])
    script = tmp_path / "places.sbatch"
    script.write_text(f"#!/bin/sh\n{python}\nsrun --label {python} | sort\n")

    def places(*options: str) -> list[str]:
        output = tmp_path / "places.txt"
        site.cluster.ask("sbatch", "--wait", f"--chdir={ROOT}", f"--output={output}", *options, str(script))
        return output.read_text().splitlines()

    assert places("--ntasks=2", "--nodes=1") == [
        "alone 0 0 1 1 None",
        "0: slurm 0 0 2 1 127.0.0.1",
        "1: slurm 1 1 2 1 127.0.0.1",
    ]
    assert places("--nodes=2", "--ntasks-per-node=2") == [
        "alone 0 0 1 1 None",
        "0: slurm 0 0 2 2 127.0.0.1",
        "1: slurm 1 1 2 2 127.0.0.1",
        "2: slurm 2 0 2 2 127.0.0.1",
        "3: slurm 3 1 2 2 127.0.0.1",
    ]
