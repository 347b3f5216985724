"""The frequencies of rotary position embeddings, as transformers has them. Imports numpy alone."""

import math
from typing import Any

import numpy as np

from common.errors import UserError
from export.positions import Rotary


def frequencies(rotary: Rotary, head_width: int) -> tuple[float, ...]:
    """Radians a position by which each pair of numbers of a head is turned, in fp32.

    Raises:
        UserError: the frequencies are scaled in another way than Llama 3's.
    """
    turned = int(head_width * rotary.partial)
    exponents = np.arange(0, turned, 2, dtype=np.int64).astype(np.float32) / np.float32(turned)
    plain = (np.float32(1) / np.float32(rotary.theta) ** exponents).astype(np.float32)
    if rotary.scaling is None:
        return tuple(map(float, plain))
    if rotary.scaling["rope_type"] != "llama3":
        kind = rotary.scaling["rope_type"]
        raise UserError(f"the model's rotary frequencies are scaled by {kind}; the export takes llama3 or none")
    return tuple(map(float, _llama3(plain, rotary.scaling)))


def _llama3(plain: np.ndarray[Any, Any], scaling: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Frequencies whose waves are longer than the old context divided by a factor, with a gradual change before."""
    factor, old = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi / plain
    smooth = (old / waves - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    found = np.where(waves > old / low, plain / factor, np.where(waves < old / high, plain, between))
    return found.astype(np.float32)
