"""What a model costs: parameters, FLOPs, bytes in training and on a phone.

Pure arithmetic: imports nothing heavy, so that a plan is printed in well under a second. Which of these
bytes stand on a device under which strategy is for train/plan.py to say.

In formulas: L layers, D model width, H query heads, K key/value heads, N head width, F feed-forward width,
V vocabulary, T tokens in a row, M tokens in a forward pass, P parameters, b bytes of a value (2 in bf16).
"""

import math
from dataclasses import dataclass

from models.gpus import peak_flops as peak_flops
from models.sizes import ModelConfig

HEAD_CHUNK = {"cpu": 512, "cuda": 4096}
"""Tokens whose logits exist at one time, as in models/transformer.py (a test holds them equal)."""

PHONE_MEMORY = 12e9
"""The phone that the sizes are meant for."""
PHONE_BANDWIDTH = 50e9
"""Bytes a second that a phone's decoder reads: an assumption. Public 16-bit figures imply 45 to 55 GB/s: Llama-3.2-1B
at 19.2 tokens/s in ExecuTorch on a OnePlus 12 (Meta's model card), Qwen3-1.7B at 13.6 in llama.cpp's OpenCL."""
OPENCL_GATE = int(0.85 * 5 * 2**30)
"""Most bytes that MLC-LLM's engine takes on OpenCL: 0.85 (its default gpu_memory_utilization) · max(5 GiB, memory
reported) (TotalDetectGlobalMemory in cpp/serve/config.cc). 12 GB phones report 4.4 to 4.8 GB, so 5 GiB counts."""


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


def recomputed_flops(config: ModelConfig, seq_len: int, checkpointing: str) -> int:
    """FLOPs a token that checkpointing adds, which MFU does not count.

    Forward again through the feed-forward halves, 2·3·L·D·F (selective), or through the blocks, 2·(their
    parameters) + 4·L·H·N·T (full).
    """
    if checkpointing == "selective":
        return 6 * config.layers * config.width * config.ffn
    if checkpointing == "full":
        attention = 4 * config.layers * config.heads * config.head_width * seq_len
        return 2 * parameters(config).layers + attention
    return 0


