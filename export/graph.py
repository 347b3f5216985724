"""The four architectures as graphs of TVM, from the values of a ``config.json``.

Weights have the names and layout of MLC-LLM's files (queries, keys and values in one matrix, gate and up in another).

Letters: T tokens, V vocabulary, D model width, H query heads, K key/value heads, N head width, F feed-forward width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tvm import IRModule
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

from export.positions import Rotary
from export.rotary import frequencies
from models.hf_config import head_width, key_value_heads


@dataclass(frozen=True)
class Shape:
    """What a model is made of."""

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocab: int
    context: int
    """Tokens of the KV cache at most."""
    chunk: int
    """Tokens of a call to prefill at most."""
    tied: bool
    eps: float
    rotary: Rotary
    frequencies: tuple[float, ...]
    """Radians a position of every pair of numbers that is rotated."""

    @classmethod
    def of(cls, values: dict[str, Any], context: int, chunk: int) -> "Shape":
        """The shape that a ``config.json`` describes, for a cache of ``context`` tokens."""
        rotary, width = Rotary.of(values, Path()), head_width(values)
        return cls(
            architecture=values["architectures"][0],
            layers=values["num_hidden_layers"],
            width=values["hidden_size"],
            heads=values["num_attention_heads"],
            kv_heads=key_value_heads(values),
            head_width=width,
            ffn=values["intermediate_size"],
            vocab=values["vocab_size"],
            context=context,
            chunk=chunk,
            tied=bool(values.get("tie_word_embeddings")),
            eps=values.get("rms_norm_eps") or values.get("layer_norm_eps") or 1e-6,
            rotary=rotary,
            frequencies=frequencies(rotary, width),
        )


class Operations(Protocol):
    """What a kind of processor computes; :class:`export.cpu.CpuOperations` documents each."""

    def embed(self, ids: nn.Tensor, table: nn.Tensor) -> nn.Tensor: ...  # noqa: D102
    def linear(self, x: nn.Tensor, weight: nn.Tensor, bias: Any = None, residual: Any = None) -> nn.Tensor: ...  # noqa: D102
    def rms_norm(self, x: nn.Tensor, weight: nn.Tensor, eps: float) -> nn.Tensor: ...  # noqa: D102
    def layer_norm(self, x: nn.Tensor, weight: nn.Tensor, bias: nn.Tensor, eps: float) -> nn.Tensor: ...  # noqa: D102
    def qk_norm(self, qkv: nn.Tensor, heads: int, query: nn.Tensor, key: nn.Tensor, eps: float) -> nn.Tensor: ...  # noqa: D102
    def swiglu(self, x: nn.Tensor) -> nn.Tensor: ...  # noqa: D102
    def gelu(self, x: nn.Tensor) -> nn.Tensor: ...  # noqa: D102
    def last_row(self, x: nn.Tensor) -> nn.Tensor: ...  # noqa: D102
    def logits(self, x: nn.Tensor) -> nn.Tensor: ...  # noqa: D102
    def cache(self, shape: Shape, total: Any) -> PagedKVCache: ...  # noqa: D102


class Weights(nn.Module):
    """A module's parameters ``weight`` and, where asked for, ``bias``."""

    def __init__(self, *shape: int, bias: bool = False) -> None:
        self.weight = nn.Parameter(shape)
        self.bias = nn.Parameter(shape[:1]) if bias else None


