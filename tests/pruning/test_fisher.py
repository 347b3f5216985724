"""The Fisher information of hidden states against autograd through transformers' whole model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.packing import IGNORE
from models.foreign import visible
from pruning.blocks import Blocks, Rows
from pruning.fisher import information
from tests.models.test_foreign import write_folder
from tests.pruning.test_blocks import CPU, KINDS, some_rows


def exact_information(folder: Path, rows: Rows, layer: int) -> torch.Tensor:
    """Of the hidden state after a layer, without a draw: the mean over all tokens that could be drawn."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = torch.zeros(model.config.hidden_size, model.config.hidden_size)
    for tokens, targets, positions in zip(rows.inputs, rows.targets, rows.positions, strict=True):
        found: list[torch.Tensor] = []
        hook = model.model.layers[layer].register_forward_hook(lambda module, args, out, to=found: to.append(out))
        mask = visible(positions, torch.float32)
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        hook.remove()
        log_p = logits.log_softmax(-1)
        for row, place in (targets != IGNORE).nonzero().tolist():
            chance = log_p[row, place].detach().exp()
            for token, share in enumerate(chance):
                (slope,) = torch.autograd.grad(log_p[row, place, token], found[0], retain_graph=True)
                relative = slope * found[0].detach().square().mean(-1, keepdim=True).sqrt()
                total += share * torch.einsum("btd,bte->de", relative, relative)
    return total / total.diagonal().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_come_near_the_exact_information(kind: str, tmp_path: Path) -> None:
    write_folder(kind, tmp_path)
    few = some_rows(rows=1, length=12)
    # The same text, drawn for again and again.
    many = Rows(few.inputs * 600, few.targets * 600, few.positions * 600, fitted=600)
    found = information(Blocks(tmp_path, CPU), many, 0, lambda done: None)
    assert len(found) == 2
    expected = exact_information(tmp_path, few, 0)
    assert (found[0] - expected).norm() < 0.2 * expected.norm()
    assert (torch.eye(len(expected)) - expected).norm() > 0.4 * expected.norm()


def test_text_without_targets_is_not_felt(tmp_path: Path) -> None:
    write_folder("llama", tmp_path)
    blocks, rows = Blocks(tmp_path, CPU), some_rows(rows=2)
    silent = [targets.clone() for targets in rows.targets]
    silent[0][1] = IGNORE
    with torch.no_grad():
        slopes = blocks.slopes(blocks.embed(rows), replace(rows, targets=tuple(silent)), torch.Generator())
    assert not slopes[0][1].any()
    assert slopes[0][0].any()


def test_the_seed_decides_the_draws(tmp_path: Path) -> None:
    write_folder("llama", tmp_path)
    rows = some_rows()
    one, same, other = (information(Blocks(tmp_path, CPU), rows, seed, lambda done: None)[0] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
