"""``config.json`` of a model folder, to and from our :class:`ModelConfig`. Imports nothing heavy.

``rope_theta`` stands at the top level beside transformers' ``rope_parameters``: MLC-LLM reads only the
former and silently falls back to other values without it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from models.sizes import ModelConfig

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "PhiForCausalLM")
"""What is taken; tests hold each to transformers."""

_FACES = {"LlamaForCausalLM": False, "Qwen3ForCausalLM": True}
"""Architecture, and whether it has QK-norm."""


def to_config(config: ModelConfig, *, bos: int | None, eos: int, pad: int | None) -> dict[str, Any]:
    """The contents of ``config.json`` for a model of this shape and these special tokens."""
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "float32",
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context,
        "mlp_bias": False,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab,
    }


def is_ours(values: dict[str, Any]) -> bool:
    """Whether our transformer can be what a ``config.json`` describes."""
    return (values.get("architectures") or [None])[0] in _FACES and not _foreign_parts(values)


def _foreign_parts(values: dict[str, Any]) -> list[str]:
    """What a ``config.json`` has that our transformer has not."""
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    rope_kinds = {kind.get("rope_type", kind.get("type", "default")) for kind in (rope, scaling)}
    unsupported = {
        "rope scaling": rope_kinds != {"default"},
        "partial rotary embedding": values.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0,
        f"the activation {values.get('hidden_act')}": values.get("hidden_act", "silu") != "silu",
        "attention biases": values.get("attention_bias", False),
        "MLP biases": values.get("mlp_bias", False),
        "sliding windows": values.get("use_sliding_window", False),
    }
    return [name for name, there in unsupported.items() if there]


def from_config(values: dict[str, Any], folder: Path) -> ModelConfig:
    """The shape that a ``config.json`` describes; UserError when our transformer cannot be it."""
    architecture = (values.get("architectures") or ["none named"])[0]
    if architecture not in _FACES:
        raise UserError(f"{folder} is a {architecture}; this command takes {' or '.join(_FACES)}")
    foreign = _foreign_parts(values)
    if foreign:
        raise UserError(f"{folder} uses {', '.join(foreign)}, which this transformer does not have")
    rope = values.get("rope_parameters") or {}
    with _readable(folder):
        return ModelConfig(
            layers=values["num_hidden_layers"],
            width=values["hidden_size"],
            heads=values["num_attention_heads"],
            kv_heads=key_value_heads(values),
            head_width=head_width(values),
            ffn=values["intermediate_size"],
            vocab=values["vocab_size"],
            context=values["max_position_embeddings"],
            tied=values.get("tie_word_embeddings", False),
            qk_norm=_FACES[architecture],
            rope_theta=float(values.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            norm_eps=values.get("rms_norm_eps", 1e-6),
        )


def nearest_shape(values: dict[str, Any], folder: Path) -> ModelConfig:
    """The shape of ours that comes nearest to a foreign ``config.json``, for estimates: biases are left out."""
    kind = values.get("model_type")
    with _readable(folder):
        feed_forward = values["intermediate_size"]
        return ModelConfig(
            layers=values["num_hidden_layers"],
            width=values["hidden_size"],
            heads=values["num_attention_heads"],
            kv_heads=key_value_heads(values),
            head_width=head_width(values),
            ffn=feed_forward * 2 // 3 if kind == "phi" else feed_forward,  # two matrices, where SwiGLU has three
            vocab=values["vocab_size"],
            context=values["max_position_embeddings"],
            tied=values.get("tie_word_embeddings", False),
            qk_norm=kind == "qwen3",
        )


def head_width(values: dict[str, Any]) -> int:
    """Width of a head: ``head_dim``, by default the model's width shared out to the heads."""
    return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])


def key_value_heads(values: dict[str, Any]) -> int:
    """Key/value heads: as many as there are query heads where none are named."""
    return int(values.get("num_key_value_heads") or values["num_attention_heads"])


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """UserError for a ``config.json`` that lacks something, or holds what no model can be."""
    try:
        yield
    except KeyError as missing:
        raise UserError(f"{folder / 'config.json'} has no {missing}") from missing
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'} describes no model: {error}") from error


def within_context(flag: str, asked: int | None, usual: int, context: int) -> int:
    """Tokens that a flag asks for, by default ``usual`` or the model's context where that is shorter.

    Raises:
        UserError: more are asked for than the context has.
    """
    if asked is not None and asked > context:
        raise UserError(f"{flag} {asked:,} is longer than the model's context of {context:,}")
    return min(usual, context) if asked is None else asked


def with_rope_at_top(values: dict[str, Any]) -> dict[str, Any]:
    """A ``config.json`` whose rotary settings stand at the top level too, where MLC-LLM reads them.

    transformers 5 writes them into ``rope_parameters`` alone, and MLC-LLM then takes others without a word.
    """
    rope = values.get("rope_parameters") or {}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    found: dict[str, Any] = {"rope_theta": 10_000.0}  # what every reader takes where none is named
    found |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope:
        found["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return found | values


def read_values(folder: Path) -> dict[str, Any]:
    """The contents of a folder's ``config.json``; UserError when it has none that can be read."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; give a model folder")
    if not folder.exists():
        raise UserError(f"there is no model folder {folder}")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json (a run's model is in its model/)")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'} is no configuration: it holds no JSON object")
    return values


def taken_values(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model that can be trained, ours or one of :data:`ARCHITECTURES`.

    Raises:
        UserError: it is another architecture's, or the weights are quantised.
    """
    values = read_values(folder)
    named = (values.get("architectures") or ["none named"])[0]
    if named not in ARCHITECTURES:
        raise UserError(f"{folder} is a {named}; this command takes {', '.join(ARCHITECTURES)}")
    if values.get("quantization_config"):
        raise UserError(f"the weights of {folder} are quantised; give the folder of the unquantised model")
    return values


def taken_shape(folder: Path) -> ModelConfig:
    """The shape of a model that can be trained, of a foreign one the nearest of ours; raises as the above."""
    values = taken_values(folder)
    return from_config(values, folder) if is_ours(values) else nearest_shape(values, folder)


def read_config(folder: Path) -> ModelConfig:
    """The shape of the model in a folder; UserError when it is no model folder of ours."""
    return from_config(read_values(folder), folder)
