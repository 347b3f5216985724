"""What a model costs: parameters, FLOPs, bytes in training and on a phone.

Pure arithmetic: imports nothing heavy, so that a plan is printed in well under a second.
"""

import re
from dataclasses import dataclass

from models.sizes import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by where they stand."""

    embedding: int
    """The input embedding, V·D."""
    head: int
    """The output matrix V·D; 0 when it is tied to the embedding."""
    layers: int
    """All blocks and the last norm."""

    @property
    def total(self) -> int:
        """Parameters that are stored: a tied matrix counts once."""
        return self.embedding + self.head + self.layers


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a model.

    A block holds the projections D·(H + 2K)·N and H·N·D, the SwiGLU 3·D·F, two norms of D and, with
    QK-norm, two of N.
    """
    attention = config.width * (config.heads + 2 * config.kv_heads) * config.head_width
    attention += config.heads * config.head_width * config.width
    norms = 2 * config.width + (2 * config.head_width if config.qk_norm else 0)
    block = attention + 3 * config.width * config.ffn + norms
    matrix = config.vocab * config.width
    return Parameters(matrix, 0 if config.tied else matrix, config.layers * block + config.width)


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """FLOPs that training spends on a token, forward and backward, for MFU.

    6·(parameters without the input embedding, a tied head counted) + 12·L·H·N·T: two FLOPs a
    multiply-add, the backward pass twice the forward; attention is counted over the full row of T
    tokens, one document a row and no saving for causality (the convention of PaLM, arXiv:2204.02311,
    appendix B). With several documents in a row less attention is computed than is counted.
    """
    counted = parameters(config)
    matmul = counted.layers + config.vocab * config.width
    return 6 * matmul + 12 * config.layers * config.heads * config.head_width * seq_len


def training_bytes(config: ModelConfig) -> int:
    """Bytes of fp32 weights, gradients and AdamW's two moments: 16 a parameter."""
    return 16 * parameters(config).total


def activation_bytes(config: ModelConfig, rows: int, seq_len: int, bytes_per_value: int) -> int:
    """Rough bytes of the activations that a forward pass keeps for the backward pass.

    Per token and layer: the inputs of the norms and of the four matrix products, queries, keys,
    values, attention's output, and three tensors of the feed-forward width; plus one chunk of logits
    in fp32 (the head never holds more). A planning figure: compilers keep less.
    """
    tokens = rows * seq_len
    per_layer = 6 * config.width + 3 * config.ffn + 2 * (config.heads + 2 * config.kv_heads) * config.head_width
    return tokens * (config.layers * per_layer + 4 * config.width) * bytes_per_value + 2**12 * config.vocab * 4


def kv_cache_bytes(config: ModelConfig, context: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of one sequence: 2·L·K·N·context values."""
    return 2 * config.layers * config.kv_heads * config.head_width * context * bytes_per_value


def phone_bytes(config: ModelConfig, context: int) -> int:
    """Bytes on a phone: fp16 weights and the fp16 KV cache at ``context`` tokens."""
    return 2 * parameters(config).total + kv_cache_bytes(config, context)


def default_tokens(config: ModelConfig) -> int:
    """20 training tokens a parameter (Hoffmann et al., arXiv:2203.15556)."""
    return 20 * parameters(config).total


# Dense bf16 peaks in FLOP/s without sparsity, from the makers' datasheets: NVIDIA A100 (2020), H100
# (2022: SXM 989, PCIe 756, NVL 835 a card), H200 (SXM 989), B200 (2250), L4 (121), L40S (362),
# A10 (125), A40 (150), A6000 (155), RTX 3090 (71), RTX 4090 (165, fp32 accumulation). The first
# whose words are all in the device's name counts, so longer names stand first.
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "A10G": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s by its name, or None when it is not in the table."""
    words = re.split(r"[^A-Za-z0-9]+", device_name)
    return next((peak for name, peak in PEAK_BF16.items() if set(name.split()) <= set(words)), None)
