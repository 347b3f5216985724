"""The plan: against what two real processes hold, its choices, what it prints and how fast."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from bench.memory import Trial, measure_cpu
from common.distributed import Job
from common.errors import UserError
from common.settings import parse
from models import budget
from models.gpus import cpu, gpu
from models.sizes import SIZES, ModelConfig, size
from models.transformer import Transformer, initial_weight
from tests.conftest import ROOT
from train.device import make_fabric
from train.engine import engine_for
from train.launch import Place
from train.optimizer import make_optimizers
from train.plan import Machine, Workload, best, memory, warn_if_too_big, ways, workload_of
from train.plan_table import describe, machine_of
from train.settings import OptimizerSettings, TrainCommand, TrainSettings, model_config, resolve

# Against two processes

UNEVEN = ModelConfig(
    layers=2, width=201, heads=6, kv_heads=3, head_width=14, ffn=77, vocab=1001, context=32, tied=False, qk_norm=True
)
"""Hardly a dimension is even, so two ranks hold unequal parts."""

SHAPES = {"tiny": size("tiny").config, "15m": size("15m").config, "uneven": UNEVEN}
CASES = [(name, "adamw", how) for name in SHAPES for how in ("ddp", "fsdp")]
CASES += [("uneven", "muon", how) for how in ("ddp", "fsdp")]


def test_two_processes_hold_what_the_plan_says(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        held = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, optimizer, how in CASES:
            shards = {"shards": 2, "rank": rank} if how == "fsdp" else {}
            planned = budget.state_bytes(SHAPES[name], optimizer, **shards)
            assert held[f"{name} {optimizer} {how}"] == vars(planned), (rank, name, optimizer, how)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = Place("torchrun", rank, rank, 2, 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    held = {f"{name} {optimizer} {how}": _held(SHAPES[name], optimizer, how, place) for name, optimizer, how in CASES}
    Path(folder, f"{rank}.json").write_text(json.dumps(held))
    dist.destroy_process_group()


def _held(config: ModelConfig, optimizer: str, how: str, place: Place) -> dict[str, int]:
    """Bytes of this rank's weights, gradients and optimiser after a step."""
    fabric = make_fabric(TrainSettings(device="cpu", precision="32"), place, how)
    engine = engine_for(fabric)(
        fabric,
        Job.of_all(),
        build=lambda: Transformer(config, seed=None),
        values=lambda name, shape: initial_weight(name, shape, config, seed=0),
        make_optimizers=lambda raw: make_optimizers(raw, OptimizerSettings(name=optimizer, lr=1e-3, beta2=0.95), "32"),
        spike=0.0,
    )
    tokens = torch.arange(8).view(1, 8)
    with engine.micro_step(last=True):
        loss, nll = engine.model(tokens, None, tokens)
        engine.backward(loss)
    gradients = _bytes([parameter.grad for parameter in engine.raw.parameters()])
    engine.update(1e-3, 1.0, nll)
    state = [value for part in engine.optimizers for values in part.state.values() for value in values.values()]
    return {"weights": _bytes(list(engine.raw.parameters())), "gradients": gradients, "optimizer": _bytes(state)}


