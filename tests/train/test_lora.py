"""Adapters: where they start, what is trained, and that merging changes nothing."""

from pathlib import Path

import pytest
import torch

from models.foreign import Architecture
from tests.models.test_foreign import POSITIONS, TOKENS, load, write_folder
from train.engine import fill, materialise
from train.lora import add_adapters, first_values, merge

KINDS = ("qwen2", "phi", "qwen3")  # the last is ours, with fused matrices


def with_adapters(folder: Path, frozen: torch.dtype = torch.float32):
    architecture = Architecture.of(folder)
    with torch.device("meta"):
        model = architecture.build()
        add_adapters(model, 4, 8, frozen)
    materialise(model, torch.device("cpu"))
    fill(model, first_values(architecture.read(folder), seed=0))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_new_adapters_is_the_model(kind: str, tmp_path: Path) -> None:
    write_folder(kind, tmp_path)
    model = with_adapters(tmp_path)
    with torch.no_grad():
        assert model(TOKENS).equal(load(tmp_path)(TOKENS))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * {"qwen2": 7, "phi": 6, "qwen3": 4}[kind]
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    down = next(parameter for name, parameter in model.named_parameters() if ".lora_A." in name)
    assert 0.9 * down.shape[1] ** -0.5 < down.abs().max().item() <= down.shape[1] ** -0.5


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(kind: str, tmp_path: Path) -> None:
    write_folder(kind, tmp_path)
    model = with_adapters(tmp_path)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
        adapters = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
        unmerged, before = model(TOKENS), load(tmp_path)(TOKENS)
        plain, merged = load(tmp_path), merge(adapters, tmp_path, 2.0)
        fill(plain, lambda name, shape: merged[name])
        difference = (plain(TOKENS) - unmerged).abs().max().item()
    print(f"{kind}: merged and unmerged differ by {difference:.1e}")
    assert difference < 1e-5
    assert (unmerged - before).abs().max() > 0.05


def test_gradients_reach_the_adapters_alone_and_frozen_weights_may_be_bf16(tmp_path: Path) -> None:
    write_folder("qwen3", tmp_path)
    model = with_adapters(tmp_path, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS, POSITIONS, TOKENS)[0].backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name
        else:
            assert parameter.dtype == torch.bfloat16
            assert parameter.grad is None, name
