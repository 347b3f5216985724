"""A first-generation Qwen as an equal Qwen2: tensors split and renamed, the tokenizer's file converted.

The original is code on the hub beside the weights. None of it is run: what it computes is what Qwen2 computes, under
other names, with queries, keys and values in one matrix and ``intermediate_size`` counted for two matrices together.
Beyond the length it was trained on the original also scales queries by log(position) / log(length) and stretches the
rotary embedding with the length of the text; Qwen2 can do neither, so the context ends there.

Shapes: D model width, F feed-forward width, V vocabulary.
"""

import base64
import binascii
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from common.console import Console
from common.errors import UserError
from common.files import new_folder, write_json
from common.run_folder import command as typed
from common.run_folder import git_commit
from common.settings import to_dict
from models.folder import check_model, check_out, stage_of
from models.hf_config import read_values, with_rope_at_top
from pruning.byte_level import bytes_of_characters
from pruning.settings import ImportCommand, out_folder

if TYPE_CHECKING:
    from torch import Tensor

    from models.hf import WeightFiles

ARCHITECTURE = "QWenLMHeadModel"

END, TURN_BEGIN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END, TURN_BEGIN, TURN_END, *(f"<|extra_{number}|>" for number in range(205)))
"""The tokens behind those of ``qwen.tiktoken``, whose ids follow theirs."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the original splits text into words."""

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as the original's own chat function writes it, for models that were trained on it."""

_ENDS = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "ln_1.weight": "input_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}


def is_qwen1(values: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a first-generation Qwen."""
    return ARCHITECTURE in (values.get("architectures") or ())


def import_command(command: ImportCommand) -> None:
    """Write the Qwen2 that a first-generation Qwen is."""
    assert command.model is not None
    folder, console = Path(command.model), Console()
    out = out_folder(command.model, command.out, "qwen2")
    check_model(folder)
    check_out(out, folder, own=stage_of(out) == "import")
    console.settings("import", to_dict(command) | {"out": str(out)})
    convert(folder, out, console.say)
    console.say(f"model: {out}\nnext: python -m pruning {out} --phone-memory 8GB --plan")


def convert(folder: Path, out: Path, say: Callable[[str], None]) -> None:
    """Write the Qwen2 folder ``out`` that computes what the first-generation Qwen in ``folder`` computes.

    Weights keep their dtype and go file by file, so that one file of them is in memory at a time.

    Args:
        folder: the original, as it lies on the hub.
        out: to write; replaced when it is there.
        say: told what is done, and what Qwen2 cannot express.

    Raises:
        UserError: it is no such folder, lacks a file, or has parts that Qwen2 has not.
    """
    values = read_values(folder)
    config = qwen2_config(values)
    from models.hf import WeightFiles  # imports torch, and a plan asks this module whether a model is a Qwen

    files = WeightFiles(folder)
    with new_folder(out) as temporary:
        tokens = write_tokenizer(folder, temporary)
        if tokens > config["vocab_size"]:
            raise UserError(
                f"{folder / 'qwen.tiktoken'} and the special tokens make {tokens:,} tokens, more than the "
                f"{config['vocab_size']:,} rows of the embedding"
            )
        end = tokens - len(SPECIAL)
        stops = [end + SPECIAL.index(TURN_END), end] if _is_chat(folder) else end
        ids = {"bos_token_id": None, "eos_token_id": stops, "pad_token_id": end}
        write_json(temporary / "config.json", config | ids)
        write_json(temporary / "generation_config.json", {"eos_token_id": stops, "pad_token_id": end})
        _write_weights(files, temporary, say)
        write_json(temporary / "palmtop.json", _record(folder))
    cap = config["max_position_embeddings"]
    longest = values.get("max_position_embeddings", cap)
    if values.get("use_logn_attn") or values.get("use_dynamic_ntk"):
        say(
            f"the context is {cap:,} tokens, the length it was trained on: the original reaches {longest:,} by log-n "
            "attention or dynamic NTK, which Qwen2 cannot express"
        )


def qwen2_config(values: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the equal Qwen2, special tokens apart; UserError when there is none."""
    if not is_qwen1(values):
        named = (values.get("architectures") or ["none named"])[0]
        raise UserError(f"the model is a {named}, not a first-generation Qwen ({ARCHITECTURE})")
    if values.get("quantization_config"):
        raise UserError("the weights are quantised; give the folder of the unquantised model")
    try:
        width, heads, ffn = values["hidden_size"], values["num_attention_heads"], values["intermediate_size"]
        foreign = {
            "biases beside those of queries, keys and values": not values.get("no_bias", True),
            "partial rotary embedding": values.get("rotary_pct", 1.0) != 1.0,
            "heads that do not make up the width": values.get("kv_channels", width // heads) * heads != width,
            "unscaled attention": not values.get("scale_attn_weights", True),
        }
        found = [name for name, there in foreign.items() if there]
        if found:
            raise UserError(f"the model has {', '.join(found)}, which Qwen2 has not")
        return with_rope_at_top(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "attention_dropout": 0.0,
                "dtype": _dtype(values),
                "hidden_act": "silu",
                "hidden_size": width,
                "initializer_range": values.get("initializer_range", 0.02),
                "intermediate_size": ffn // 2,
                "max_position_embeddings": values["seq_length"],
                "num_attention_heads": heads,
                "num_hidden_layers": values["num_hidden_layers"],
                "num_key_value_heads": heads,
                "rms_norm_eps": values["layer_norm_epsilon"],
                "rope_parameters": {"rope_theta": float(values["rotary_emb_base"]), "rope_type": "default"},
                "tie_word_embeddings": values.get("tie_word_embeddings", False),
                "use_cache": True,
                "use_sliding_window": False,
                "vocab_size": values["vocab_size"],
            }
        )
    except KeyError as missing:
        raise UserError(f"the model's config.json has no {missing}") from missing


def qwen2_tensors(name: str, tensor: "Tensor") -> dict[str, "Tensor"]:
    """A tensor of the original under Qwen2's names; nothing for a table that is no weight."""
    if name in _ENDS:
        return {_ENDS[name]: tensor}
    start, _, rest = name.partition("transformer.h.")
    layer, _, part = rest.partition(".")
    theirs = f"model.layers.{layer}."
    if not start and part in ("attn.c_attn.weight", "attn.c_attn.bias"):
        kind = part.rpartition(".")[2]
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{theirs}self_attn.{letter}_proj.{kind}": third.contiguous() for letter, third in thirds}
    if not start and part in _IN_LAYER:
        return {theirs + _IN_LAYER[part]: tensor}
    if name.endswith(("rotary_emb.inv_freq", "masked_bias", "logn_tensor")):
        return {}
    raise UserError(f"the weights hold {name!r}, which no first-generation Qwen has")


def write_tokenizer(folder: Path, out: Path) -> int:
    """Write the tokenizer in ``folder`` as ``tokenizer.json`` and ``tokenizer_config.json``; returns its tokens."""
    ranks = read_ranks(folder / "qwen.tiktoken")
    backend = byte_level_bpe(ranks)
    for number, token in enumerate(SPECIAL, len(ranks)):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if backend.token_to_id(token) != number:
            raise UserError(f"{folder / 'qwen.tiktoken'} holds the special token {token} among its own")
    backend.save(str(out / "tokenizer.json"))
    chat = {"chat_template": CHAT_TEMPLATE} if _is_chat(folder) else {}
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": TURN_END if chat else END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": read_values(folder)["seq_length"],
            **chat,
        },
    )
    return len(ranks) + len(SPECIAL)


