"""MLC-LLM's parameters: their names, and which of Hugging Face's tensors each is, one below the other.

MLC-LLM fuses the projections that read the same input: queries, keys and values, and in a gated feed-forward half
its two first matrices.

Shapes: D model width, Q query heads times head width, K key/value heads times head width, F feed-forward width,
V vocabulary, N head width.
"""

import math
from dataclasses import dataclass
from typing import Any

from models.hf_config import head_width, key_value_heads


@dataclass(frozen=True)
class Source:
    """A tensor of the model folder."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """A parameter of MLC-LLM's."""

    name: str
    sources: tuple[Source, ...]
    """The tensors that it is, concatenated along the first axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own."""
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def parameters(values: dict[str, Any]) -> list[Parameter]:
    """All parameters of the model that a ``config.json`` of :data:`models.hf_config.ARCHITECTURES` describes."""
    return _phi(values) if values["architectures"][0] == "PhiForCausalLM" else _gated(values)


def _gated(values: dict[str, Any]) -> list[Parameter]:
    """Llama, Qwen2 and Qwen3."""
    architecture = values["architectures"][0]
    fused = "qkv_proj" if architecture == "LlamaForCausalLM" else "c_attn"
    D, F, V, N = values["hidden_size"], values["intermediate_size"], values["vocab_size"], head_width(values)
    Q, K = values["num_attention_heads"] * N, key_value_heads(values) * N
    found = [_same("model.embed_tokens.weight", V, D)]
    for layer in range(values["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        attention, ffn = block + "self_attn.", block + "mlp."
        found += [
            _same(block + "input_layernorm.weight", D),
            _fused(f"{attention}{fused}.weight", _projections(attention, "weight", (Q, K, K), D)),
            _same(attention + "o_proj.weight", D, Q),
            _same(block + "post_attention_layernorm.weight", D),
            _fused(ffn + "gate_up_proj.weight", {ffn + "gate_proj.weight": (F, D), ffn + "up_proj.weight": (F, D)}),
            _same(ffn + "down_proj.weight", D, F),
        ]
        if architecture == "Qwen2ForCausalLM":
            found.append(_fused(f"{attention}{fused}.bias", _projections(attention, "bias", (Q, K, K))))
        if architecture == "Qwen3ForCausalLM":
            found += [_same(attention + "q_norm.weight", N), _same(attention + "k_norm.weight", N)]
    found.append(_same("model.norm.weight", D))
    if not values.get("tie_word_embeddings", False):
        found.append(_same("lm_head.weight", V, D))
    return found


def _phi(values: dict[str, Any]) -> list[Parameter]:
    """Phi-1, Phi-1.5 and Phi-2: biases everywhere, one norm a block, no tied head."""
    D, F, V, N = values["hidden_size"], values["intermediate_size"], values["vocab_size"], head_width(values)
    Q, K = values["num_attention_heads"] * N, key_value_heads(values) * N
    found = [_fused("transformer.embd.weight", {"model.embed_tokens.weight": (V, D)})]
    for layer in range(values["num_hidden_layers"]):
        ours, theirs = f"transformer.h.{layer}.", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        found += [
            *_affine(ours + "ln", theirs + "input_layernorm", D),
            _fused(ours + "mixer.Wqkv.weight", _projections(attention, "weight", (Q, K, K), D)),
            _fused(ours + "mixer.Wqkv.bias", _projections(attention, "bias", (Q, K, K))),
            *_affine(ours + "mixer.out_proj", attention + "dense", D, Q),
            *_affine(ours + "mlp.fc1", theirs + "mlp.fc1", F, D),
            *_affine(ours + "mlp.fc2", theirs + "mlp.fc2", D, F),
        ]
    found += _affine("lm_head.ln", "model.final_layernorm", D)
    return found + _affine("lm_head.linear", "lm_head", V, D)


def _same(name: str, *shape: int) -> Parameter:
    """A parameter that is one tensor of the same name."""
    return Parameter(name, (Source(name, shape),))


def _fused(name: str, sources: dict[str, tuple[int, ...]]) -> Parameter:
    return Parameter(name, tuple(Source(one, shape) for one, shape in sources.items()))


def _affine(ours: str, theirs: str, *shape: int) -> list[Parameter]:
    """A weight and its bias."""
    weight = _fused(f"{ours}.weight", {f"{theirs}.weight": shape})
    return [weight, _fused(f"{ours}.bias", {f"{theirs}.bias": shape[:1]})]


def _projections(attention: str, kind: str, rows: tuple[int, int, int], *width: int) -> dict[str, tuple[int, ...]]:
    """Queries, keys and values."""
    names = [f"{attention}{one}_proj.{kind}" for one in "qkv"]
    return {name: (count, *width) for name, count in zip(names, rows, strict=True)}
