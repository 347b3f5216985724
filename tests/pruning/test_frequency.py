"""Counts, what a model expects, against transformers' whole model, and what both say of frequencies."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.packing import IGNORE
from data.tokenizer import Tokenizer
from models.foreign import visible
from pruning.blocks import Blocks
from pruning.frequency import RIDGE, SHAPE, count_tokens, expected_tokens, frequencies
from tests.models.test_foreign import write_folder
from tests.pruning.test_blocks import CPU, KINDS, some_rows


def test_counts_are_of_the_text(micro_model: Path) -> None:
    tokenizer, texts = Tokenizer(micro_model), ["Once upon a time.", "The water and the time."]
    counts = count_tokens(tokenizer, texts)
    ids = np.concatenate(tokenizer.encode_documents(texts))
    assert counts.sum() == len(ids)
    assert counts[tokenizer.end] == len(texts)
    assert not count_tokens(tokenizer, []).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_expects_its_mean_prediction(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(kind, tmp_path)
    monkeypatch.setattr("pruning.head.HEAD_ROWS", 7)  # the vocabulary in parts, the last of them not whole
    rows, done = some_rows(), []
    found = expected_tokens(Blocks(tmp_path, CPU), rows, done.append)
    assert done == [1, 2]
    assert found.sum() == pytest.approx(1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    chances = []
    for tokens, targets, positions in zip(rows.inputs, rows.targets, rows.positions, strict=True):
        mask = visible(positions, torch.float32)
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        chances.append(logits[targets != IGNORE].softmax(-1))
    np.testing.assert_allclose(found, torch.cat(chances).mean(0).numpy(), rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def language() -> dict[str, np.ndarray]:
    """A made-up one of 4,000 tokens by Zipf's law, seen in 20,000 of them, and a model that has an idea of it."""
    draws = np.random.default_rng(0)
    embedding = draws.normal(size=(4_000, 8))
    idea = -1.1 * np.log(1 + draws.permutation(4_000))
    true = np.exp(idea + 0.3 * embedding.sum(1)) * draws.gamma(2.0, 0.5, 4_000)
    true *= 20_000 / true.sum()
    return {"true": true, "counts": draws.poisson(true), "expected": np.exp(idea), "embedding": embedding}


def test_frequencies_are_nearer_than_counts_and_expectation(language, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pruning.frequency.PART", 999)
    embedding = torch.from_numpy(language["embedding"]).bfloat16()
    found = frequencies(language["counts"], language["expected"], embedding)

    def text_without(scores: np.ndarray) -> float:
        """The share of the text that the 2,000 tokens of the lowest scores make up."""
        return float(language["true"][scores.argsort(kind="stable")[:2_000]].sum() / 20_000)

    least = text_without(language["true"])
    assert least < text_without(found) < 1.4 * least
    assert text_without(language["counts"]) > 1.5 * least
    assert text_without(language["expected"]) > 1.5 * least


def test_the_regression_finds_the_likeliest_weights(language) -> None:
    """Of the same model in torch, by automatic differentiation."""
    counts, embedding = torch.from_numpy(language["counts"]), torch.from_numpy(language["embedding"])
    found = frequencies(language["counts"], language["expected"], embedding)
    prior = SHAPE / ((counts + SHAPE) / torch.from_numpy(found) - 1)
    inputs = torch.cat([torch.ones(4_000, 1), torch.from_numpy(language["expected"]).log()[:, None], embedding], 1)
    weights = torch.linalg.lstsq(inputs, prior.log()).solution.requires_grad_()
    torch.testing.assert_close(inputs @ weights, prior.log(), rtol=0, atol=2e-3)
    likelihood = torch.distributions.NegativeBinomial(SHAPE, logits=inputs @ weights - math.log(SHAPE))
    loss = -likelihood.log_prob(counts).sum() + RIDGE / 2 * embedding.square().mean() * weights[2:].square().sum()
    loss.backward()
    assert weights.grad.abs().max() < 0.1
