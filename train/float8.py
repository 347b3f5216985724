"""Products of the blocks in float8, through torchao.

Inputs, weights and gradients of a linear layer are scaled by their largest value and rounded to eight bits right
before each product (Micikevicius et al., arXiv:2209.05433): e4m3 forward, e5m2 for the gradient. What is stored, sent
between devices and moved by the optimiser stays as it is. Norms, attention, embedding and head are not touched. It
pays where products are large, from about 1b; in small ones scaling and rounding cost more than they save.
"""

from typing import Any

import torch
from torch import nn

from common.errors import UserError

CAPABILITY = (8, 9)
"""Of the first GPUs with products in float8: L4, L40S, RTX 4090, then H100, H200, B200."""

MULTIPLE = 16
"""Rows and columns of a matrix that is multiplied in float8 are a multiple of it."""


def require(device: torch.device) -> None:
    """UserError when the device or the installation has no products in float8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise UserError(
            f"--fp8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or above (L4, L40S, RTX 4090, "
            f"H100, H200, B200); this is {found}: leave it out"
        )
    _torchao()


def convert(model: nn.Module, *, emulate: bool = False) -> int:
    """Have the linear layers of the blocks multiply in float8; returns how many there are.

    Names, shapes and values of the weights stay; so it may come before the model has any, and before it is
    sharded and compiled.

    Args:
        model: ours.
        emulate: round as float8 does and multiply in the higher precision: anywhere, and slowly.

    Raises:
        UserError: torchao is not installed, or no matrix has a shape for it.
    """
    float8 = _torchao()
    names = {name for name, layer in model.named_modules() if name.startswith("blocks.") and _fits(layer)}
    if not names:
        raise UserError(f"--fp8: no matrix of this shape has rows and columns that are multiples of {MULTIPLE}")
    config = float8.Float8LinearConfig(emulate=emulate)
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    return len(names)


def _fits(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)


def _torchao() -> Any:
    try:
        import torchao.float8
    except ImportError as error:
        raise UserError(f"--fp8 needs torchao ({error}); install it: pip install '.[fp8]'") from error
    return torchao.float8
