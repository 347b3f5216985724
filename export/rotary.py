"""The frequencies of rotary position embeddings, as transformers has them. Imports numpy alone."""

import math
from typing import Any

import numpy as np

from common.errors import UserError


def frequencies(values: dict[str, Any], head_width: int) -> tuple[float, ...]:
    """Radians a position by which each pair of numbers of a head is rotated, in fp32.

    Args:
        values: a ``config.json`` with its rotary settings at the top level.
        head_width: numbers of a head; ``partial_rotary_factor`` of them, rounded down, are rotated.

    Raises:
        UserError: the frequencies are scaled in another way than Llama 3's.
    """
    default = 0.5 if (values.get("architectures") or [""])[0] == "PhiForCausalLM" else 1.0
    rotary = int(head_width * (values.get("partial_rotary_factor") or default))
    exponents = np.arange(0, rotary, 2, dtype=np.int64).astype(np.float32) / np.float32(rotary)
    plain = (np.float32(1) / np.float32(values["rope_theta"]) ** exponents).astype(np.float32)
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return tuple(map(float, plain))
    if kind != "llama3":
        raise UserError(f"the model's rotary frequencies are scaled by {kind}; the export takes llama3 or none")
    return tuple(map(float, _llama3(plain, scaling)))


def _llama3(plain: "np.ndarray[Any, Any]", scaling: dict[str, Any]) -> "np.ndarray[Any, Any]":
    """Frequencies whose waves are longer than the old context divided by a factor, with a gradual change before."""
    factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi / plain
    smooth = (old / waves - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    found = np.where(waves > old / low, plain / factor, np.where(waves < old / high, plain, between))
    return found.astype(np.float32)
