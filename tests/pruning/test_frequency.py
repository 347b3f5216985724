"""Counts, and what a model expects, against transformers' whole model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.packing import IGNORE
from data.tokenizer import Tokenizer
from models.foreign import visible
from pruning.blocks import Blocks
from pruning.frequency import PRIOR_TOKENS, count_tokens, expected_tokens
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
    assert found.sum() == pytest.approx(PRIOR_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    chances = []
    for tokens, targets, positions in zip(rows.inputs, rows.targets, rows.positions, strict=True):
        mask = visible(positions, torch.float32)
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        chances.append(logits[targets != IGNORE].softmax(-1))
    np.testing.assert_allclose(found / PRIOR_TOKENS, torch.cat(chances).mean(0).numpy(), rtol=1e-4, atol=1e-7)
