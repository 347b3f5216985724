"""The optimisers of a run: AdamW alone, or Muon for the matrices inside the blocks and AdamW for the rest."""

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from train.muon import Muon
from train.settings import OptimizerSettings


def make_optimizers(model: nn.Module, settings: OptimizerSettings, precision: str) -> list[Optimizer]:
    """The optimisers over a model's parameters, which may be sharded already.

    Args:
        model: ours.
        settings: resolved.
        precision: of the run, ``32`` or ``bf16``.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if settings.name == "adamw":
        return [make_adamw([parameter for _, parameter in named], settings)]
    hidden = [(name, parameter) for name, parameter in named if parameter.ndim == 2 and name.startswith("blocks.")]
    hidden_names = {name for name, _ in hidden}
    newton_schulz = precision if settings.newton_schulz == "auto" else settings.newton_schulz
    assert settings.lr is not None
    muon = Muon(
        hidden,
        model.fused_rows(),  # type: ignore[operator]
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        dtype=torch.bfloat16 if newton_schulz == "bf16" else torch.float32,
    )
    return [muon, make_adamw([parameter for name, parameter in named if name not in hidden_names], settings)]


def make_adamw(parameters: list[nn.Parameter], settings: OptimizerSettings) -> AdamW:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), fused into one kernel.

    Vectors (norm weights) are not decayed: pulling a scale towards zero regularises nothing.
    """
    assert settings.lr is not None
    assert settings.beta2 is not None
    return AdamW(
        [
            {"params": [p for p in parameters if _is_matrix(p)], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if not _is_matrix(p)], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Also of a parameter that ZeRO-3 has cut up, which is empty and flat itself."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
