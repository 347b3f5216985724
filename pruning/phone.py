"""What a model of any architecture takes on a phone, and the fastest it can decode there. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import budget
from models.hf_config import nearest_shape
from pruning.shapes import Shape, parameters, resized

WORKSPACE = 200_000_000
"""Bytes of temporary buffers for a prefill of 1,024 tokens, batch 1: an estimate."""


@dataclass(frozen=True)
class Phone:
    """A model in fp16 on a phone."""

    weights: int
    """Bytes, 2 a parameter."""
    cache: int
    """Bytes of keys and values."""
    context: int
    """Tokens in the cache."""
    decode_ceiling: float
    """Tokens a second that reading the weights and the cache allows at :data:`models.budget.PHONE_BANDWIDTH`."""

    @property
    def total(self) -> int:
        """Weights, cache and workspace."""
        return self.weights + self.cache + WORKSPACE

    @property
    def passes_gate(self) -> bool:
        """Whether MLC-LLM's engine takes it on OpenCL as it is shipped."""
        return self.total <= budget.OPENCL_GATE


def on_phone(values: dict[str, Any], shape: Shape, context: int) -> Phone:
    """The cost of the model of ``values`` cut to ``shape``, its cache holding ``context`` tokens."""
    weights = 2 * parameters(values, shape)
    cache = budget.kv_cache_bytes(nearest_shape(resized(values, shape), Path()), context)
    looked_up = 0 if values.get("tie_word_embeddings", False) else 2 * shape.vocab * values["hidden_size"]
    ceiling = budget.PHONE_BANDWIDTH / (weights - looked_up + cache)
    return Phone(weights, cache, context, ceiling)
