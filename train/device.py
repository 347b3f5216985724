"""What to run on: the device, its precision, and how many rows it takes at once."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from common.errors import UserError
from models import budget
from models.sizes import ModelConfig
from train.settings import TrainSettings


def choose_precision(settings: TrainSettings) -> Any:
    """32 or bf16: bf16 where the device has instructions for it, for elsewhere it is slower than fp32."""
    if settings.precision != "auto":
        return settings.precision
    if choose_device(settings).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "32"


def choose_device(settings: TrainSettings) -> torch.device:
    """The device that ``--device`` asks for; UserError when it is not there."""
    available = torch.cuda.device_count()
    name = settings.device if settings.device != "auto" else ("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device; use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= available:
        raise UserError(f"--device {name} is not there: torch sees {available} CUDA devices")
    return device


def device_name(device: torch.device) -> str:
    """What the header calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def make_fabric(settings: TrainSettings) -> Fabric:
    """Fabric for one device, in resolved precision."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose another sum
        torch.use_deterministic_algorithms(True)
    device = choose_device(settings)
    return Fabric(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
    )


def fitting_rows(config: ModelConfig, rows: int, seq_len: int, device: torch.device) -> int:
    """The most rows a forward pass that divide the batch and fit the device.

    On a CPU more than about 4,096 tokens gain nothing and leave the caches; on a GPU the activations may
    take 70% of what weights, gradients and moments leave.
    """
    divisors = [count for count in range(1, rows + 1) if rows % count == 0]
    if device.type == "cuda":
        room = 0.7 * (torch.cuda.get_device_properties(device).total_memory - budget.training_bytes(config))
        fitting = [n for n in divisors if budget.activation_bytes(config, n, seq_len, 2) <= room]
    else:
        fitting = [n for n in divisors if n * seq_len <= 4096]
    return max(fitting, default=1)