class Attention(nn.Module):
    """Causal attention of Llama, Qwen2 and Qwen3."""

    def __init__(self, shape: Shape, operations: Operations, layer: int) -> None:
        self._shape, self._do, self._layer = shape, operations, layer
        heads, bias = shape.heads + 2 * shape.kv_heads, shape.architecture == "Qwen2ForCausalLM"
        self._qkv_name = "qkv_proj" if shape.architecture == "LlamaForCausalLM" else "c_attn"
        setattr(self, self._qkv_name, Weights(heads * shape.head_width, shape.width, bias=bias))
        self.o_proj = Weights(shape.width, shape.heads * shape.head_width)
        self._qk_norm = shape.architecture == "Qwen3ForCausalLM"
        if self._qk_norm:
            self.q_norm, self.k_norm = Weights(shape.head_width), Weights(shape.head_width)

    def forward(self, x: nn.Tensor, residual: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """x (T, D) to residual plus attention (T, D)."""
        shape, projection = self._shape, getattr(self, self._qkv_name)
        qkv = self._do.linear(x, projection.weight, projection.bias)
        qkv = qkv.reshape(x.shape[0], shape.heads + 2 * shape.kv_heads, shape.head_width)
        if self._qk_norm:
            qkv = self._do.qk_norm(qkv, shape.heads, self.q_norm.weight, self.k_norm.weight, shape.eps)
        mixed = attend(qkv, cache, shape, self._layer)
        return self._do.linear(mixed, self.o_proj.weight, residual=residual)


def attend(qkv: nn.Tensor, cache: PagedKVCache, shape: Shape, layer: int) -> nn.Tensor:
    """qkv (T, H + 2K, N) to the mixture of values (T, H * N); keys and values go into the cache."""
    tokens = qkv.shape[0]
    qkv = qkv.reshape(1, *qkv.shape)
    mixed = cache.attention_with_fused_qkv(layer, qkv, shape.heads, sm_scale=shape.head_width**-0.5)
    return mixed.reshape(tokens, shape.heads * shape.head_width)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        self._do = operations
        self.gate_up_proj = Weights(2 * shape.ffn, shape.width)
        self.down_proj = Weights(shape.width, shape.ffn)

    def forward(self, x: nn.Tensor, residual: nn.Tensor) -> nn.Tensor:
        """x (T, D) to residual plus the feed-forward half (T, D)."""
        both = self._do.linear(x, self.gate_up_proj.weight)
        return self._do.linear(self._do.swiglu(both), self.down_proj.weight, residual=residual)


class Block(nn.Module):
    """A layer: attention, then the feed-forward half, each on a norm of what it is added to."""

    def __init__(self, shape: Shape, operations: Operations, layer: int) -> None:
        self._shape, self._do = shape, operations
        self.self_attn = Attention(shape, operations, layer)
        self.mlp = GatedMLP(shape, operations)
        self.input_layernorm = Weights(shape.width)
        self.post_attention_layernorm = Weights(shape.width)

    def forward(self, x: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """x (T, D) to (T, D)."""
        x = self.self_attn(self._do.rms_norm(x, self.input_layernorm.weight, self._shape.eps), x, cache)
        return self.mlp(self._do.rms_norm(x, self.post_attention_layernorm.weight, self._shape.eps), x)


class Decoder(nn.Module):
    """Embedding, layers and norm of Llama, Qwen2 and Qwen3."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        self._shape, self._do = shape, operations
        self.embed_tokens = Weights(shape.vocab, shape.width)
        self.layers = nn.ModuleList([Block(shape, operations, layer) for layer in range(shape.layers)])
        self.norm = Weights(shape.width)

    def forward(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """ids (1, T) to (T, D), before the last norm."""
        x = self._do.embed(ids, self.embed_tokens.weight)
        for layer in self.layers:
            x = layer(x, cache)
        return x


class Model(nn.Module, ABC):
    """What a library holds: the functions of export/library.py."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        self._shape, self._do = shape, operations

    @abstractmethod
    def hidden(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """ids (1, T) to (T, D), before the last norm."""

    @abstractmethod
    def head(self, x: nn.Tensor) -> nn.Tensor:
        """(T, D) to logits (T, V)."""

    def prefill(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """ids (1, T) to the logits after the last (1, V)."""
        return self._do.logits(self.head(self._do.last_row(self.hidden(ids, cache))))

    def decode(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """One id (1, 1) to the logits after it (1, V)."""
        return self._do.logits(self.head(self.hidden(ids, cache)))

    def all_logits(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """ids (1, T) to the logits after each (T, V)."""
        return self._do.logits(self.head(self.hidden(ids, cache)))

    def create_kv_cache(self, total: Any) -> PagedKVCache:
        """An empty cache for ``total`` tokens."""
        return self._do.cache(self._shape, total)


class Llama(Model):
    """Llama, Qwen2 and Qwen3."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        super().__init__(shape, operations)
        self.model = Decoder(shape, operations)
        if not shape.tied:
            self.lm_head = Weights(shape.vocab, shape.width)

    def hidden(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """As :meth:`Model.hidden`."""
        return self.model(ids, cache)

    def head(self, x: nn.Tensor) -> nn.Tensor:
        """As :meth:`Model.head`."""
        weight = self.model.embed_tokens.weight if self._shape.tied else self.lm_head.weight
        return self._do.linear(self._do.rms_norm(x, self.model.norm.weight, self._shape.eps), weight)


class PhiMixer(nn.Module):
    """Phi's attention: biases everywhere, a part of each head rotated."""

    def __init__(self, shape: Shape, operations: Operations, layer: int) -> None:
        self._shape, self._do, self._layer = shape, operations, layer
        self.Wqkv = Weights((shape.heads + 2 * shape.kv_heads) * shape.head_width, shape.width, bias=True)
        self.out_proj = Weights(shape.width, shape.heads * shape.head_width, bias=True)

    def forward(self, x: nn.Tensor, residual: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """x (T, D) to residual plus attention (T, D)."""
        shape = self._shape
        qkv = self._do.linear(x, self.Wqkv.weight, self.Wqkv.bias)
        qkv = qkv.reshape(x.shape[0], shape.heads + 2 * shape.kv_heads, shape.head_width)
        return self._do.linear(
            attend(qkv, cache, shape, self._layer), self.out_proj.weight, self.out_proj.bias, residual
        )


class PhiMLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        self._do = operations
        self.fc1 = Weights(shape.ffn, shape.width, bias=True)
        self.fc2 = Weights(shape.width, shape.ffn, bias=True)

    def forward(self, x: nn.Tensor, residual: nn.Tensor) -> nn.Tensor:
        """x (T, D) to residual plus the feed-forward half (T, D)."""
        inner = self._do.gelu(self._do.linear(x, self.fc1.weight, self.fc1.bias))
        return self._do.linear(inner, self.fc2.weight, self.fc2.bias, residual)


class PhiBlock(nn.Module):
    """A layer: attention and feed-forward half side by side, on one norm."""

    def __init__(self, shape: Shape, operations: Operations, layer: int) -> None:
        self._shape, self._do = shape, operations
        self.ln = Weights(shape.width, bias=True)
        self.mixer = PhiMixer(shape, operations, layer)
        self.mlp = PhiMLP(shape, operations)

    def forward(self, x: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """x (T, D) to (T, D)."""
        normal = self._do.layer_norm(x, self.ln.weight, self.ln.bias, self._shape.eps)
        return self.mlp(normal, self.mixer(normal, x, cache))


class PhiDecoder(nn.Module):
    """Embedding and layers of Phi."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        self._do = operations
        self.embd = Weights(shape.vocab, shape.width)
        self.h = nn.ModuleList([PhiBlock(shape, operations, layer) for layer in range(shape.layers)])

    def forward(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """ids (1, T) to (T, D), before the last norm."""
        x = self._do.embed(ids, self.embd.weight)
        for layer in self.h:
            x = layer(x, cache)
        return x


class PhiHead(nn.Module):
    """Phi's last norm and head."""

    def __init__(self, shape: Shape) -> None:
        self.ln = Weights(shape.width, bias=True)
        self.linear = Weights(shape.vocab, shape.width, bias=True)


class Phi(Model):
    """Phi-1 to Phi-2."""

    def __init__(self, shape: Shape, operations: Operations) -> None:
        super().__init__(shape, operations)
        self.transformer = PhiDecoder(shape, operations)
        self.lm_head = PhiHead(shape)

    def hidden(self, ids: nn.Tensor, cache: PagedKVCache) -> nn.Tensor:
        """As :meth:`Model.hidden`."""
        return self.transformer(ids, cache)

    def head(self, x: nn.Tensor) -> nn.Tensor:
        """As :meth:`Model.head`."""
        norm, linear = self.lm_head.ln, self.lm_head.linear
        normal = self._do.layer_norm(x, norm.weight, norm.bias, self._shape.eps)
        return self._do.linear(normal, linear.weight, linear.bias)


@dataclass(frozen=True)
class Parameter:
    """A weight as a library takes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def build(shape: Shape, operations: Operations, dtype: str, *, every_logit: bool) -> tuple[IRModule, list[Parameter]]:
    """The graph of a model, and its weights in the order in which the functions take them.

    Args:
        shape: of the model.
        operations: of the processor.
        dtype: of weights.
        every_logit: whether the library can give the logits of all positions.
    """
    model = (Phi if shape.architecture == "PhiForCausalLM" else Llama)(shape, operations)
    model.to(dtype)
    cache = nn.spec.Object(object_type=PagedKVCache)

    def forward(length: Any) -> dict[str, Any]:
        ids = nn.spec.Tensor([1, length], "int32")
        return {"ids": ids, "cache": cache, "$": {"param_mode": "packed", "effect_mode": "none"}}

    functions: dict[str, Any] = {
        "prefill": forward("tokens"),
        "decode": forward(1),
        "create_kv_cache": {"total": int, "$": {"param_mode": "none", "effect_mode": "none"}},
    }
    if every_logit:
        functions["all_logits"] = forward("tokens")
    module, parameters = model.export_tvm(spec=functions)
    described = [Parameter(name, tuple(map(int, one.shape)), str(one.dtype)) for name, one in parameters]
    return module, described
