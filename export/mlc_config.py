"""``mlc-chat-config.json`` as MLC-LLM's ``gen_config`` writes it, with the model's own chat template.

It differs from ``gen_config``'s, given the same context, in ``conv_template`` (there it can only be one of those that
MLC-LLM lists), ``stop_token_ids`` (the model's own), ``active_vocab_size`` (never more than the matrices have), and
in rotary values that MLC-LLM does not find in folders of transformers 5.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.tokenizer import Tokenizer
from export.conversation import PLAIN, Conversation, UnlikeError, conversation
from export.positions import Rotary
from models.hf_config import head_width, key_value_heads, taken_values

CONFIG = "mlc-chat-config.json"

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
"""What MLC-LLM takes of a tokenizer, in its order."""

_SAMPLING = {
    "temperature": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""What MLC-LLM writes where a folder names none; for its records alone."""


def mlc_config(folder: Path, chat: Conversation, *, context: int, prefill_chunk: int) -> dict[str, Any]:
    """The contents of ``mlc-chat-config.json``.

    Args:
        folder: a model folder that :func:`export.check.check` has passed.
        chat: its chat template, from :func:`read_chat`.
        context: tokens in the KV cache.
        prefill_chunk: tokens of a prompt that go through the model at one time.
    """
    values, tokenizer = taken_values(folder), Tokenizer(folder)
    prefill_chunk = min(prefill_chunk, context)
    stored = generation(folder)
    named = {name: stored.get(name, values.get(name)) for name in (*_SAMPLING, *_IDS)}
    named = {name: value for name, value in named.items() if value is not None}
    model = _MODEL[values["architectures"][0]](values, Rotary.of(values, folder), context, prefill_chunk)
    return {
        "version": "0.1.0",
        "model_type": values["model_type"],
        "quantization": "q0f16",
        "model_config": model,
        "vocab_size": values["vocab_size"],
        "context_window_size": context,
        "sliding_window_size": -1,
        "prefill_chunk_size": prefill_chunk,
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": min(values["vocab_size"], tokenizer.vocab_size),
        **{name: named.get(name, default) for name, default in _SAMPLING.items()},
        "tokenizer_files": [name for name in TOKENIZER_FILES if (folder / name).exists()],
        "tokenizer_info": _tokenizer_info(_read(folder / "tokenizer.json")),
        "conv_template": chat.as_json(begin=tokenizer.begin, stop=stop_tokens(folder, chat)),
        **{name: named.get(name, default) for name, default in _IDS.items()},
        "model_task": "chat",
        "embedding_metadata": None,
    }


def read_chat(folder: Path) -> tuple[Conversation, str | None]:
    """The model's chat template in MLC-LLM's terms.

    Returns:
        It, :data:`~export.conversation.PLAIN` where the model has none or MLC-LLM cannot follow it; and why it cannot.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    except Exception as error:  # from several libraries
        raise UserError(f"the tokenizer of {folder} cannot be read: {error}") from error
    if template is None:
        return PLAIN, None

    def render(messages: list[dict[str, str]], answer: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))

    try:
        return conversation(template, render, tokenizer.bos_token), None
    except UnlikeError as error:
        return PLAIN, str(error)


def stop_tokens(folder: Path, chat: Conversation) -> list[int]:
    """Ids that end an answer: those that the folder names, and the token that closes the assistant's turns."""
    ends: list[int | None] = []
    for value in (generation(folder).get("eos_token_id"), taken_values(folder).get("eos_token_id")):
        ends += value if isinstance(value, list) else [value]
    closing = chat.seps[-1].strip()
    added = _read(folder / "tokenizer.json").get("added_tokens", [])
    ends += [one["id"] for one in added if one.get("special") and closing.startswith(one["content"])]
    ends.append(Tokenizer(folder).end)
    return list(dict.fromkeys(end for end in ends if end is not None))


def generation(folder: Path) -> dict[str, Any]:
    """The ``generation_config.json`` of a model folder; empty where there is none."""
    return _read(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _llama(values: dict[str, Any], rotary: Rotary, context: int, prefill_chunk: int) -> dict[str, Any]:
    return {
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_attention_heads": values["num_attention_heads"],
        "num_hidden_layers": values["num_hidden_layers"],
        "rms_norm_eps": values["rms_norm_eps"],
        "vocab_size": values["vocab_size"],
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "position_embedding_base": rotary.theta,
        "rope_scaling": rotary.scaling,
        "context_window_size": context,
        "prefill_chunk_size": prefill_chunk,
        "num_key_value_heads": key_value_heads(values),
        "head_dim": head_width(values),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "max_batch_size": 1,
        "disaggregation": False,
    }


def _qwen2(values: dict[str, Any], rotary: Rotary, context: int, prefill_chunk: int) -> dict[str, Any]:
    return {
        "hidden_act": values["hidden_act"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_attention_heads": values["num_attention_heads"],
        "num_hidden_layers": values["num_hidden_layers"],
        "num_key_value_heads": key_value_heads(values),
        "rms_norm_eps": values["rms_norm_eps"],
        "rope_theta": rotary.theta,
        "vocab_size": values["vocab_size"],
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "context_window_size": context,
        "prefill_chunk_size": prefill_chunk,
        "tensor_parallel_shards": 1,
        "head_dim": head_width(values),
        "dtype": "float32",
        "max_batch_size": 1,
    }


def _qwen3(values: dict[str, Any], rotary: Rotary, context: int, prefill_chunk: int) -> dict[str, Any]:
    return {**_qwen2(values, rotary, context, prefill_chunk), "attention_bias": False, "weight_block_size": None}


def _phi(values: dict[str, Any], rotary: Rotary, context: int, prefill_chunk: int) -> dict[str, Any]:
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_hidden_layers": values["num_hidden_layers"],
        "num_attention_heads": values["num_attention_heads"],
        "layer_norm_eps": values["layer_norm_eps"],
        "position_embedding_base": rotary.theta,
        "partial_rotary_factor": rotary.partial,
        "num_key_value_heads": key_value_heads(values),
        "context_window_size": context,
        "prefill_chunk_size": prefill_chunk,
        "head_dim": head_width(values),
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
    }


_MODEL = {
    "LlamaForCausalLM": _llama,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "PhiForCausalLM": _phi,
}
"""What MLC-LLM's model classes take."""


def _tokenizer_info(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """How MLC-LLM turns tokens into bytes, found in ``tokenizer.json`` by its rules."""
    decoders = _steps(tokenizer.get("decoder"), "decoders")
    kinds = [one.get("type") for one in decoders if one.get("type") in ("ByteLevel", "ByteFallback")]
    prepends = [one.get("prepend") for one in _steps(tokenizer.get("normalizer"), "normalizers")]
    strips = [one for one in decoders if one.get("type") == "Strip"]
    return {
        "token_postproc_method": "byte_level" if kinds[-1:] == ["ByteLevel"] else "byte_fallback",
        "prepend_space_in_encode": "▁" in prepends,
        "strip_space_in_decode": any((one["content"], one["start"], one["stop"]) == (" ", 1, 0) for one in strips),
    }


def _steps(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """A step of the tokenizer, or those that it is a sequence of."""
    if step is None:
        return []
    return list(step[parts]) if step.get("type") == "Sequence" else [step]