def read_ranks(file: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file, a line of base64 and rank each, in the order of their ranks.

    Raises:
        UserError: it is not there, or not of this form with ranks 0, 1, 2 and so on.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except FileNotFoundError as error:
        raise UserError(f"there is no {file}; copy it from the original's folder on the hub") from error
    except (OSError, ValueError, binascii.Error) as error:
        raise UserError(f"{file} cannot be read as base64 tokens and ranks: {error}") from error
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"the ranks in {file} do not run from 0 without gaps")
    return ranks


def byte_level_bpe(ranks: dict[bytes, int]) -> tokenizers.Tokenizer:
    """The byte-level BPE that encodes as tiktoken does with these ranks.

    tiktoken joins the two neighbours whose joint token has the lowest rank, however they came about: so every way to
    cut a token into two tokens is a merge, in the order of the joint tokens. A word that is a token it takes whole.
    """
    spelled = {token: _spelled(token) for token in ranks}
    merges = []
    for token in ranks:
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={spelled[token]: rank for token, rank in ranks.items()},
            merges=[(spelled[left], spelled[right]) for left, right in merges],
            ignore_merges=True,
        )
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _spelled(token: bytes) -> str:
    """A token's bytes in the characters that stand for them."""
    return "".join(_characters()[byte] for byte in token)


@cache
def _characters() -> dict[int, str]:
    return {byte: char for char, byte in bytes_of_characters().items()}


def _dtype(values: dict[str, Any]) -> str:
    """Of the weights; the original may name none but set a flag."""
    named = values.get("dtype") or values.get("torch_dtype")
    flagged = next((dtype for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")) if values.get(flag)), None)
    return str(named or flagged or "float32")


def _is_chat(folder: Path) -> bool:
    """Whether the model was trained on ChatML, as its ``generation_config.json`` tells."""
    file = folder / "generation_config.json"
    try:
        return bool(file.exists() and json.loads(file.read_text(encoding="utf-8")).get("chat_format") == "chatml")
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; put it right, or remove it") from error


def _write_weights(files: "WeightFiles", out: Path, say: Callable[[str], None]) -> None:
    """The tensors of every file, renamed, in a file of the same name."""
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    total = 0
    by_file = files.by_file()
    for number, (file, names) in enumerate(by_file.items(), 1):
        say(f"{file}, {number} of {len(by_file)}")
        renamed = {new: part for name in names for new, part in qwen2_tensors(name, files.read(name)).items()}
        save_file(renamed, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(renamed, file)
        total += sum(tensor.nbytes for tensor in renamed.values())
    if len(by_file) > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _record(folder: Path) -> dict[str, Any]:
    """``palmtop.json``: the weights are the original's, and what they have seen is not known."""
    return {
        "stage": "import",
        "parent": str(folder),
        "command": typed(),
        "git": git_commit(),
        "data": [{"stage": "unknown", "from": str(folder)}],
    }
