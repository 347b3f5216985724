"""What must hold of a model folder before anything of it is written: MLC-LLM would take other values without a word,
or fail on the phone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import gigabytes
from data.tokenizer import Tokenizer
from export.conversation import Conversation
from export.mapping import Parameter, parameters
from export.mlc_config import read_chat, stop_tokens
from export.positions import Rotary
from export.settings import CONTEXT, MlcSettings
from export.shards import in_order
from export.tensors import STORED, Tensors
from models.budget import OPENCL_GATE
from models.hf_config import head_width, key_value_heads, taken_values, within_context

_NEEDED = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
           "max_position_embeddings", "hidden_act")  # fmt: skip
_ACTIVATIONS = {"PhiForCausalLM": ("gelu_new", "gelu_pytorch_tanh")}
_SCALED = {"LlamaForCausalLM": ("llama3",)}
"""Kinds of stretched rotary embedding that MLC-LLM computes."""


@dataclass(frozen=True)
class Memory:
    """What a model takes on a phone."""

    weights: int
    """Bytes, 2 a parameter."""
    cache: int
    """Bytes of keys and values in fp16, the context full."""
    gate: int = OPENCL_GATE
    """Most bytes that MLC-LLM's engine takes on OpenCL; its buffers, some hundred megabytes at most, count too."""

    @property
    def passes(self) -> bool:
        """Whether weights and cache leave room below the gate."""
        return self.weights + self.cache < self.gate


@dataclass(frozen=True)
class Checked:
    """A model folder that can be exported."""

    folder: Path
    values: dict[str, Any]
    """The contents of ``config.json``, the rotary values at the top level, where MLC-LLM reads them."""
    parameters: tuple[Parameter, ...]
    """In the order in which they are written."""
    context: int
    """Tokens in the KV cache."""
    prefill_chunk: int
    """Tokens of a prompt that go through the model at one time."""
    chat: Conversation
    memory: Memory
    warnings: tuple[str, ...]
    """What the user should know, a sentence each."""

    @property
    def size(self) -> int:
        """Parameters; a tied head is the embedding, and counts once."""
        return sum(parameter.size for parameter in self.parameters)


def check(folder: Path, settings: MlcSettings) -> Checked:
    """Check a model folder: its configuration, its tensors' names and shapes, its tokenizer and chat template.

    Values of the weights are checked as they are written.

    Raises:
        UserError: what does not hold, with what to do about it.
    """
    values = taken_values(folder)
    rotary = _check_values(folder, values)
    ordered = _check_tensors(folder, values)
    context = within_context("--context", settings.context, CONTEXT, values["max_position_embeddings"])
    chat, problem = _check_tokenizer(folder, values)
    kept = 2 * key_value_heads(values) * head_width(values) * values["num_hidden_layers"]
    memory = Memory(sum(2 * parameter.size for parameter in ordered), 2 * kept * context)
    warnings = []
    if problem is not None:
        warnings.append(
            f"MLC-LLM cannot follow the chat template ({problem}); its chat will show the model bare text, as its "
            "template LM does"
        )
    if not memory.passes:
        warnings.append(
            f"MLC-LLM's engine refuses the model on OpenCL: weights of {gigabytes(memory.weights)} and a cache of "
            f"{gigabytes(memory.cache)}, with {gigabytes(memory.gate)} as the most; python -m pruning makes it smaller"
        )
    chunk = min(int(settings.prefill_chunk), context)
    at_top = values | rotary.at_top
    return Checked(folder, at_top, tuple(ordered), context, chunk, chat, memory, tuple(warnings))


def _check_values(folder: Path, values: dict[str, Any]) -> Rotary:
    """The configuration: everything that MLC-LLM reads is there, and nothing that it would leave out."""
    architecture = values["architectures"][0]
    phi = architecture == "PhiForCausalLM"
    needed = [*_NEEDED, "layer_norm_eps" if phi else "rms_norm_eps"]
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise UserError(f"{folder / 'config.json'} has no {', '.join(missing)}, which MLC-LLM needs")
    rotary = Rotary.of(values, folder)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    stretched = rotary.scaling and rotary.scaling["rope_type"]
    unlike = {
        f"the activation {values['hidden_act']}": values["hidden_act"] not in _ACTIVATIONS.get(architecture, ("silu",)),
        f"rotary embedding stretched by {stretched}": stretched and stretched not in _SCALED.get(architecture, ()),
        f"a rotary embedding of {rotary.partial:g} of a head": rotary.partial != 1.0 and not phi,
        "sliding windows": values.get("use_sliding_window", False),
        "attention biases": values.get("attention_bias", False),
        "MLP biases": values.get("mlp_bias", False),
        "norms of queries and keys": values.get("qk_layernorm", False),
        "a head tied to the embedding": phi and values.get("tie_word_embeddings", False),
        f"{heads} heads of {head_width(values)} at a width of {width}": (
            architecture in ("Qwen2ForCausalLM", "PhiForCausalLM") and heads * head_width(values) != width
        ),
        f"{heads} query heads for {key_value_heads(values)} key/value heads": heads % key_value_heads(values) != 0,
    }
    found = [name for name, there in unlike.items() if there]
    if found:
        raise UserError(f"{folder} has {' and '.join(found)}, which MLC-LLM's {architecture} does not have")
    return rotary


def _check_tensors(folder: Path, values: dict[str, Any]) -> list[Parameter]:
    """The tensors: all there, of the shapes that the configuration promises, floating-point, and no others."""
    tensors = Tensors(folder)
    ordered = in_order(parameters(values), tensors, folder)
    sources = [source for parameter in ordered for source in parameter.sources]
    for source in sources:
        shape, stored = tensors.shape(source.name), tensors.stored(source.name)
        if shape != source.shape:
            raise UserError(
                f"the weights of {folder} do not have the shapes of its config.json: {source.name} is {shape}, "
                f"expected {source.shape}"
            )
        if stored not in STORED:
            raise UserError(f"the weights of {folder} are quantised ({source.name} is {stored}); give unquantised ones")
    tied = {"lm_head.weight"} if values.get("tie_word_embeddings", False) else set()
    unknown = sorted(set(tensors.names) - {source.name for source in sources} - tied)
    unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise UserError(
            f"the weights of {folder} hold {len(unknown)} tensors that a {values['architectures'][0]} does not have, "
            f"such as {unknown[0]!r}; MLC-LLM would leave them out"
        )
    return ordered


def _check_tokenizer(folder: Path, values: dict[str, Any]) -> tuple[Conversation, str | None]:
    """The tokenizer: there, no larger than the model, and with every token that the chat template writes.

    Returns:
        The chat template, and why MLC-LLM cannot follow the model's own where it cannot.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder} holds no {name}, which MLC-LLM's app needs; save the tokenizer beside the model")
    tokenizer, rows = Tokenizer(folder), values["vocab_size"]
    if tokenizer.vocab_size > rows:
        raise UserError(f"the tokenizer of {folder} has {tokenizer.vocab_size:,} tokens, the model only {rows:,}")
    chat, problem = read_chat(folder)
    unknown = sorted(chat.marks - set(tokenizer.vocabulary))
    if unknown:
        raise UserError(
            f"the chat template of {folder} writes {', '.join(unknown)}, which its tokenizer does not know: the model "
            "would read them as plain text; give the tokenizer these tokens or another template"
        )
    beyond = [one for one in stop_tokens(folder, chat) if not 0 <= one < rows]
    if beyond:
        raise UserError(f"{folder} ends its answers with token {beyond[0]}, but the model has only {rows:,} tokens")
    return chat, problem
