import math
import subprocess
import sys

import pytest
import torch

from bench import peers, train_step
from bench.floor import least
from bench.peers import Batch
from bench.train_step import BASELINE, DEFAULT, Measured, make_step, measure, ratios, why_not
from models import budget, sizes
from models.sizes import ModelConfig
from models.transformer import Transformer
from train.muon import Muon

CONFIG = ModelConfig(2, 32, 4, 2, 8, 48, 64, 32, tied=True, qk_norm=False)


@pytest.mark.parametrize("packed", [False, True])
def test_all_sides_make_the_same_steps(packed: bool) -> None:
    batch = Batch.random(CONFIG, 2, 32, "cpu", packed)
    names = [f"{side} eager fp32" for side in ("transformers", "litgpt", "ours")]
    steps = {name: make_step(CONFIG, batch, name) for name in names if why_not(name, packed) is None}
    assert {"transformers eager fp32", "ours eager fp32"} <= steps.keys()
    losses = {name: [step() for _ in range(3)] for name, step in steps.items()}
    assert losses["ours eager fp32"][2] < losses["ours eager fp32"][0]
    for found in losses.values():
        assert found == pytest.approx(losses["ours eager fp32"], rel=1e-5)


def test_litgpt_takes_no_part_in_rows_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "why_no_litgpt", lambda: None)
    assert why_not("litgpt eager fp32", packed=True) == "knows no documents within a row"
    assert why_not("litgpt eager fp32", packed=False) is None
    assert why_not("ours eager fp32", packed=True) is None


def test_variants_and_the_matrix_rate_take_turns() -> None:
    turns: list[str] = []
    ticks = iter(range(1000))

    def clock() -> float:
        return float(next(ticks))

    steps = {f"{side} eager fp32": lambda side=side: turns.append(side) or 0.0 for side in ("a", "b")}
    found = measure(steps, "cpu", 2, clock)
    assert turns == ["a", "b", "a", "b"]
    assert found.seconds == {"a eager fp32": [1.0, 1.0], "b eager fp32": [1.0, 1.0]}
    assert found.rates == {"fp32": [2 * 1024**3, 2 * 1024**3]}


def test_ratios_are_of_medians_and_to_the_same_setting() -> None:
    seconds = {
        BASELINE: [8.0, 100.0, 8.0],
        "transformers compiled bf16": [4.0],
        "ours compiled bf16": [2.0, 2.0, 9.0],
        "ours compiled fp32": [4.0],
    }
    lines = ratios(Measured(seconds, {"fp32": [50.0], "bf16": [100.0, 3.0, 200.0]}), tokens=16, flops_per_token=5.0)
    assert lines["ours compiled bf16"] == {
        "tokens/s": 8.0,
        "to eager": 4.0,
        "to transformers": 2.0,
        "to litgpt": None,
        "of peak": 0.4,
    }
    assert lines["ours compiled fp32"]["to transformers"] is None
    assert lines["transformers compiled bf16"]["to transformers"] is None


def test_the_floors_products_and_attention_are_the_flops_that_mfu_counts() -> None:
    parts = least(DEFAULT, 512, 256, 4, "adamw")
    norms = DEFAULT.layers * 2 * DEFAULT.width + DEFAULT.width  # MFU counts them as if they multiplied
    counted = 512 * (budget.flops_per_token(DEFAULT, 256) - 6 * norms)
    assert parts["matrix products"].flops + 2 * parts["attention"].flops == counted
    assert parts["matrix products"].seconds(1e9, math.inf) == parts["matrix products"].flops / 1e9


def test_the_floor_of_muon_is_what_its_products_take(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = 0

    def counting(product):
        def counted(x, y):
            nonlocal flops
            flops += 2 * x.numel() * y.shape[-1]
            return product(x, y)

        return counted

    model = Transformer(CONFIG)
    hidden = {name: value for name, value in model.named_parameters() if value.ndim == 2 and "blocks" in name}
    for value in hidden.values():
        value.grad = torch.ones_like(value)
    muon = Muon(list(hidden.items()), model.fused_rows(), lr=1e-3, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    monkeypatch.setattr(torch.Tensor, "__matmul__", counting(torch.Tensor.__matmul__))
    muon.step()
    assert least(CONFIG, 64, 32, 4, "muon")["optimiser and clipping"].flops == flops


def test_bytes_of_adamw_are_what_it_reads_and_writes() -> None:
    config = sizes.size("15m").config
    part = least(config, 512, 256, 4, "adamw")["optimiser and clipping"]
    assert part.flops == 0
    assert part.bytes == (4 + 3 + 1 + 2) * 4 * budget.parameters(config).total
    assert part.seconds(1.0, 1e9) == part.bytes / 1e9


def test_a_size_that_is_not_there_is_one_message() -> None:
    command = [sys.executable, train_step.__file__, "--shape", "15b"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no size is called '15b'")