@dataclass(frozen=True)
class State:
    """Bytes that one device holds from step to step."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter tensor of models/transformer.py; a tied head is the embedding."""
    wide = (config.heads + 2 * config.kv_heads) * config.head_width
    block: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (config.width,),
        "attention.qkv.weight": (wide, config.width),
        "attention.out.weight": (config.width, config.heads * config.head_width),
        "ffn_norm.weight": (config.width,),
        "ffn.gate_up.weight": (2 * config.ffn, config.width),
        "ffn.down.weight": (config.width, config.ffn),
    }
    if config.qk_norm:
        block |= dict.fromkeys(("attention.q_norm.weight", "attention.k_norm.weight"), (config.head_width,))
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab, config.width)}
    for layer in range(config.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes["norm.weight"] = (config.width,)
    if not config.tied:
        shapes["head.weight"] = (config.vocab, config.width)
    return shapes


def adapter_parameters(config: ModelConfig, rank: int) -> int:
    """Parameters of adapters beside every matrix of the blocks: rank · (rows + columns) each.

    Of our own models, whose matrices are fused; a foreign one has somewhat more.
    """
    shapes = parameter_shapes(config).items()
    return sum(rank * sum(shape) for name, shape in shapes if name.startswith("blocks.") and len(shape) == 2)


def state_bytes(config: ModelConfig, optimizer: str = "adamw", *, shards: int = 1, rank: int = 0) -> State:
    """Exact bytes of fp32 weights, gradients and optimiser on one device.

    Per parameter tensor: 4 a weight and 4 a gradient; AdamW two moments and a step counter, 4 + 4 a weight
    and 4 for the tensor; Muon one momentum, 4 a weight and no counter, for the matrices of the blocks,
    and AdamW for the others. 16·P in all, and a little.

    Args:
        config: the shape.
        optimizer: adamw or muon.
        shards: devices that share each tensor by its rows (FSDP2); 1: every device holds all (DDP).
        rank: which of them; the first holds the most, ceil(rows / shards) of every tensor.
    """
    weights, moments = 0, 0
    for name, shape in parameter_shapes(config).items():
        count = _rows(shape[0], shards, rank) * math.prod(shape[1:])
        by_muon = optimizer == "muon" and name.startswith("blocks.") and len(shape) == 2
        weights += 4 * count
        moments += 4 * count if by_muon else 8 * count + 4
    return State(weights, weights, moments)


def _rows(rows: int, shards: int, rank: int) -> int:
    """Rows of chunk ``rank`` when ``rows`` are cut as torch.chunk does."""
    chunk = -(-rows // shards)
    return max(0, min(chunk, rows - rank * chunk))


def attention_values(config: ModelConfig, bytes_per_value: int, *, compiled: bool) -> int:
    """Bytes a token that the attention half of a block keeps for the backward pass.

    Compiled: b·(3·D + (3·H + 3·K)·N) + 4·(1 + H), and with QK-norm 4·(H + K): input and output of the norm, the
    product of the projections (the values are a part of it), the turned queries and keys, attention's
    output and log-sum-exp, the product that is added to the residual stream, and the norms' factors in
    fp32. Eager keeps that last product not, and of each norm, instead of its input, the input in fp32 and
    the input times its factor, 8 a value: 8·D in place of 2·b·D, and 8·(H + K)·N more for QK-norm (4 in fp32).
    (On a CPU in bf16 there is no log-sum-exp: it is computed again.)
    """
    heads = config.heads + config.kv_heads
    qkv = bytes_per_value * (heads + config.kv_heads) * config.head_width
    attention = bytes_per_value * (heads + config.heads) * config.head_width + 4 * config.heads
    if compiled:
        norms = 4 + (4 * heads if config.qk_norm else 0)
        return 3 * bytes_per_value * config.width + norms + qkv + attention
    # In fp32 the queries and keys that QK-norm takes are the product itself, not a copy.
    copies = 1 if bytes_per_value == 4 else 2
    norms = 4 + (4 * heads * (copies * config.head_width + 1) if config.qk_norm else 0)
    return (8 + bytes_per_value) * config.width + norms + qkv + attention


def ffn_values(config: ModelConfig, bytes_per_value: int, *, compiled: bool) -> int:
    """Bytes a token that the feed-forward half of a block keeps for the backward pass.

    Compiled: b·(D + 3·F) + 4: output of the norm, gate and up, their product, the norm's factor. Eager: also
    silu(gate), b·F, and 8·D for the norm as in :func:`attention_values`.
    """
    if compiled:
        return bytes_per_value * (config.width + 3 * config.ffn) + 4
    return bytes_per_value * (config.width + 4 * config.ffn) + 8 * config.width + 4


def activation_bytes(
    config: ModelConfig,
    rows: int,
    seq_len: int,
    bytes_per_value: int,
    *,
    checkpointing: str = "none",
    compiled: bool = False,
) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the head and its loss.

    M·(L·block + b·N + 8·D + 12) for M = rows·T tokens: the blocks, the rotary table, the last norm and the tokens'
    ids. A block is its attention and its feed-forward half; ``selective`` checkpointing keeps of the latter
    at most its input, b·D, ``full`` of the whole block only its input, b·D.

    Eager is exact on a CPU: tests hold it to the storages that autograd keeps. On CUDA eager keeps less, as
    the norms are single kernels there. Compiled is exact on a CPU too (bench/memory.py); which values a
    compiled graph keeps is decided by the same partitioner for all devices, and attention on CUDA keeps its
    output and log-sum-exp as here, never the T·T scores. On an H200 the peak was within 0.2% of the plan (docs/log.md).

    Args:
        config: the shape.
        rows: rows in a forward pass.
        seq_len: tokens in a row, T.
        bytes_per_value: 4 in fp32, 2 in bf16.
        checkpointing: none, selective or full.
        compiled: the blocks are compiled.
    """
    stream = bytes_per_value * config.width
    attention = attention_values(config, bytes_per_value, compiled=compiled)
    ffn = ffn_values(config, bytes_per_value, compiled=compiled)
    between = 0 if compiled else stream  # compiled it is made again from the block's input and the product kept
    block = {"none": attention + ffn, "selective": attention + between, "full": stream}[checkpointing]
    ends = bytes_per_value * config.head_width + 8 * config.width + 4 + 8
    return rows * seq_len * (config.layers * block + ends)


def backward_bytes(
    config: ModelConfig, tokens: int, bytes_per_value: int, *, checkpointing: str = "none", compiled: bool = False
) -> int:
    """Bytes that the backward pass of one block needs beside what is kept, roughly.

    M·b·(3·F + 2·D), the gradients within the feed-forward half and along the residual stream, and with
    checkpointing what is computed again: the feed-forward half, or the whole block.
    """
    gradients = bytes_per_value * (3 * config.ffn + 2 * config.width)
    ffn = ffn_values(config, bytes_per_value, compiled=compiled)
    block = attention_values(config, bytes_per_value, compiled=compiled) + ffn
    return tokens * (gradients + {"none": 0, "selective": ffn, "full": block}[checkpointing])


def head_kept_bytes(config: ModelConfig, tokens: int, bytes_per_value: int) -> int:
    """Bytes that the head keeps from its forward to its backward pass: d_hidden b·M·D and fp32 d_weight 4·V·D."""
    return bytes_per_value * tokens * config.width + 4 * config.vocab * config.width


def head_bytes(config: ModelConfig, tokens: int, bytes_per_value: int, *, chunk: int, compiled: bool = False) -> int:
    """Most bytes that the head and the cross-entropy hold at one time.

    What they keep (:func:`head_kept_bytes`) and the larger of two: in the forward pass one chunk of C tokens, C·V
    logits and their gradient, b + b bytes each when compiled, eager in bf16 with fp32 temporaries as well (8), in fp32
    in one place (4), and in bf16 the head's weight and the product that is added to d_weight, 2 + 2 bytes each (on
    a CPU a piece of the latter); in the backward pass the scaled d_weight and d_hidden.
    """
    matrix = config.vocab * config.width
    a_logit = logit_bytes(bytes_per_value, compiled=compiled)
    forward = min(tokens, chunk) * config.vocab * a_logit + (4 * matrix if bytes_per_value == 2 else 0)
    kept = head_kept_bytes(config, tokens, bytes_per_value)
    return kept + max(forward, kept)


def logit_bytes(bytes_per_value: int, *, compiled: bool) -> int:
    """Bytes that a logit takes while the loss of its chunk is computed, see :func:`head_bytes`."""
    return 2 * bytes_per_value if compiled else {2: 8, 4: 4}[bytes_per_value]


def kv_cache_bytes(config: ModelConfig, context: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of one sequence: 2·L·K·N·context values."""
    return 2 * config.layers * config.kv_heads * config.head_width * context * bytes_per_value


def phone_bytes(config: ModelConfig, context: int) -> int:
    """Bytes on a phone: fp16 weights and the fp16 KV cache at ``context`` tokens."""
    return 2 * parameters(config).total + kv_cache_bytes(config, context)


def weight_read_bytes(config: ModelConfig) -> int:
    """fp16 bytes of weights that decoding a token reads: all but an input embedding of its own, 2·(P - V·D)."""
    counted = parameters(config)
    return 2 * (counted.layers + config.vocab * config.width)


def decode_ceiling(config: ModelConfig, context: int, bandwidth: float = PHONE_BANDWIDTH) -> float:
    """Tokens a second that memory allows: bandwidth / (weights read + KV cache at ``context`` tokens)."""
    return bandwidth / (weight_read_bytes(config) + kv_cache_bytes(config, context))


def default_tokens(config: ModelConfig) -> int:
    """20 training tokens a parameter (Hoffmann et al., arXiv:2203.15556)."""
    return 20 * parameters(config).total
