"""Clocks that wait for the device, counts that know of ties, and memory that was really in use."""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.budget import parameters as by_arithmetic
from models.hf import write_model
from models.hf_config import read_config
from models.sizes import ModelConfig
from models.transformer import Transformer
from scoring import speed
from scoring.speed import FEWEST, Spread, measure, parameters

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(micro_model: Path):
    return AutoModelForCausalLM.from_pretrained(micro_model).eval(), AutoTokenizer.from_pretrained(micro_model)


def test_a_small_model_is_timed_over_its_whole_context(pair) -> None:
    report = measure(*pair, CPU, repeats=4)
    assert (report.forward_tokens, report.prompt_tokens, report.new_tokens) == (64, 48, 16)
    assert report.notes == ("64 tokens, not 2,000: the model's whole context",)
    assert report.dtype == "float32"
    assert "threads" in report.device
    for spread in (report.forward_seconds, report.prefill, report.decode):
        assert 0 < spread.lower <= spread.median <= spread.upper
        assert spread.repeats == 4
    assert report.throughput == pytest.approx(1 / report.forward_seconds.median)
    assert 100e6 < report.peak_memory < 20e9  # torch itself, and no wrong unit
    assert "resident in the process" in report.peak_memory_of
    assert measure(*pair, CPU, forward_tokens=32, seconds=0).forward_seconds.repeats == FEWEST
    assert measure(*pair, CPU, forward_tokens=32, seconds=0).notes == ()


def test_what_is_timed_is_what_the_report_says(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair
    calls: list[tuple[int, int, bool]] = []
    plain = model.forward

    def slow(input_ids, **options):
        cached = options.get("past_key_values")
        calls.append(
            (input_ids.shape[1], 0 if cached is None else cached.get_seq_length(), "logits_to_keep" in options)
        )
        time.sleep(0.02)
        return plain(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", slow)
    report = measure(model, tokenizer, CPU, forward_tokens=40, prompt_tokens=20, new_tokens=3, repeats=3)
    decoded = [(1, length, False) for length in (20, 21, 22)]
    assert calls == [(40, 0, False)] * 4 + [(20, 0, True), *decoded] * 4
    assert 0.02 < report.forward_seconds.median < 0.2
    assert report.prefill.median < 20 / 0.02
    assert report.decode.median < 3 / 0.06


def test_a_peak_is_seen_after_it_is_over() -> None:
    peak = speed._Peak(CPU)
    before = peak.bytes()
    block = torch.ones(50_000_000)
    del block
    assert peak.bytes() - before > 150e6
    again = speed._Peak(CPU)
    if "since its start" not in again.what:
        assert peak.bytes() - again.bytes() < 20e6
        assert again.bytes() < before + 100e6


def test_spread_is_of_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_parameters_of_tied_and_untied_models(pair, micro_model: Path, tmp_path: Path) -> None:
    tied, count = read_config(micro_model), by_arithmetic(read_config(micro_model))
    assert tied.tied
    found = parameters(pair[0])
    assert found.non_duplicate == count.total
    assert found.total == count.total + count.embedding
    assert found.without_embeddings == count.layers

    untied = ModelConfig(1, 16, 2, 2, 8, 32, 100, 64, tied=False, qk_norm=False)
    write_model(Transformer(untied).state_dict(), untied, tmp_path, bos=None, eos=1, pad=None)
    count = by_arithmetic(untied)
    found = parameters(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert (found.total, found.non_duplicate, found.without_embeddings) == (count.total, count.total, count.layers)
