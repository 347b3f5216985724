"""What to run on: the device, its precision, and how the job is spread over devices."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from models import gpus
from models.sizes import ModelConfig
from train.engine import shard
from train.fabric import DDPStrategy, Fabric, LightningEnvironment, ModelParallelStrategy, TorchElasticEnvironment
from train.launch import Place
from train.plan import Fit, Machine, best, workload_of
from train.settings import RunSettings

STEP_TIMEOUT = timedelta(minutes=20)
"""The longest that ranks wait for each other within a step. Compiling takes minutes and not equally many on
every node; a rank that hangs for longer is lost, and the job had better end and be started again."""


def choose_precision(settings: RunSettings, place: Place) -> Any:
    """32 or bf16: bf16 where the device has instructions for it, for elsewhere it is slower than fp32."""
    if settings.precision != "auto":
        return settings.precision
    if choose_device(settings, place).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "32"


def choose_device(settings: RunSettings, place: Place) -> torch.device:
    """This rank's device: the one that ``--device`` asks for; UserError when it is not there."""
    available = torch.cuda.device_count()
    name = settings.device if settings.device != "auto" else ("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cpu":
        return device
    if (device.index or 0) >= available:
        raise UserError(f"--device {name} is not there: torch sees {available} CUDA devices")
    if place.world_size == 1:
        return torch.device("cuda", device.index or 0)
    if place.devices > available:
        hint = "; with SLURM ask for --gpus-per-node, not --gpus-per-task" if place.launcher == "slurm" else ""
        raise UserError(f"{place.devices} processes a node need as many GPUs; torch sees {available}{hint}")
    return torch.device("cuda", place.local_rank)


def device_name(device: torch.device) -> str:
    """What the header calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def choose_fit(
    settings: RunSettings,
    config: ModelConfig,
    place: Place,
    device: torch.device,
    *,
    trainable: int | None = None,
    taken: int = 0,
) -> Fit:
    """How to spread the run and how many rows to take at once: as asked for, the rest by the plan.

    ``trainable`` is the number of parameters that are trained, where it is not all of them; ``taken`` the bytes of
    each device that are not the run's to use.

    Raises:
        UserError: the ranks cannot share the batch.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = gpus.here(properties.name, properties.total_memory)
    else:
        gpu = gpus.cpu_here(place.devices)
    workload = workload_of(settings, config, Machine(gpu, place.devices, place.nodes))
    return best(replace(workload, compiled=compiles(settings, device), trainable=trainable, taken=taken))


def compiles(settings: RunSettings, device: torch.device) -> bool:
    """Whether the model is compiled; not under ZeRO-3, whose hooks on every layer would break the blocks' graphs."""
    if settings.strategy.startswith("deepspeed-3"):
        return False
    return settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")


def make_fabric(settings: RunSettings, place: Place, strategy: str) -> Fabric:
    """Fabric for this rank, launched: the ranks have met.

    Args:
        settings: with resolved precision.
        place: of this process in its job.
        strategy: anything but auto.
    """
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another sum
        torch.use_deterministic_algorithms(True)
    device = choose_device(settings, place)
    cuda = device.type == "cuda"
    fabric = Fabric(
        accelerator=device.type,
        devices=[device.index] if cuda and place.world_size == 1 else place.devices,
        num_nodes=place.nodes,
        strategy=_fabric_strategy(settings, place, strategy, cuda),
        # Under FSDP2 the sharding itself computes in bf16 (train.engine.shard); elsewhere autocast does.
        precision="bf16-mixed" if settings.precision == "bf16" and strategy not in ("fsdp", "hsdp") else "32-true",
        plugins=[LightningEnvironment() if place.launcher == "alone" else TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric


def _fabric_strategy(settings: RunSettings, place: Place, strategy: str, cuda: bool) -> Any:
    common: dict[str, Any] = {"process_group_backend": "nccl" if cuda else "gloo", "timeout": STEP_TIMEOUT}
    if strategy.startswith("deepspeed"):
        from train.deepspeed import make_strategy

        return make_strategy(settings, strategy, cuda, common)
    if strategy == "fsdp":
        everywhere = shard(settings.precision, hybrid=False)
        return ModelParallelStrategy(everywhere, place.world_size, 1, **common)
    if strategy == "hsdp":
        in_a_node = shard(settings.precision, hybrid=True)
        return ModelParallelStrategy(in_a_node, place.nodes, place.devices, **common)
    if place.world_size == 1:
        return "auto"
    return DDPStrategy(gradient_as_bucket_view=True, **common)
