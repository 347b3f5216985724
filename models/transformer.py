"""The transformer, whole: settings in ``models/sizes.py``, everything else here.

Two faces outside: Llama, and with QK-norm Qwen3 (``models/hf.py``). Written for training speed: fused
projections, the head and its loss in chunks, attention that stays inside each document of a row.

Shapes: B batch, T sequence, D model width, H query heads, K key/value heads, N head width, F
feed-forward width, V vocabulary, M = B·T tokens.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Documents, attend, documents_of
from models.sizes import ModelConfig

IGNORE = -100
"""Target of a position that no loss is taken at."""

HEAD_CHUNK = {"cpu": 512, "cuda": 4096}
"""Tokens whose logits exist at one time: large enough for efficient matrix products, on a CPU small enough
that the passes over the logits find them in its caches."""

ADDED_VALUES = 2**20
"""Of a product in bf16 that is added to an fp32 sum on a CPU, at one time: what its caches hold, with the values
in fp32 that torch turns them into first."""

HeadLoss = Callable[[Tensor, nn.Linear, Tensor], Any]
"""Last hidden states (M, D), the head and targets (M) to a loss of one's own."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last axis (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # On CUDA autocast makes the result fp32; what reads it wants the residual stream's dtype.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads (GQA), rotary positions and optional QK-norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.kv_heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.heads * config.head_width, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_width, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        B, T, _ = x_BTD.shape
        qkv_BTHN = self.qkv(x_BTD).view(B, T, self.heads + 2 * self.kv_heads, self.head_width)
        q_BTHN, k_BTKN, v_BTKN = qkv_BTHN.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHN, k_BTKN = self.q_norm(q_BTHN), self.k_norm(k_BTKN)
        q_BTHN, k_BTKN = rotate(q_BTHN, *rotary), rotate(k_BTKN, *rotary)
        y_BHTN = attend(q_BTHN.transpose(1, 2), k_BTKN.transpose(1, 2), v_BTKN.transpose(1, 2), documents)
        return cast(Tensor, self.out(y_BHTN.transpose(1, 2).reshape(B, T, self.heads * self.head_width)))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)), gate and up in one product (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return cast(Tensor, self.down(F.silu(gate_BTF) * up_BTF))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    ``checkpointing`` trades time for memory (Chen et al., arXiv:1604.06174). ``selective`` recomputes the
    feed-forward half in the backward pass, which holds most of a block's activations and costs least a
    byte to compute again; ``full`` recomputes the whole block and keeps its input alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.checkpointing = "none"
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        if self.checkpointing == "full" and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._whole, x_BTD, rotary, documents, use_reentrant=False))
        return self._whole(x_BTD, rotary, documents)

    def compile_forward(self) -> None:
        """Compile what the block computes."""
        self._whole = torch.compile(self._whole, dynamic=False)  # type: ignore[method-assign]

    def _whole(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], documents: Documents) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotary, documents)
        if self.checkpointing == "selective" and torch.is_grad_enabled():
            return x_BTD + cast(Tensor, checkpoint(self._feed_forward, x_BTD, use_reentrant=False))
        return x_BTD + self._feed_forward(x_BTD)

    def _feed_forward(self, x_BTD: Tensor) -> Tensor:
        return cast(Tensor, self.ffn(self.ffn_norm(x_BTD)))


