"""Who starts the ranks, and what becomes of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from tests.conftest import ROOT, run_command
from train.launch import Place, find_place, first_host, translate_slurm

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
}


def test_each_launcher_is_known_by_its_variables() -> None:
    assert find_place(None, None, {}) == Place("alone", 0, 0, 1, 1)
    assert find_place(8, None, {}) == Place("alone", 0, 0, 8, 1)
    assert find_place(None, None, TORCHRUN) == Place("torchrun", 5, 1, 4, 2)
    assert find_place(4, 2, SRUN) == Place("slurm", 5, 1, 4, 2)
    shell = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert find_place(8, None, shell) == Place("alone", 0, 0, 8, 1)
    assert find_place(None, None, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).launcher == "alone"


@pytest.mark.parametrize(
    ("devices", "nodes", "environment", "says"),
    [
        (2, None, TORCHRUN, "--devices 2 is asked for, but torchrun started 4"),
        (None, 4, SRUN, "--nodes 4 is asked for, but slurm started 2"),
        (8, 4, {}, "needs a launcher on every node"),
        (None, None, SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,3"}, "every node needs as many"),
    ],
)
def test_contradictions_are_refused(devices, nodes, environment, says) -> None:
    with pytest.raises(UserError, match=says):
        find_place(devices, nodes, environment)


def test_slurms_variables_are_translated() -> None:
    environment = dict(SRUN)
    translate_slurm(find_place(None, None, environment), environment)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert environment["MASTER_PORT"] == str(29_400 + 4567)
    assert {name: environment[name] for name in TORCHRUN} == TORCHRUN
    assert environment["GROUP_RANK"] == "1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[07-09,12],big1", "gpu07"), ("a,b", "a"), ("a-b-[3]", "a-b-3")],
)
def test_the_first_host_of_slurms_short_form(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


WORDS = """--batch-tokens 512 --seq-len 32 --device cpu --precision 32 --eval.every 0 --log.every 1 --log.tensorboard
false --loader.streams 8 --devices 2""".split()


def start(run: Path, corpus: Path, model: Path, *words: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "train.py", *WORDS, "--run", str(run), "--data", str(corpus), "--init", str(model), *words]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(run: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (run / "metrics.jsonl").exists() and '"loss"' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no step was made: {process.communicate()}")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of a launcher's ranks, in order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks[int(next(v for v in variables if v.startswith(b"RANK=")).removeprefix(b"RANK="))] = child
    return [ranks[rank] for rank in sorted(ranks)]


def test_a_plain_start_stops_on_a_signal_and_goes_on(corpus, micro_model, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(run, corpus, micro_model, "--tokens", "5M")
    wait_for_steps(run, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM after step" in out
    state = json.loads(max((run / "checkpoints").glob("step-*")).joinpath("state.json").read_text())
    assert state["loader"]["rows"] == state["step"] * 16
    assert len(state["loader"]["positions"]) == 8  # of both ranks
    assert not (run / "model").exists()
    assert f"python train.py consolidate {run}" in out


def test_torchrun_starts_the_ranks(corpus, micro_model, tmp_path) -> None:
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--", "train.py")
    run = ("--run", tmp_path / "run", "--data", corpus, "--init", micro_model, "--tokens", "1024")
    done = run_command(*ranks, *WORDS[:-2], *run)
    assert done.returncode == 0, done.stderr
    assert "2 × CPU" in done.stdout
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-0000002" / "state.json").read_text())
    assert len(state["loader"]["positions"]) == 8  # of both ranks


def test_a_dead_rank_ends_the_others(corpus, micro_model, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(run, corpus, micro_model, "--tokens", "5M")
    wait_for_steps(run, process)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 128 + signal.SIGKILL
    lines = [line for line in err.splitlines() if line.startswith(("error", "rank"))]
    assert lines[0] == "error: rank 1 was killed by SIGKILL"
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_ranks_die_with_their_launcher(corpus, micro_model, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(run, corpus, micro_model, "--tokens", "5M")
    wait_for_steps(run, process)
    ranks = ranks_of(process)
    process.kill()
    process.communicate(timeout=30)
    end = time.monotonic() + 10
    while time.monotonic() < end and any(Path(f"/proc/{rank}").exists() for rank in ranks):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_an_error_of_every_rank_is_said_once(corpus, micro_model, tmp_path) -> None:
    process = start(tmp_path / "run", corpus, micro_model, "--tokens", "5M", "--devices", "3", "--batch-tokens", "768")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    said = [line for line in err.splitlines() if "streams cannot be shared evenly" in line]
    assert len(said) == 1
    assert "Traceback" not in err


FAILING = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from common.errors import UserError
from train.launch import Place
from train.rank import _end

def rank(number, folder, kind):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{folder}", rank=number, world_size=2)
    try:
        if number == 1:
            raise UserError("the shard is gone") if kind == "user" else ValueError("boom")
        dist.all_reduce(torch.zeros(1))
    except BaseException as error:
        _end(error, Place("torchrun", number, number, 2, 1))

if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1], sys.argv[2]), nprocs=2, join=False).join(timeout=60, grace_period=30)
"""


@pytest.mark.parametrize(("kind", "first"), [("bug", "rank 1 failed:"), ("user", "error: the shard is gone")])
def test_the_failing_ranks_error_comes_first(kind: str, first: str, tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(script), str(port), kind]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    lines = [line for line in done.stderr.splitlines() if line.startswith(("rank", "error", "ValueError"))]
    assert lines[0] == first
    reason = "ValueError: boom" if kind == "bug" else "UserError: the shard is gone"
    assert lines[-1] == f"rank 0 ends, for it lost contact: rank 1: {reason}"
