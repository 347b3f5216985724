"""Calibration and test text: how much, which, and what is written down of it."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.settings import Mix
from data.tokenizer import Tokenizer
from pruning.calibration import read_calibration, read_test
from tests.conftest import write_corpus


def read(corpus: Path | str, tokenizer: Tokenizer, rows: int = 8, seed: int = 0):
    return read_calibration(Mix.parse(str(corpus)), tokenizer, rows, 64, seed)


def test_rows_are_whole_documents_in_an_order_by_the_seed(corpus: Path, tokenizer: Tokenizer) -> None:
    one, same, other = read(corpus, tokenizer), read(corpus, tokenizer), read(corpus, tokenizer, seed=1)
    assert one == same
    assert one.sources[0].texts != other.sources[0].texts
    batch = one.batch(tokenizer)
    assert batch.inputs.shape == (8, 64)
    assert (batch.positions == 0).sum() > 8  # several documents in a row, each its own
    first = tokenizer.encode_documents([one.sources[0].texts[0]])[0][:64]
    assert np.array_equal(batch.inputs[0][: len(first)], first)


def test_the_shares_of_a_mix(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    numbers = write_corpus(tmp_path / "numbers", [["12 7 " * 40] * 50], ["12 7"])
    found = read(f"{corpus}=0.75,{numbers}=0.25", tokenizer)
    batch = found.batch(tokenizer)
    assert batch.inputs.shape == (8, 64)
    seven = tokenizer.encode(" 7")[-1]
    assert [bool((row == seven).sum() > 10) for row in batch.inputs] == [False] * 6 + [True] * 2
    record = found.record()
    assert [source["weight"] for source in record["sources"]] == [0.75, 0.25]
    assert record["tokens"] == 512
    assert record["outside_track_1"] is True  # nobody can tell of a folder


def test_too_little_text_is_refused(corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"tokens of training text, too few for the 6,400,001 that calibration asks"):
        read(corpus, tokenizer, rows=100_000)
    with pytest.raises(UserError, match="1 rows of calibration text are too few for 2 sources"):
        read(f"{corpus}=1,sample=1", tokenizer, rows=1)


def test_held_out_text(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = read_test(str(corpus), tokenizer, 200)
    tokens = sum(map(len, tokenizer.encode_documents(list(found.texts))))
    assert 200 <= tokens < 400
    assert found.text_bytes == sum(len(text.encode()) for text in found.texts)
    small = write_corpus(tmp_path / "small", [["one short document"]])
    with pytest.raises(UserError, match="holds no validation text"):
        read_test(str(small), tokenizer, 200)
