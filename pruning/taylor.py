"""What the loss loses to first order when a weight is set to zero: |weight · gradient|.

This needs the whole model and its gradients in memory, 8 bytes a parameter.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import IGNORE
from models.foreign import visible
from pruning.blocks import Rows

PREFIX = "model.layers."


@torch.enable_grad()
def gradients(folder: Path, rows: Rows, device: torch.device, progress: Callable[[int], None]) -> dict[str, Tensor]:
    """The gradient of the summed loss over all rows for every weight of the blocks, by its name in the folder.

    Args:
        folder: a model folder whose weights fit its ``config.json``.
        rows: calibration text.
        device: where the model is run.
        progress: told how many rows are done.
    """
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    )
    model.to(device).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(PREFIX))
    done = 0
    for chunk in zip(rows.inputs, rows.targets, rows.positions, strict=True):
        for row in zip(*(part.to(device).split(1) for part in chunk), strict=True):
            tokens, targets, positions = row
            mask = visible(positions, torch.float32)
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
            F.cross_entropy(logits[0], targets[0], ignore_index=IGNORE, reduction="sum").backward()
            done += 1
            progress(done)
    return {name: one.grad.cpu() for name, one in model.named_parameters() if one.grad is not None}
