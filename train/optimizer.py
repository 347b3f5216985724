"""AdamW with weight decay on matrices only."""

import torch
from torch import nn

from train.settings import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the model's parameters (Loshchilov and Hutter, arXiv:1711.05101), fused into one kernel.

    Vectors (norm weights) are not decayed: pulling a scale towards zero regularises nothing.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert settings.lr is not None
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
