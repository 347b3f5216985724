"""The factor of the last norm, held to what autograd says of transformers' logits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.packing import make_batch
from pruning import head
from pruning.blocks import Blocks, Rows
from pruning.importance import by_chance
from pruning.shapes import Shape
from pruning.sweep import Sweep
from pruning.temperature import sharpness
from tests.models.test_foreign import write_folder
from tests.pruning.test_blocks import CPU, KINDS

Found = tuple[list[Tensor], list[Tensor]]


def states(width: int, noise: float) -> Found:
    """Hidden states of a model, by chunks, and those of one that is cut."""
    generator = torch.Generator().manual_seed(0)
    dense = [torch.randn(2, 24, width, generator=generator) for _ in range(2)]
    return dense, [chunk + noise * torch.randn(chunk.shape, generator=generator) for chunk in dense]


def divergence(folder: Path, found: Found, factor: Tensor, kept: list[int] | None) -> Tensor:
    """Mean KL from the whole model's prediction to the pruned one's, the head's bias apart."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    norm = getattr(model.model, "final_layernorm", None) or model.model.norm
    dense, pruned = (norm(torch.cat(chunks).flatten(0, 1)) for chunks in found)
    rows = slice(None) if kept is None else torch.tensor(kept)
    bias = 0 if model.lm_head.bias is None else model.lm_head.bias[rows]
    weight = model.lm_head.weight[rows]
    log_p, log_q = ((scores @ weight.T + bias).log_softmax(-1) for scores in (dense, factor * pruned))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("kept", [None, list(range(0, 61, 2))], ids=["all-tokens", "half-of-them"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_other_factor_comes_nearer(
    kind: str, kept: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "HEAD_ROWS", 17)
    model = write_folder(kind, tmp_path)
    with torch.no_grad():  # a random model's prediction is nearly flat
        model.lm_head.weight *= 8
        if model.lm_head.bias is not None:
            model.lm_head.bias += torch.arange(61) % 3
    model.save_pretrained(tmp_path)
    found = states(32, noise=0.7)
    with torch.no_grad():
        factor = sharpness(Blocks(tmp_path, CPU), *found, kept)
    assert 0.3 < factor < 0.95
    leaf = torch.tensor(factor, requires_grad=True)
    (slope,) = torch.autograd.grad(divergence(tmp_path, found, leaf, kept), leaf)
    one = torch.tensor(1.0, requires_grad=True)
    (at_one,) = torch.autograd.grad(divergence(tmp_path, found, one, kept), one)
    assert abs(slope) < 1e-3 * abs(at_one)


def swept(folder: Path, rows: Rows) -> tuple[list[Tensor], float]:
    """The weights of all blocks, half of whose feed-forward units went by chance, and the factor."""
    blocks, generator = Blocks(folder, CPU), torch.Generator().manual_seed(0)
    now = Shape.of(blocks.values)
    sweep = Sweep(blocks, rows, replace(now, ffn=24), weighed=lambda *_: by_chance(now, generator), repair=True)
    with torch.no_grad():
        weights = [tensor for layer in range(blocks.layers) for tensor in sweep.cut(layer).values()]
        return weights, sweep.sharpness(None)


def test_text_that_stands_apart_decides_the_factor_and_no_weights(tmp_path: Path) -> None:
    write_folder("llama", tmp_path)
    ids = np.random.default_rng(0).integers(3, 61, (10, 25))
    weights, factor = swept(tmp_path, Rows.of(make_batch(ids, 2), apart=3))
    ids[7:] = ids[:3]
    same, other = swept(tmp_path, Rows.of(make_batch(ids, 2), apart=3))
    assert all(map(torch.equal, weights, same))
    assert factor != other


def test_a_model_that_lost_nothing_stays_as_sure(tmp_path: Path) -> None:
    write_folder("llama", tmp_path)
    dense, _ = states(32, noise=0.0)
    with torch.no_grad():
        assert sharpness(Blocks(tmp_path, CPU), dense, dense, None) == pytest.approx(1, abs=1e-5)


def test_states_without_a_prediction_end_it(tmp_path: Path) -> None:
    model = write_folder("llama", tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert sharpness(Blocks(tmp_path, CPU), *states(32, noise=0.5), None) == 1
