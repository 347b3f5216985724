"""Our transformer as a Hugging Face model folder, and back.

Without QK-norm the folder is a Llama, with it a Qwen3: architectures that transformers, MLC-LLM,
llama.cpp and vLLM know, so nothing needs remote code. Weights are safetensors in fp32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.errors import UserError
from common.files import write_json
from models.folder import INDEX, WEIGHTS, weight_files
from models.hf_config import read_config, to_config
from models.sizes import ModelConfig
from models.transformer import Transformer

SHARD_BYTES = 4 * 10**9
"""The largest safetensors file that is written; more weights go into more files."""


def to_hugging_face(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names, fused matrices split, a tied head left out."""
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    out: dict[str, Tensor] = {"model.embed_tokens.weight": state["embedding.weight"]}
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        projections = state[ours + "attention.qkv.weight"].split((q, kv, kv))
        for name, part in zip(("q_proj", "k_proj", "v_proj"), projections, strict=True):
            out[f"{theirs}self_attn.{name}.weight"] = part
        gate, up = state[ours + "ffn.gate_up.weight"].chunk(2)
        out[theirs + "mlp.gate_proj.weight"], out[theirs + "mlp.up_proj.weight"] = gate, up
        for name, other in _unfused(config).items():
            out[theirs + other] = state[ours + name]
    out["model.norm.weight"] = state["norm.weight"]
    if not config.tied:
        out["lm_head.weight"] = state["head.weight"]
    return out


def their_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our tensors' names, each with Hugging Face's names of the tensors that it is, one below the other."""
    names: dict[str, tuple[str, ...]] = {"embedding.weight": ("model.embed_tokens.weight",)}
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        heads = tuple(f"{theirs}self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj"))
        names[ours + "attention.qkv.weight"] = heads
        names[ours + "ffn.gate_up.weight"] = (theirs + "mlp.gate_proj.weight", theirs + "mlp.up_proj.weight")
        names |= {ours + name: (theirs + other,) for name, other in _unfused(config).items()}
    names["norm.weight"] = ("model.norm.weight",)
    names["head.weight"] = names["embedding.weight"] if config.tied else ("lm_head.weight",)
    return names


def _unfused(config: ModelConfig) -> dict[str, str]:
    """Names within a block, ours to theirs, of the tensors that are not fused."""
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn.down.weight": "mlp.down_proj.weight",
    }
    if config.qk_norm:
        names["attention.q_norm.weight"] = "self_attn.q_norm.weight"
        names["attention.k_norm.weight"] = "self_attn.k_norm.weight"
    return names


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Write safetensors files of at most :data:`SHARD_BYTES`, with an index when there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        if shards[-1] and used + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


class WeightFiles:
    """The tensors in a model folder's safetensors files, read when they are asked for.

    Raises:
        UserError: there are none, or one is missing or cut.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            with self._open(file) as tensors:
                self._files |= dict.fromkeys(tensors.keys(), file)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._files)

    def by_file(self) -> dict[str, list[str]]:
        """The names of the tensors in each file, by the file's name."""
        found: dict[str, list[str]] = {}
        for name, file in self._files.items():
            found.setdefault(file.name, []).append(name)
        return found

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored; UserError when it is not there."""
        if name not in self._files:
            raise UserError(f"the weights of {self.folder} lack the tensor {name!r}")
        with self._open(self._files[name]) as tensors:
            return cast(Tensor, tensors.get_tensor(name))

    @contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        try:
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except Exception as error:  # safetensors raises its own type, which it does not export stably
            raise UserError(f"{file} is damaged: {error}") from error


def write_model(
    state: dict[str, Tensor], config: ModelConfig, folder: Path, *, bos: int | None, eos: int, pad: int | None
) -> None:
    """Write ``config.json``, ``generation_config.json`` and the weights into ``folder``.

    The tokenizer's files and ``palmtop.json`` are the caller's.
    """
    write_json(folder / "config.json", to_config(config, bos=bos, eos=eos, pad=pad))
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})
    save_weights(to_hugging_face(state, config), folder)


def our_values(folder: Path, config: ModelConfig) -> Callable[[str, torch.Size], Tensor]:
    """The weights in a model folder by our names, each read in fp32 when it is asked for with its shape.

    Raises:
        UserError: one is missing, or of another shape.
    """
    files, names = WeightFiles(folder), their_names(config)

    def value(name: str, shape: torch.Size) -> Tensor:
        return checked_shape(torch.cat([files.read(part).float() for part in names[name]]), name, shape, folder)

    return value


def checked_shape(tensor: Tensor, name: str, shape: torch.Size, folder: Path) -> Tensor:
    """The tensor itself; UserError when it is not of the shape that ``config.json`` promises."""
    if tensor.shape != shape:
        raise UserError(
            f"the weights of {folder} do not have the shapes of its config.json: {name} is {tuple(tensor.shape)}, "
            f"expected {tuple(shape)}"
        )
    return tensor


def load_model(folder: Path) -> Transformer:
    """Our transformer with the weights of a model folder; UserError when they are of another shape."""
    model = Transformer(read_config(folder))
    values = our_values(folder, model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, parameter.shape))
    return model
