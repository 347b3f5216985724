"""Float8 on the CPU, where torchao rounds to eight bits and multiplies in higher precision."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.settings import Count
from models import sizes
from models.sizes import ModelConfig
from models.transformer import Transformer, initial_weight
from train import float8
from train.engine import fill, materialise
from train.settings import TrainSettings, resolve

CONFIG = ModelConfig(2, 32, 2, 1, 16, 64, 128, 32, tied=True, qk_norm=True)


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Of the loss of one row in bf16, by parameter, and the loss."""
    row = torch.arange(17).remainder(7)[None] * 5
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(row[:, :-1], None, row[:, 1:].contiguous())
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}


def converted(config: ModelConfig) -> tuple[Transformer, int]:
    """A model that was converted before it had weights, as a run's is."""
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    count = float8.convert(model, emulate=True)
    materialise(model, torch.device("cpu"))
    fill(model, lambda name, shape: initial_weight(name, shape, config, 0))
    return model, count


def test_products_of_the_blocks_round_to_eight_bits_and_no_others() -> None:
    pytest.importorskip("torchao.float8", reason="needs torchao: pip install '.[fp8]'")
    model, count = converted(CONFIG)
    plain = Transformer(CONFIG)
    assert count == 8
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert model.head.weight is model.embedding.weight
    steps = (1 + torch.arange(32) / 32)[:, None].expand(32, 32)  # a binade has 32 of them in bf16, 8 in e4m3
    found = []
    for layer in (model.blocks[0].attention.out, plain.blocks[0].attention.out):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer.weight.copy_(steps)
            found.append(len(layer(torch.eye(32)[:1]).unique()))
    assert found[0] <= 16
    assert found[1] == 32


def test_gradients_are_near_those_of_bf16() -> None:
    pytest.importorskip("torchao.float8", reason="needs torchao: pip install '.[fp8]'")
    model, _ = converted(CONFIG)
    ours, reference = gradients(model), gradients(Transformer(CONFIG))
    assert ours["loss"] != reference["loss"]
    assert ours["loss"].item() == pytest.approx(reference["loss"].item(), rel=1e-2)
    for name, value in reference.items():
        assert (ours[name] - value).norm() <= 0.2 * value.norm(), name


def test_matrices_of_odd_shape_stay_as_they_are() -> None:
    pytest.importorskip("torchao.float8", reason="needs torchao: pip install '.[fp8]'")
    assert converted(replace(CONFIG, ffn=37))[1] == 4  # qkv and out of two blocks
    with pytest.raises(UserError, match="--fp8: no matrix of this shape has rows and columns that are multiples of 16"):
        converted(replace(CONFIG, width=36, ffn=37))


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"--fp8 needs torchao \(.*\); install it: pip install '.\[fp8\]'"):
        float8.convert(Transformer(CONFIG))


def test_where_it_has_no_place() -> None:
    with pytest.raises(UserError, match=r"--fp8 needs a GPU of compute capability 8.9 or above .* this is a CPU"):
        float8.require(torch.device("cpu"))
    config, run = sizes.size("tiny").config, TrainSettings(size="tiny", tokens=Count(2**20), fp8=True)
    assert resolve(run, config).fp8
    for changes in ({"precision": "32"}, {"strategy": "deepspeed-2"}):
        with pytest.raises(UserError, match="--fp8 stands beside --precision bf16, under --strategy ddp, fsdp or hsdp"):
            resolve(replace(run, **changes), config)
    with pytest.raises(UserError, match="--fp8 multiplies in our own models without adapters"):
        resolve(run, config, own=False)
