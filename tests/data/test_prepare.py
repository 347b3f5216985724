import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.loader import Loader, Order
from data.prepare import prepare
from data.prepared import MANIFEST, PreparedSource
from data.sources import Corpus, lines, open_source, text_of
from data.validation import read_held_out
from tests.conftest import ROOT, write_corpus
from tests.forked import forked


def test_the_folder_holds_every_document_in_order(corpus: Path, tmp_path: Path, tokenizer) -> None:
    source = open_source(str(corpus))
    list(prepare(source, tokenizer, tmp_path / "out", workers=2))
    prepared = PreparedSource.open(tmp_path / "out")
    for text_shard, shard in zip(source.train, prepared.train, strict=True):
        texts = [text_of(line, text_shard, 1) for line in lines(text_shard)]
        documents = tokenizer.encode_documents(texts)
        assert shard.name == text_shard.name
        assert np.array_equal(shard.tokens(0, shard.tokens_count), np.concatenate(documents))
        assert np.diff(shard.bounds().astype(int)).tolist() == [len(document) for document in documents]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["totals"]["documents"] == 450
    assert manifest["totals"]["tokens"] == sum(shard.tokens_count for shard in prepared.train)
    assert manifest["source"] == str(corpus)


def test_ids_above_65535_take_four_bytes(
    corpus: Path, tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "vocab_size", 70_000)
    list(prepare(open_source(str(corpus)), tokenizer, tmp_path / "out", workers=0))
    shard = PreparedSource.open(tmp_path / "out").train[0]
    assert shard.dtype == "<u4"
    assert (tmp_path / "out" / "train-00000.tokens").stat().st_size == 4 * shard.tokens_count


def test_held_out_documents_are_set_apart_as_they_are_when_streaming(tmp_path: Path, tokenizer) -> None:
    write_corpus(tmp_path / "text", [[f"document {shard} {number}" for number in range(700)] for shard in range(2)])
    source = open_source(str(tmp_path / "text"))
    list(prepare(source, tokenizer, tmp_path / "out", workers=0))
    prepared = PreparedSource.open(tmp_path / "out")
    streamed, mapped = (read_held_out(one, tokenizer, 16, 10_000) for one in (source, prepared))
    assert np.array_equal(streamed.rows, mapped.rows)
    assert (streamed.text_bytes, streamed.documents) == (mapped.text_bytes, mapped.documents)
    assert mapped.documents > 0
    rows = [
        Loader(Order(Corpus((one,), (1.0,)), tokenizer.folder, 16, 4, 0)).take(800).tolist()
        for one in (source, prepared)
    ]
    assert rows[0] == rows[1]


def test_a_killed_preparation_goes_on_and_ends_the_same(tmp_path: Path, tokenizer) -> None:
    write_corpus(tmp_path / "text", [[f"words {n} " * 200 for n in range(400)] for _ in range(6)], ["v"])
    words = ["-m", "data", "prepare", "--data", str(tmp_path / "text"), "--tokenizer", str(tokenizer.folder)]
    words += ["--workers", "1", "--out"]
    running = subprocess.Popen(
        [sys.executable, *words, str(tmp_path / "killed")], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("train-*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (tmp_path / "killed" / MANIFEST).exists()
    for out in ("killed", "whole"):
        done = forked().run(*words, tmp_path / out)
        assert done.returncode == 0, done.stderr
    killed, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / out).iterdir() if path.is_file()}
        for out in ("killed", "whole")
    )
    assert set(killed) == set(whole)
    assert all(killed[name] == whole[name] for name in whole)


def test_another_source_or_tokenizer_is_refused(corpus: Path, tmp_path: Path, tokenizer) -> None:
    list(prepare(open_source(str(corpus)), tokenizer, tmp_path / "out", workers=0))
    other = write_corpus(tmp_path / "other", [["x"]], ["v"])
    with pytest.raises(UserError, match="begun with another source and shards"):
        list(prepare(open_source(str(other)), tokenizer, tmp_path / "out", workers=0))
    with pytest.raises(UserError, match="not empty"):
        list(prepare(open_source(str(other)), tokenizer, tmp_path / "other", workers=0))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "bounds"])
def test_a_damaged_shard_is_named_with_the_way_out(corpus: Path, tmp_path: Path, tokenizer, damage: str) -> None:
    list(prepare(open_source(str(corpus)), tokenizer, tmp_path / "out", workers=0))
    path = tmp_path / "out" / ("train-00001.bounds.npy" if damage == "bounds" else "train-00001.tokens")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-8])
    order = Order(Corpus((PreparedSource.open(tmp_path / "out"),), (1.0,)), tokenizer.folder, 32, 3, 0)
    with pytest.raises(UserError, match=r"train-00001 is damaged: .*data prepare"):
        Loader(order).take(300)


def test_files_that_were_removed_are_written_again(tmp_path: Path, tokenizer) -> None:
    """As the message about a damaged shard says, also for held-out documents, which lie in a shard of their own."""
    text = write_corpus(tmp_path / "text", [[f"words of {n}" for n in range(3000)]], [])
    out = tmp_path / "out"
    list(prepare(open_source(str(text)), tokenizer, out, workers=0))
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    for path in [*out.glob("validation-00000.*"), out / "manifest.json"]:
        path.unlink()
    list(prepare(open_source(str(text)), tokenizer, out, workers=0))
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == before


def test_damaged_text_stops_or_is_counted(tmp_path: Path, tokenizer) -> None:
    folder = write_corpus(tmp_path / "text", [[f"words of {n}" for n in range(3000)] for _ in range(2)], ["v"])
    shard = sorted((folder / "en").glob("c4-train*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    source = open_source(str(folder))
    with pytest.raises(UserError, match="c4-train.00001-of-00002.json.gz is damaged"):
        list(prepare(source, tokenizer, tmp_path / "out", workers=0))
    records = list(prepare(source, tokenizer, tmp_path / "out", workers=0, skip_bad_shards=True))
    assert [bool(record["damage"]) for record in records] == [False, True, False]
    assert 0 < records[1]["documents"] < 3000
