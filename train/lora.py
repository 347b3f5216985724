"""LoRA (Hu et al., arXiv:2106.09685) through peft: beside a frozen matrix W a trained product B·A of low rank.

Only the adapters are trained, saved and resumed; the end of a run merges W + scale · B·A into a plain model.
"""

from pathlib import Path

import torch
import xxhash
from torch import Tensor, nn

from common.errors import UserError
from models.foreign import Architecture, Foreign
from models.transformer import Transformer, generator_of
from train.engine import Values

BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."
"""Marks in the names that peft gives W, A and B."""


def add_adapters(model: Transformer | Foreign, rank: int, alpha: int, frozen: torch.dtype) -> None:
    """Put adapters beside every matrix of the blocks, and freeze everything else.

    Args:
        model: the model, whose weights may be on the meta device.
        rank: rows of A.
        alpha: B·A is scaled by alpha / rank.
        frozen: the dtype that frozen weights are held in.
    """
    from peft import LoraConfig, inject_adapter_in_model

    matrices = {name for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)}
    kinds = sorted({name.rpartition(".")[2] for name in matrices})
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=kinds), model)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen)


def first_values(base: Values, seed: int) -> Values:
    """Values for a model with adapters: W from ``base``, A uniform within 1/sqrt(columns), B zero, so that it begins
    as the model that it was made of."""

    def value(name: str, shape: torch.Size) -> Tensor:
        if DOWN in name:
            bound = shape[1] ** -0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=generator_of(name, seed))
        return torch.zeros(shape) if UP in name else base(name.replace(BASE, "."), shape)

    return value


def digest_of(base: Path) -> str:
    """A hash of the weights in a model folder."""
    digest = xxhash.xxh3_128()
    for file in sorted(base.glob("model*.safetensors")):
        with open(file, "rb") as opened:
            while block := opened.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def check_base(base: Path, digest: str) -> None:
    """UserError when the weights that adapters were trained beside are not there or have changed."""
    if digest_of(base) != digest:
        raise UserError(
            f"the adapters were trained beside other weights than those in {base}; put the model folder back as it was"
        )


def merge(adapters: dict[str, Tensor], base: Path, scale: float) -> dict[str, Tensor]:
    """The weights W + scale · B·A of a plain model, in fp32.

    Args:
        adapters: by the names of the model with adapters.
        base: the model folder that they were trained beside.
        scale: as trained.
    """
    architecture = Architecture.of(base)
    with torch.device("meta"):
        model = architecture.build()
    read, merged = architecture.read(base), {}
    for name, parameter in model.named_parameters():
        weight, module = read(name, parameter.shape), name.removesuffix(".weight")
        if module + DOWN + "weight" in adapters:
            weight = weight + scale * adapters[module + UP + "weight"] @ adapters[module + DOWN + "weight"]
        merged[name] = weight
    return merged
