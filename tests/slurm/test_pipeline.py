"""The recipe of the 125m, cut to a tiny budget, on a real SLURM: jobs that wait for each other."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_command
from tests.slurm.cluster import Cluster, missing

SMALLER = """
tokenizer.data=sample tokenizer.vocab=512
pretrain.size=tiny pretrain.data=sample pretrain.model.vocab=512 pretrain.tokens=2048 pretrain.batch-tokens=512
pretrain.seq-len=64 pretrain.eval.every=0 pretrain.loader.streams=8 pretrain.device=cpu pretrain.log.tensorboard=false
sft.data=sample sft.tokens=4096 sft.batch-tokens=2048 sft.seq-len=256 sft.eval.every=0 sft.device=cpu
sft.log.tensorboard=false
score.suite=sample score.only=chid score.limit=1 score.max-out-len=4 score.speed=false
export.target=host
bench.threads=[1] bench.torch=false bench.prompts=[16] bench.new-tokens=8 bench.repeats=1
slurm=cpus=1,time=30
""".split()
"""The same stages, less of each."""

STAGES = ("tokenizer", "pretrain", "sft", "score", "export", "bench", "report", "bundle")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipe has been carried out once."""
    folder = tmp_path_factory.mktemp("site")
    assert set(carry_out(cluster, folder)) == set(STAGES)
    return folder


def carry_out(cluster: Cluster, folder: Path, *changes: str) -> list[str]:
    """Submit the recipe and wait for its jobs; returns the stages that were begun, in the order of their start."""
    began = time.time()
    recipe = ROOT / "recipes" / "125m.yaml"
    done = run_command(
        *("-m", "pipeline", recipe, *SMALLER, *changes, "--slurm"),
        environment=cluster.environment | {"PYTHONPATH": str(ROOT)},
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    records = folder / "runs" / "125m" / "pipeline"
    jobs = json.loads((records / "jobs.json").read_text())
    end = time.monotonic() + 500
    while cluster.ask("squeue", "--noheader", f"--jobs={','.join(jobs.values())}").strip():
        assert time.monotonic() < end, cluster.ask("squeue") + done.stdout
        time.sleep(1)
    states = {name: cluster.job(number).get("JobState") for name, number in jobs.items()}
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(records.glob("*.log")))
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{logs}"
    starts = {name: json.loads((records / f"{name}.json").read_text())["began"] for name in STAGES}
    return [name for name in sorted(starts, key=lambda name: starts[name]) if starts[name] > began]


def test_stages_run_as_jobs_one_after_the_other(site: Path) -> None:
    run = site / "runs" / "125m"
    assert (run / "sft" / "model" / "model.safetensors").exists()
    assert (run / "sft" / "report.html").exists()
    assert (run / "bundle" / "CHECKLIST.md").exists()


def test_other_settings_of_a_stage_run_it_and_what_follows_and_nothing_before(site: Path, cluster: Cluster) -> None:
    tokens = (site / "runs" / "125m" / "pretrain" / "metrics.jsonl").read_text()
    again = carry_out(cluster, site, "bench.new-tokens=9")
    assert again[0] == "bench"
    assert set(again) == {"bench", "report", "bundle"}
    assert (site / "runs" / "125m" / "pretrain" / "metrics.jsonl").read_text() == tokens
