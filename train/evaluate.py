"""Validation loss, bits per byte and sample continuations."""

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.run_folder import RunFolder
from data.packing import make_batch
from data.tokenizer import Tokenizer
from data.validation import HeldOut


@torch.no_grad()
def validate(
    model: nn.Module, held_out: Sequence[HeldOut], weights: Sequence[float], end: int, rows: int, device: torch.device
) -> dict[str, float]:
    """Loss in nats a token and bits per byte on held-out documents.

    Bits per byte is the summed negative log-likelihood, in bits, over the bytes of the text. It counts the
    end token of each document as a cost and no byte for it, and does not depend on the tokenizer.

    Args:
        model: called as ``model(tokens, positions, targets)``.
        held_out: one set for each source.
        weights: of the sources, for the mean.
        end: id of the token that closes documents.
        rows: rows in a forward pass.
        device: where the model is.

    Returns:
        ``val/loss`` and ``val/bpb``, and where there are several sources both for each, as ``val/loss/NAME``.
    """
    losses, bits = [], []
    for held in held_out:
        nll, count = torch.zeros((), device=device, dtype=torch.float64), 0
        for start in range(0, len(held.rows), rows):
            batch = make_batch(held.rows[start : start + rows], end)
            count += batch.target_count
            parts = (torch.from_numpy(part).to(device) for part in (batch.inputs, batch.positions, batch.targets))
            nll += model(*parts)[1]
        losses.append(nll.item() / max(count, 1))
        bits.append(nll.item() / math.log(2) / max(held.text_bytes, 1))
    total = sum(weights)
    figures = {
        "val/loss": sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / total,
        "val/bpb": sum(weight * bit for weight, bit in zip(weights, bits, strict=True)) / total,
    }
    if len(held_out) > 1:
        for held, loss, bit in zip(held_out, losses, bits, strict=True):
            figures |= {f"val/loss/{held.name}": loss, f"val/bpb/{held.name}": bit}
    return figures


@torch.no_grad()
def continue_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, tokens: int, context: int, device: torch.device, seed: int = 0
) -> str:
    """What the model writes after ``prompt``: sampled at temperature 0.8 from the 40 likeliest tokens.

    Recomputes the row for each token instead of keeping a cache: meant for a few dozen tokens.
    """
    opening = [] if tokenizer.begin is None else [tokenizer.begin]
    ids = opening + tokenizer.encode(prompt)
    first = len(ids)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        row = torch.tensor([ids[-context:]], device=device)
        logits: Tensor = model(row)[0, -1].float().cpu()
        best, choices = logits.topk(min(40, len(logits)))
        pick = torch.multinomial((best / 0.8).softmax(-1), 1, generator=generator)
        token = int(choices[pick])
        if token == tokenizer.end:
            break
        ids.append(token)
    return tokenizer.decode(ids[first:])


def write_samples(run: RunFolder, step: int, samples: dict[str, str]) -> None:
    """Append continuations to the run's ``samples.jsonl``."""
    with open(run.path / "samples.jsonl", "a", encoding="utf-8") as file:
        for prompt, text in samples.items():
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