class Transformer(nn.Module):
    """A decoder-only language model of the given shape, with weights drawn by :func:`initialise`.

    Args:
        config: the shape.
        seed: of the weights; None leaves them to the caller, who shards the model before it has any.
    """

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._chunk_loss = chunk_loss
        if seed is not None:
            initialise(self, seed)

    @property
    def checkpointing(self) -> str:
        """What the backward pass recomputes, see :class:`Block`: none, selective or full."""
        return str(self.blocks[0].checkpointing)

    @checkpointing.setter
    def checkpointing(self, mode: str) -> None:
        for block in self.blocks:
            block.checkpointing = mode  # type: ignore[assignment]

    def fused_rows(self) -> dict[str, tuple[int, ...]]:
        """The fused matrices by name, each with the rows of the matrices that stand in it one below the other."""
        q, kv = self.config.heads * self.config.head_width, self.config.kv_heads * self.config.head_width
        rows: dict[str, tuple[int, ...]] = {}
        for layer in range(self.config.layers):
            rows[f"blocks.{layer}.attention.qkv.weight"] = (q, kv, kv)
            rows[f"blocks.{layer}.ffn.gate_up.weight"] = (self.config.ffn, self.config.ffn)
        return rows

    def compile_parts(self) -> None:
        """Compile each block and the loss of a chunk.

        All blocks are the same code over the same shapes, so one compilation serves them all: seconds
        where compiling the whole model takes minutes. What wraps a block stays outside of it: the hooks by
        which FSDP2 gathers its weights, and the recomputation of whole blocks.
        """
        # DDP would cut the blocks' graphs at its buckets. They are small enough to exchange gradients in between.
        torch._dynamo.config.optimize_ddp = False
        for block in self.blocks:
            cast(Block, block).compile_forward()
        self._chunk_loss = torch.compile(chunk_loss, dynamic=False)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        targets_BT: Tensor | None = None,
        z_loss: float = 0.0,
        head_loss: HeadLoss | None = None,
    ) -> Any:
        """Logits, or with targets the summed loss.

        Args:
            tokens_BT: token ids.
            positions_BT: each token's place in its own document; a 0 starts a document, and attention
                does not reach across. None: every row is one document.
            targets_BT: the ids to predict, :data:`IGNORE` where nothing is.
            z_loss: weight of the squared log-partition (PaLM, arXiv:2204.02311, section 5), which keeps
                the logits from drifting.
            head_loss: takes the place of the cross-entropy; what it returns is returned.

        Returns:
            Without targets the logits (B, T, V). With targets ``(loss, nll)``: the sum over the targets
            of the negative log-likelihood in nats plus z-loss, which is differentiable, and of the
            negative log-likelihood alone, which is not.
        """
        dtype = compute_dtype(self.embedding.weight)
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
            documents = None
        else:
            documents = documents_of(positions_BT)
        rotary = rotary_table(positions_BT, self.config, dtype)
        x_BTD = self.embedding(tokens_BT).to(dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotary, documents)
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.head(x_BTD)
        if head_loss is not None:
            return head_loss(x_BTD.flatten(0, 1), self.head, targets_BT.flatten())
        return ChunkedCrossEntropy.apply(
            x_BTD.flatten(0, 1),
            self.head.weight,
            targets_BT.flatten(),
            z_loss,
            self._chunk_loss,
            torch.is_grad_enabled(),
        )


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that autocast asks for here, else the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def rotary_table(positions_BT: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, N/2) of the angles position · theta^(-2i/N) (arXiv:2104.09864)."""
    exponents = torch.arange(0, config.head_width, 2, device=positions_BT.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_width)
    angles = (positions_BT.float()[..., None] * frequencies).unsqueeze(2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BTHN: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + N/2) of every head, the layout of Llama's Hugging Face weights."""
    a, b = x_BTHN.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The head and its cross-entropy together, a chunk of tokens at a time.

    The logits of M tokens are by far the largest tensor of a small model (M·V in fp32). Here only
    :data:`HEAD_CHUNK` rows of them exist at a time, and the gradients of the summed loss are taken
    while they do, so that the backward pass only scales what is there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        targets_M: Tensor,
        z_loss: float,
        step: Any,
        with_gradients: bool,  # asked outside: gradients are never enabled in here
    ) -> tuple[Tensor, Tensor]:
        loss = hidden_MD.new_zeros((), dtype=torch.float32)
        nll = torch.zeros_like(loss)
        weight = weight_VD.to(hidden_MD.dtype)
        d_hidden_MD = torch.empty_like(hidden_MD) if with_gradients else None
        trains_head = with_gradients and ctx.needs_input_grad[1]
        d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if trains_head else None
        chunk = HEAD_CHUNK[hidden_MD.device.type]
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for first in range(0, len(hidden_MD), chunk):
                part = slice(first, first + chunk)
                logits = hidden_MD[part] @ weight.T
                chunk_total, chunk_nll, d_logits = step(logits, targets_M[part], z_loss, with_gradients)
                loss += chunk_total
                nll += chunk_nll
                if d_hidden_MD is not None:
                    torch.mm(d_logits, weight, out=d_hidden_MD[part])
                if d_weight_VD is not None:
                    _accumulate(d_weight_VD, d_logits, hidden_MD[part])
                del logits, d_logits  # before the next chunk's are made
        ctx.save_for_backward(d_hidden_MD, d_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, d_nll: Tensor) -> Any:
        d_hidden_MD, d_weight_VD = ctx.saved_tensors
        if d_weight_VD is not None:
            d_weight_VD = (d_weight_VD * d_loss).to(ctx.weight_dtype)
        return d_hidden_MD * d_loss.to(d_hidden_MD.dtype), d_weight_VD, None, None, None, None


