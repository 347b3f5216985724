"""Blocks and the loss through them, held to transformers' whole model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from data.packing import IGNORE, make_batch, pack
from models.foreign import visible
from pruning import blocks
from pruning.blocks import Blocks, Rows
from tests.models.test_foreign import write_folder

CPU = torch.device("cpu")
KINDS = ("llama", "qwen2", "qwen3", "phi")


def some_rows(vocab: int = 61, rows: int = 6, length: int = 24) -> Rows:
    """Several documents in a row."""
    rng = np.random.default_rng(0)
    documents, count = [], 0
    while count <= rows * length:
        documents.append(np.append(rng.integers(3, vocab, rng.integers(4, 20)), 2))
        count += len(documents[-1])
    return Rows.of(make_batch(pack(documents, length, 2)[:rows], 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    write_folder(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rows = some_rows()
    with torch.inference_mode():
        whole = Blocks(tmp_path, CPU)
        hidden = whole.embed(rows)
        for layer in range(whole.layers):
            whole.through(whole.block(layer), hidden, rows)
        found = whole.nats(hidden, rows)
        expected = 0.0
        for tokens, targets, positions in zip(rows.inputs, rows.targets, rows.positions, strict=True):
            mask = visible(positions, torch.float32)
            logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
            expected += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
            ).item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_rows_that_stand_apart_have_chunks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 4 * 24)
    batch = make_batch(np.arange(13 * 25).reshape(13, 25), 2)
    rows = Rows.of(batch, apart=5)
    assert [len(chunk) for chunk in rows.inputs] == [4, 4, 4, 1]
    assert rows.fitted == 2
    assert torch.equal(torch.cat(rows.targets), torch.from_numpy(batch.targets))
    assert rows.first(3 * 4 * 24).fitted == 2
    assert [len(chunk) for chunk in Rows.of(batch).inputs] == [4, 4, 4, 1]
    assert Rows.of(batch).fitted == 4


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_are_named(kind: str, tmp_path: Path) -> None:
    model = write_folder(kind, tmp_path)
    blocks = Blocks(tmp_path, CPU)
    inside = {f"model.layers.{layer}.{name}" for layer in range(2) for name in blocks.tensors(layer)}
    assert inside | set(blocks.ends()) == {name for name, _ in model.named_parameters()}


def test_bf16_weights_keep_hidden_states_in_bf16(tmp_path: Path) -> None:
    write_folder("qwen3", tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    blocks = Blocks(tmp_path, CPU)
    assert blocks.stored == torch.bfloat16
    assert {chunk.dtype for chunk in blocks.embed(some_rows())} == {torch.bfloat16}


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_folder("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match=r"mlp.gate_proj.weight is \(48, 32\), expected \(40, 32\)"):
        Blocks(tmp_path, CPU).block(0)