def _bytes(tensors: list[Any]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def test_the_peak_of_a_step_is_what_the_plan_says() -> None:
    config = replace(size("tiny").config, layers=2, vocab=2048)
    job = Workload(config, Machine(cpu(0)), rows=2 * 8, seq_len=128, precision="32", optimizer="adamw")
    trial = Trial(job, "none", rows=8)
    assert trial.plan().total == pytest.approx(measure_cpu(trial), rel=0.03)


# What it chooses

H100, RTX = gpu("h100-80g"), gpu("rtx-4090")


def ask(name: str, machine: Machine, **changes: Any) -> Workload:
    usual: dict[str, Any] = {"rows": 512, "seq_len": 2048, "precision": "bf16", "optimizer": "adamw"}
    return Workload(size(name).config, machine, **(usual | changes))


def test_a_model_that_a_device_holds_is_replicated() -> None:
    fit = best(ask("125m", Machine(H100, 8)))
    assert (fit.strategy, fit.checkpointing, fit.micro_rows, fit.fits) == ("ddp", "none", 32, True)
    assert best(ask("1b", Machine(H100, 1))).strategy == "ddp"


def test_a_model_that_a_device_does_not_hold_is_sharded() -> None:
    assert best(ask("3b", Machine(RTX, 8))).strategy == "fsdp"
    assert best(ask("3b", Machine(RTX, 8, 2))).strategy == "hsdp"
    assert best(ask("3b", Machine(RTX, 2, 8))).strategy == "fsdp"  # two of a node are too few
    assert best(ask("3b", Machine(RTX, 1, 16))).strategy == "fsdp"


def test_a_device_that_holds_the_model_with_recomputation_still_replicates_it() -> None:
    fit = best(ask("1b", Machine(RTX, 8)))
    assert (fit.strategy, fit.checkpointing) == ("ddp", "selective")


def test_what_fits_nowhere_is_the_nearest_and_warned_of() -> None:
    fit = best(ask("3b", Machine(RTX, 1)))
    assert (fit.fits, fit.strategy, fit.checkpointing, fit.micro_rows) == (False, "ddp", "full", 1)
    warning = warn_if_too_big(fit)
    assert warning is not None
    assert re.search(r"the plan needs \d+\.\d+ GB on a device and 23\.21 GB can be used, under ddp", warning)
    assert warn_if_too_big(best(ask("125m", Machine(RTX, 1)))) is None


def test_what_is_asked_for_is_taken() -> None:
    fit = best(ask("125m", Machine(H100, 8), strategy="deepspeed-3", checkpointing="full", micro_rows=4))
    assert (fit.strategy, fit.checkpointing, fit.micro_rows) == ("deepspeed-3", "full", 4)
    assert best(ask("125m", Machine(H100, 8), strategy="fsdp")).strategy == "fsdp"


def test_each_strategy_is_answered_once() -> None:
    names = [fit.strategy for fit in ways(ask("1b", Machine(H100, 8, 2)))]
    assert names == ["ddp", "hsdp", "fsdp", "deepspeed-2", "deepspeed-3", "deepspeed-3-offload"]
    assert [fit.strategy for fit in ways(ask("1b", Machine(H100)))] == ["ddp", "deepspeed-3-offload"]


def test_muons_step_needs_room_but_not_under_deepspeed_which_has_adamw() -> None:
    for fit, adamw in zip(
        ways(ask("1b", Machine(H100, 8), optimizer="muon")), ways(ask("1b", Machine(H100, 8))), strict=True
    ):
        state, other = fit.memory.optimizer, adamw.memory.optimizer
        assert state == other if fit.strategy.startswith("deepspeed") else state < 0.7 * other


def test_a_cpu_takes_few_tokens_at_a_time() -> None:
    fit = best(ask("tiny", Machine(cpu(16 * 10**9), 2), precision="32", seq_len=256))
    assert (fit.strategy, fit.micro_rows) == ("ddp", 16)


def test_batches_that_cannot_be_shared_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="512 rows of 2048, which 6 devices cannot share .* 1044480 or 1056768"):
        best(ask("125m", Machine(H100, 6)))
    with pytest.raises(UserError, match="or --batch-tokens 16384$"):
        best(ask("125m", Machine(H100, 8), rows=3))
    with pytest.raises(UserError, match="--micro-batch 3 does not divide the 64 rows of each device; use 2"):
        best(ask("125m", Machine(H100, 8), micro_rows=3))


shapes = st.sampled_from(sorted(SIZES))
strategies = st.sampled_from(["ddp", "fsdp", "hsdp", "deepspeed-2", "deepspeed-3", "deepspeed-3-offload"])
modes = st.sampled_from(["none", "selective", "full"])


@given(shapes, strategies, modes, st.integers(1, 16), st.sampled_from(["32", "bf16"]), st.booleans())
def test_more_rows_layers_or_tokens_never_need_less(
    name: str, strategy: str, checkpointing: str, rows: int, precision: str, compiled: bool
) -> None:
    job = Workload(size(name).config, Machine(H100, 8, 2), 64, 1024, precision, "adamw", compiled=compiled)
    needed = memory(job, strategy, checkpointing, rows).total
    assert memory(job, strategy, checkpointing, rows + 1).total > needed
    assert memory(replace(job, seq_len=1025), strategy, checkpointing, rows).total > needed
    deeper = replace(job, config=replace(job.config, layers=job.config.layers + 1))
    assert memory(deeper, strategy, checkpointing, rows).total > needed
    wider = replace(job, machine=Machine(H100, 16, 2))
    assert memory(wider, strategy, checkpointing, rows).total <= needed


# What it prints