def _accumulate(total_VD: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """Add d_logitsᵀ · hidden to an fp32 sum; in fp32 without a temporary of its size."""
    if hidden.dtype == total_VD.dtype:
        total_VD.addmm_(d_logits.T, hidden)
        return
    rows = len(total_VD) if total_VD.is_cuda else max(1, ADDED_VALUES // total_VD.shape[1])
    for first in range(0, len(total_VD), rows):
        part = slice(first, first + rows)
        total_VD[part] += d_logits[:, part].T @ hidden


def chunk_loss(
    logits: Tensor, targets: Tensor, z_loss: float, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss of some tokens, their summed negative log-likelihood, and d loss / d logits.

    With p = softmax(logits) and Z = logsumexp(logits), the gradient of -log p[target] + z·Z² is
    p·(1 + 2·z·Z) - onehot(target). Computed in fp32 with one exponential a logit, returned in the logits' dtype;
    logits in fp32 are overwritten, because fresh memory for so large a tensor costs as much as the arithmetic.
    """
    counted = targets != IGNORE
    index = targets.clamp(min=0)[:, None]
    largest = logits.amax(-1).float()
    of_targets = logits.gather(1, index).squeeze(1).float()
    powers = logits.float().sub_(largest[:, None]).exp_()
    total = powers.sum(-1)
    log_z = largest + total.log()
    nll = torch.where(counted, log_z - of_targets, 0.0)
    penalty = torch.where(counted, z_loss * log_z.square(), 0.0)
    d_logits = None
    if with_gradients:
        weight = torch.where(counted, 1 + 2 * z_loss * log_z, 0.0)
        d_logits = powers.mul_((weight / total)[:, None]).to(logits.dtype)
        # Written, not added, at the targets: the pass above then ends in the logits' dtype. By index, for on a CPU
        # ``scatter_`` turns all of a tensor in bf16 to fp32 and back.
        d_target = weight * (-nll).exp() - counted.float()
        d_logits[torch.arange(len(logits), device=logits.device), index.squeeze(1)] = d_target.to(logits.dtype)
    return nll.sum() + penalty.sum(), nll.sum(), d_logits


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Draw all weights by :func:`initial_weight`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_weight(name, parameter.shape, model.config, seed))


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The first value of a parameter, on the CPU.

    ===================================  ==========================================
    embedding, head                      normal, std 0.02
    ``qkv``, ``gate_up``                 normal, std 0.02
    ``out``, ``down``                    normal, std 0.02 / sqrt(2 · layers)
    norms                                ones
    ===================================  ==========================================

    The last products of a block are smaller because the residual stream sums 2 · layers of them
    (GPT-2). A weight's generator is seeded by (seed, its name): its values do not depend on the order
    of construction, on the device, or on how the model is sharded.
    """
    if len(shape) < 2:
        return torch.ones(shape)
    std = 0.02
    if name.endswith(("attention.out.weight", "ffn.down.weight")):
        std /= math.sqrt(2 * config.layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator_of(name, seed))


def generator_of(name: str, seed: int) -> torch.Generator:
    """The random numbers that a weight is drawn from."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
