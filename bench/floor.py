"""The least that a training step could take, by what it does.

A matrix product takes its FLOPs over the rate of a large one, everything else its bytes over the rate of a large
copy, where each tensor is read and written once: as if all that lies between two products were one kernel.

L layers, D model width, H query heads, K key/value heads, N head width, F feed-forward width, V vocabulary,
T tokens in a row, M tokens in a step, P parameters, b bytes of an activation.
"""

from dataclasses import dataclass

import torch

from bench.train_step import Clock, measure_step
from models import budget
from models.sizes import ModelConfig
from train.muon import STEPS

ADAMW_BYTES = 28
"""Of a parameter in fp32: weight, gradient and two moments read, all but the gradient written."""
MUON_BYTES = 24
"""Weight, gradient, momentum and orthogonal matrix read, weight and momentum written."""
CLIP_BYTES = 12
"""The gradient read for the norm, read and written for the scale."""


@dataclass(frozen=True)
class Least:
    """What some part of a step cannot do without."""

    flops: float
    bytes: float

    def seconds(self, rate: float, bandwidth: float) -> float:
        """At so many FLOP/s of matrix products and bytes/s of copies; the slower of both counts."""
        return max(self.flops / rate, self.bytes / bandwidth)


def least(config: ModelConfig, tokens: int, seq_len: int, width: int, optimizer: str) -> dict[str, Least]:
    """The least of a step by the kinds of bench/profile_step.py.

    Args:
        config: the shape.
        tokens: M.
        seq_len: T, one document a row.
        width: b.
        optimizer: adamw or muon.
    """
    return {
        "matrix products": _products(config, tokens, width),
        "attention": _attention(config, tokens, seq_len, width),
        "loss": Least(0, 2 * tokens * config.vocab * width),  # logits read, their gradient written
        "norms, rotary, activations": Least(0, _elementwise(config) * tokens * width),
        "optimiser and clipping": _optimiser(config, optimizer),
    }


def _products(config: ModelConfig, tokens: int, width: int) -> Least:
    """Output, gradient of the input, gradient of the matrix; each reads two and writes the third."""
    matrices = [*_matrices(config), (1, config.vocab, config.width)]
    weights = sum(count * rows * columns for count, rows, columns in matrices)
    sides = sum(count * (rows + columns) for count, rows, columns in matrices)
    return Least(6 * tokens * weights, 3 * (weights + tokens * sides) * width)


def _attention(config: ModelConfig, tokens: int, seq_len: int, width: int) -> Least:
    """Half of the 12·L·H·N·T that MFU counts, for nothing is computed that a position may not see."""
    flops = 6 * config.layers * config.heads * config.head_width * seq_len
    # q, output, its gradient and q's: 2 forward, 4 backward; k and v: 2 forward, 4 backward
    elements = 6 * config.layers * (config.heads + config.kv_heads) * config.head_width
    return Least(flops * tokens, elements * tokens * width)


def _elementwise(config: ModelConfig) -> int:
    """Elements a token between the products.

    Forward and backward alike: two norms with the sum before them (4·D each), the rotary turn of queries and keys
    (2·(H + K)·N); SwiGLU 3·F forward and 5·F backward.
    """
    turned = (config.heads + config.kv_heads) * config.head_width
    return config.layers * (16 * config.width + 4 * turned + 8 * config.ffn)


def _optimiser(config: ModelConfig, optimizer: str) -> Least:
    """AdamW moves bytes alone; Muon's Newton–Schulz iteration takes 4·a²·b + 2·a³ FLOPs for a matrix a × b, a ≤ b."""
    total = budget.parameters(config).total
    if optimizer == "adamw":
        return Least(0, (ADAMW_BYTES + CLIP_BYTES) * total)
    hidden = sum(count * rows * columns for count, rows, columns in _matrices(config))
    flops = sum(count * _newton_schulz(rows, columns) for count, rows, columns in _parts(config))
    return Least(flops, MUON_BYTES * hidden + ADAMW_BYTES * (total - hidden) + CLIP_BYTES * total)


def _newton_schulz(rows: int, columns: int) -> int:
    short, long = sorted((rows, columns))
    return STEPS * (4 * short**2 * long + 2 * short**3)


def _matrices(config: ModelConfig) -> list[tuple[int, int, int]]:
    """Count, rows and columns of the matrices of the blocks, as they are multiplied with."""
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    return [
        (config.layers, queries + 2 * keys, config.width),
        (config.layers, config.width, queries),
        (config.layers, 2 * config.ffn, config.width),
        (config.layers, config.width, config.ffn),
    ]


def _parts(config: ModelConfig) -> list[tuple[int, int, int]]:
    """The same with fused matrices apart, as Muon takes them."""
    queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    return [
        (config.layers, queries, config.width),
        (2 * config.layers, keys, config.width),
        (config.layers, config.width, queries),
        (3 * config.layers, config.ffn, config.width),
    ]


def copy_rate(device: str, clock: Clock) -> float:
    """Bytes a second, read and written, of a large copy: the best of several."""
    numbers = torch.ones(2**26 if device == "cuda" else 2**24, device=device)
    copied = torch.empty_like(numbers)

    def copy() -> float:
        return copied.copy_(numbers)[0].item()

    copy()
    return 2 * numbers.nbytes / min(measure_step(copy, clock) for _ in range(5))