def read(*words: str) -> TrainCommand:
    return parse(TrainCommand, ("--plan", *words), prog="train.py", description="")


def figures(*words: str) -> dict[str, str]:
    """The plan's figures by section and name."""
    command = read(*words)
    config = model_config(command)
    machine, why = machine_of(command)
    sections = describe(resolve(command, config), config, machine, price=command.price, why=why)
    assert all(row.formula for section in sections for row in section.rows if section.title != "Time and cost")
    return {f"{section.title}/{row.name}": row.value for section in sections for row in section.rows}


def test_the_figures_of_the_1b() -> None:
    plan = figures("--size", "1b", "--devices", "8", "--gpu", "h100-80g", "--price", "2.5")
    assert plan["Model/parameters"] == "1,048,394,752"
    # 6·(964,508,672 + 32,768·1,280) + 12·54·20·64·2,048
    assert plan["Training run/FLOPs per token"] == "7.74 G"
    assert plan["Training run/steps"] == "19,997"
    assert plan["Chosen/strategy"] == "ddp"
    # 20.97e9 tokens · 7.737 GFLOP / (8 · 989 TFLOP/s · 0.4) = 51,264 s
    assert plan["Time and cost/MFU"] == "40% of 989 TFLOP/s dense bf16, ASSUMED, not measured"
    assert plan["Time and cost/GPU-hours"] == "113.9"
    assert plan["Time and cost/cost"] == "$284.79 at $2.5 a GPU-hour"
    assert plan["Training run/optimiser"] == "muon, rate 0.0017"  # 0.2 / 1,280^(2/3)
    # 4·1,048,394,752 of weights, 4·964,508,672 of the blocks' moments, 8·83,886,080 of embedding's and head's
    assert plan["Checkpoint/a checkpoint"] == "8.72 GB"
    assert plan["On the phone/fits 12 GB"].startswith("yes")
    assert plan["On the phone/MLC's OpenCL gate"].startswith("passes")


def test_the_3b_fits_a_phone_but_not_opencl() -> None:
    plan = figures("--size", "3b", "--gpu", "h100-80g")
    assert plan["On the phone/fits 12 GB"].startswith("yes")
    assert plan["On the phone/MLC's OpenCL gate"].startswith("DOES NOT PASS, 6.01 GB of 4.56 GB")


def test_recomputation_costs_time() -> None:
    words = ["--size", "125m", "--gpu", "a100-40g", "--activation-checkpointing"]
    hours = [float(figures(*words, mode)["Time and cost/GPU-hours"]) for mode in ("none", "selective", "full")]
    assert hours[0] < hours[1] < hours[2] < 1.34 * hours[0]


def test_a_cpu_has_no_time_estimate() -> None:
    plan = figures("--size", "tiny", "--device", "cpu", "--devices", "2")
    assert plan["Time and cost/speed"] == "not estimated: no peak of cpu is known"


def test_settings_become_a_job() -> None:
    command = read("--size", "tiny", "--compile", "off", "--strategy", "fsdp", "--micro-batch", "2")
    config = model_config(command)
    job = workload_of(resolve(command, config), config, Machine(H100, 2))
    assert (job.precision, job.strategy, job.micro_rows, job.is_compiled) == ("bf16", "fsdp", 2, False)
    assert replace(job, compiled=None).is_compiled
    assert not replace(job, compiled=None, machine=Machine(cpu(10**9))).is_compiled


COMMAND = """
import sys
from train.__main__ import main
sys.argv = ["train.py", *sys.argv[1:]]
main()
print("torch" in sys.modules, "lightning" in sys.modules)
"""


def test_it_prints_without_torch() -> None:
    words = "--size 1b --plan --devices 8 --nodes 4 --gpu h100-80g --price 2.5 --explain".split()
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    *page, last = done.stdout.splitlines()
    assert last == "False False"
    titles = [line for line in page if line and not line.startswith(" ")]
    assert [title.partition(" in GB")[0] for title in titles] == [
        "Model",
        "Training run",
        "Memory per device",
        "Chosen",
        "Time and cost",
        "Checkpoint",
        "On the phone",
    ]
    assert max(map(len, page)) <= 120
    assert not any(line.endswith("…") for line in page)


def test_an_unknown_gpu_is_one_message() -> None:
    words = ["train.py", "--size", "1b", "--plan", "--gpu", "h100"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no GPU is called 'h100'; the GPUs are h100-")
    assert "Traceback" not in done.stderr
