import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import peers, train_gpu
from bench.peers import Batch
from bench.train_gpu import (
    OUT_OF_MEMORY,
    Figures,
    Line,
    Setting,
    Trainee,
    Variant,
    all_variants,
    document_positions,
    make_lines,
    measure,
)
from models import budget, gpus, sizes
from models.sizes import ModelConfig
from tests.conftest import ROOT, run_command
from tests.forked import forked
from train.plan import Machine, Workload, best

CONFIG = ModelConfig(2, 32, 4, 2, 8, 48, 64, 32, tied=True, qk_norm=False)
SCRIPT = "bench/train_gpu.py"
"""Models this small only lose by more, most of all beside other tests."""


def setting(rows: int = 2, optimizer: str = "adamw", precision: str = "fp32", may_halve: bool = False) -> Setting:
    fit = best(Workload(CONFIG, Machine(gpus.cpu(2**33)), rows=rows, seq_len=32, precision="32", optimizer="adamw"))
    assert fit.micro_rows == rows
    return Setting(CONFIG, 32, torch.device("cpu"), precision, False, optimizer, fit, may_halve)


def test_a_line_for_every_variant_with_the_flops_of_the_budget(tmp_path: Path) -> None:
    shape = "--sizes tiny --seq-len 64 --micro-rows 2 --rounds 1 --steps 1 --device cpu --no-compile"
    done = forked().run(SCRIPT, *shape.split(), "--json", tmp_path / "lines.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    flops = budget.flops_per_token(sizes.size("tiny").config, 64)
    assert f"= {flops:,} FLOPs a token" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    for line in lines:
        assert (line["size"], line["micro_rows"], line["flops_per_token"]) == ("tiny", 2, flops)
        assert all(math.isfinite(line[name]) for name in ("tokens_per_second", "step_ms", "first_loss"))
        assert line["tokens_per_second"] == pytest.approx(128_000 / line["step_ms"])
        assert line["mfu"] is None
        row = re.search(rf"^tiny +{line['variant']} +2 +([\d,]+) +- +([\d.,]+) +- +(-|[\d.]+)", done.stdout, re.M)
        assert row is not None
        assert row[1] == format(line["tokens_per_second"], ",.0f")
    expected = ["ours eager", "ours eager, documents", "transformers eager"]
    assert [line["variant"] for line in lines if not line["variant"].startswith("litgpt")] == expected


WITH_LITTLE_INSTALLED = """
import runpy, sys
sys.modules.update(dict.fromkeys(("jsonargparse", "datasets", "deepspeed", "lm_eval", "litgpt", "tensorboard", "rich")))
script, *shape = sys.argv[1:]
for words in (["--help"], shape):
    sys.argv[1:] = words
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
"""


def figures(path: Path, **asked: object) -> Figures:
    return Figures(path, {"device": "cpu", "rounds": 1} | asked)


def test_a_call_goes_on_with_what_its_file_lacks(tmp_path: Path) -> None:
    makers = {"a": failing(ValueError(), 99), "b": failing(ValueError(), 99), "c": failing(ValueError("no"), 0)}
    variants = [Variant(name, make) for name, make in makers.items()]
    path = tmp_path / "lines.jsonl"
    first = figures(path)
    now = time.monotonic()
    measure(setting(), variants, 1, 1, now - 1, lambda found: first.add(make_lines("tiny", setting(), found, None)))
    assert not path.exists()  # no turn begins after the deadline
    measure(setting(), variants[:1], 1, 1, keep=lambda found: first.add(make_lines("tiny", setting(), found, None)))
    second = figures(path)
    assert [variant.name for variant in second.missing("tiny", variants)] == ["b", "c"]
    assert [variant.name for variant in second.missing("15m", variants)] == ["a", "b", "c"]
    measure(setting(), variants[1:], 1, 1, keep=lambda found: second.add(make_lines("tiny", setting(), found, None)))
    assert [(line.variant, line.turns, bool(line.trouble)) for line in figures(path).of("tiny")] == [
        ("a", 1, False),
        ("b", 1, False),
        ("c", 0, True),
    ]
    other = figures(path, rounds=2)  # another setting: nothing counts, and nothing is lost
    assert other.of("tiny") == []
    other.add(second.of("tiny")[:1])
    assert len(path.read_text().splitlines()) == 4


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The program in this process, without litgpt."""
    monkeypatch.setattr(peers, "why_no_litgpt", lambda: "not installed")
    monkeypatch.setattr("sys.argv", [SCRIPT, "--device", "cpu", *map(str, words)])
    return train_gpu.main()


def test_a_call_that_goes_on_measures_ours_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines.jsonl"
    shape = "--sizes tiny --seq-len 16 --micro-rows 1 --rounds 1 --steps 1 --no-compile --json".split()
    turns = []
    for more in (["--variants", "ours"], [], []):
        assert call(monkeypatch, *shape, path, *more) == 0
        turns.append(re.findall(r"^(.*?) +first step", capsys.readouterr().out, re.M))
    assert turns == [["ours eager", "ours eager, documents"], ["ours eager", "transformers eager"], []]
    lines = {line["variant"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert lines.keys() == {"ours eager", "ours eager, documents", "transformers eager"}
    ours, theirs = (lines[name]["tokens_per_second"] for name in ("ours eager", "transformers eager"))
    assert lines["transformers eager"]["ours_over_it"] == pytest.approx(ours / theirs)


def test_what_there_was_no_time_for_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--sizes", "tiny", "--minutes", "0", "--no-compile", "--variants", "ours") == 0
    assert re.search(r"^tiny +ours eager +not measured: time is up$", capsys.readouterr().out, re.M)


def test_a_file_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"size": "tiny"}\n')
    assert call(monkeypatch, "--json", path) == 2
    said = capsys.readouterr().err
    assert said == f"{path} holds other lines than this program's; name another file for --json\n"
    assert path.read_text() == '{"size": "tiny"}\n'


def test_it_needs_little_installed() -> None:
    shape = "--sizes tiny --seq-len 16 --micro-rows 1 --rounds 1 --steps 1 --device cpu --no-compile --variants ours"
    done = run_command("-c", WITH_LITTLE_INSTALLED, ROOT / SCRIPT, *shape.split(), environment={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "--micro-rows" in done.stdout
    assert "litgpt: not installed" in done.stdout
    assert re.search(r"^tiny +ours eager, documents +1 +\d", done.stdout, re.M)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_all_sides_compute_the_same_and_hold_nothing_between_turns(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainees: list[Trainee] = []
    leave = Trainee.leave
    monkeypatch.setattr(Trainee, "leave", lambda self: (trainees.append(self), leave(self)))
    variants = all_variants(compiled=False, litgpt=False)
    variants.append(Variant("transformers causal", lambda *a: train_gpu.make_llama(*a, compiled=False, causal=True)))
    found = measure(setting(optimizer=optimizer), variants, rounds=2, steps=1)
    losses = {one.variant.name: one.loss for one in found}
    assert losses["transformers eager"] == pytest.approx(losses["ours eager"], rel=1e-5)
    assert losses["transformers causal"] == pytest.approx(losses["ours eager"], rel=1e-5)
    assert losses["ours eager, documents"] != losses["ours eager"]
    assert [len(one.seconds) for one in found] == [2] * 4
    for trainee in trainees:
        assert all(value.untyped_storage().nbytes() == 0 and value.grad is None for value in trainee.named.values())


def test_steps_train_and_every_turn_starts_from_the_first_weights() -> None:
    [ours, *_] = all_variants(compiled=False, litgpt=False)
    trainee = ours.make(setting(), train_gpu.Transformer(CONFIG).state_dict())
    batch = train_gpu.make_batch(setting(), 2, packed=False)
    losses = []
    for _ in range(2):
        trainee.enter()
        losses.append([trainee.step(batch, autocast=False).item() for _ in range(3)])
        trainee.leave()
    assert losses[0] == losses[1]
    assert losses[0][2] < losses[0][0]


def failing(error: Exception, rows: int) -> Callable[[Setting, dict[str, Tensor]], Trainee]:
    """A maker whose model raises with more than so many rows."""

    def make(_: Setting, __: dict[str, Tensor]) -> Trainee:
        model = nn.Linear(1, 1)

        def loss(batch: Batch) -> Tensor:
            if len(batch.tokens) > rows:
                raise error
            return model(torch.ones(1, 1)).square().sum()

        weights = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
        return Trainee(model, loss, weights, lambda: [train_gpu.adamw(list(model.parameters()))])

    return make


@pytest.mark.parametrize(
    ("most", "may_halve", "rows", "trouble"),
    [(2, True, 2, ""), (2, False, 8, OUT_OF_MEMORY), (0, True, 1, OUT_OF_MEMORY)],
)
def test_out_of_memory_halves_the_plans_rows(most: int, may_halve: bool, rows: int, trouble: str) -> None:
    variants = [Variant("large", failing(torch.OutOfMemoryError(), most)), Variant("small", failing(ValueError(), 99))]
    large, small = measure(setting(8, may_halve=may_halve), variants, rounds=2, steps=1)
    assert (large.rows, large.trouble) == (rows, trouble)
    assert len(large.seconds) == (0 if trouble else 2)
    assert (small.rows, len(small.seconds)) == (8, 2)


def test_a_variant_that_fails_costs_only_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def unmakable(_: Setting, __: dict[str, Tensor]) -> Trainee:
        raise KeyError("padded_vocab_size")

    makers = {"a": failing(ValueError("no such\nkernel"), 0), "b": unmakable, "c": failing(ValueError(), 99)}
    found = measure(setting(), [Variant(name, make) for name, make in makers.items()], rounds=1, steps=1)
    assert [one.trouble for one in found] == [
        "failed: ValueError: no such",
        "failed: KeyError: 'padded_vocab_size'",
        "",
    ]
    train_gpu.print_table(make_lines("tiny", setting(), found, None))
    assert re.search(r"^tiny +a +2 +failed: ValueError: no such$", capsys.readouterr().out, re.M)


def lines_at(share: float, gpu: str, size: str = "c4-130m") -> list[Line]:
    """Lines of ours and transformers, ours at this share of an H100's peak and transformers at a quarter of it."""
    config = sizes.size(size).config
    fit = best(Workload(config, Machine(gpus.gpu(gpu)), rows=32, seq_len=2048, precision="bf16", optimizer="adamw"))
    one = Setting(config, 2048, torch.device("cpu"), "bf16", True, "adamw", fit, True)
    variants = all_variants(compiled=True, litgpt=False)
    flops = fit.micro_rows * 2048 * budget.flops_per_token(config, 2048)
    found = [train_gpu.Measurement(variant, fit.micro_rows) for variant in variants]
    for measurement in found:
        mfu = share if measurement.variant.name.startswith("ours") else share / 4
        measurement.seconds = [9.0, flops / 989e12 / mfu, 0.0]
    return make_lines(size, one, found, gpus.gpu(gpu))


def test_mfu_ratio_and_bar() -> None:
    ours, documents, theirs, *_ = lines_at(0.46, "h100-80g")
    assert (ours.mfu, theirs.ours_over_it, theirs.mfu) == pytest.approx((0.46, 4, 0.115))
    assert (ours.ours_over_it, documents.ours_over_it) == (None, None)
    assert (ours.bar, ours.met) == (0.45, True)
    assert (documents.bar, theirs.bar) == (None, None)
    assert lines_at(0.44, "h100-80g")[0].met is False
    assert lines_at(0.49, "h100-80g", "c4-1b")[0].met is False
    assert lines_at(0.49, "h100-80g", "1b")[0].bar is None


def test_the_bar_is_one_h100s() -> None:
    [ours, *_] = lines_at(0.1, "a100-80g")
    assert ours.mfu == pytest.approx(0.1 * 989 / 312)
    assert (ours.bar, ours.met) == (0.45, None)


def test_documents_fill_the_row() -> None:
    for seed in range(20):
        positions = list(document_positions(64, random.Random(seed)))
        assert len(positions) == 64
        assert 4 <= positions.count(0) <= 8
        assert all(after in (0, before + 1) for before, after in itertools.pairwise(positions))


def test_rows_are_the_plans() -> None:
    args = argparse.Namespace(
        device="cpu", micro_rows=None, seq_len=256, precision="fp32", optimizer="adamw", compile=False
    )
    planned = train_gpu.make_setting("tiny", args)
    assert (planned.fit.micro_rows, planned.may_halve) == (16, True)
    args.micro_rows = 3
    asked = train_gpu.make_setting("tiny", args)
    assert (asked.fit.micro_rows, asked.may_halve) == (3, False)
