import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from common.errors import UserError
from data.loader import Loader, Order
from data.settings import Mix
from data.sources import Corpus
from tests.conftest import ROOT, run_command, write_corpus


@pytest.fixture
def order(corpus: Path, tokenizer) -> Order:
    return Order(Corpus.open(Mix.parse(str(corpus))), tokenizer.folder, 32, 8, 0)


def test_worker_processes_give_the_same_rows_and_state_as_none(order: Order) -> None:
    here, ahead = Loader(order), Loader(order, workers=2)
    try:
        for rows in (3, 16, 5, 40):  # batches that fit neither the workers nor their groups
            assert np.array_equal(here.take(rows), ahead.take(rows))
            assert here.state() == ahead.state()
        again = Loader(order, workers=4, state=ahead.state())
        try:
            assert np.array_equal(here.take(24), again.take(24))
        finally:
            again.close()
    finally:
        ahead.close()


def test_workers_leave_signals_to_the_training_process_and_end_with_the_loader(order: Order) -> None:
    loader = Loader(order, workers=2)
    loader.take(4)
    own = [process.pid for process in loader._ahead._iterator._workers]  # type: ignore[union-attr]
    server = psutil.Process(own[0]).ppid()
    assert "forkserver" in " ".join(psutil.Process(server).cmdline())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for process in (server, *own):  # SLURM signals every process of a step
            os.kill(process, number)
    time.sleep(0.2)
    assert loader.take(100).shape == (100, 33)
    loader.close()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in own)


def test_workers_start_where_a_folder_is_called_data(tmp_path: Path, corpus: Path, tokenizer) -> None:
    (tmp_path / "data").mkdir()
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data.loader import Loader, Order
from data.settings import Mix
from data.sources import Corpus
from pathlib import Path
loader = Loader(Order(Corpus.open(Mix.parse({str(corpus)!r})), Path({str(tokenizer.folder)!r}), 32, 8, 0), workers=2)
print(loader.take(8).shape)
loader.close()
"""
    done = run_command("-c", code, folder=tmp_path)
    assert done.stdout.strip() == "(8, 33)", done.stderr


def test_what_was_passed_over_is_remembered(order: Order) -> None:
    state = Loader(order).state() | {"bad_shards": ["one"]}
    assert Loader(order, state=state).state()["bad_shards"] == ["one"]


def test_ranks_know_their_own_streams_alone_after_going_on(order: Order) -> None:
    ranks = [Loader(order, rank=rank, world_size=2) for rank in range(2)]
    for loader in ranks:
        loader.take(24)
    merged = ranks[0].state() | {
        "positions": {k: v for loader in ranks for k, v in loader.state()["positions"].items()}
    }
    again = [Loader(order, rank=rank, world_size=2, state=merged) for rank in range(2)]
    for loader in again:
        loader.take(8)
    streams = [set(loader.state()["positions"]) for loader in again]
    assert not streams[0] & streams[1]
    assert len(streams[0] | streams[1]) == 8


def test_an_error_in_a_worker_reaches_the_user_as_it_is(tmp_path: Path, tokenizer) -> None:
    folder = write_corpus(tmp_path, [["some words here"] * 50], ["validation"])
    shard = next((folder / "en").glob("c4-train*"))
    shard.write_bytes(shard.read_bytes()[:-30])
    broken = Order(Corpus.open(Mix.parse(str(folder))), tokenizer.folder, 32, 2, 0)
    loader = Loader(broken, workers=2)
    try:
        with pytest.raises(UserError, match=r"^the shard c4-train.00000-of-00001.json.gz is damaged"):
            loader.take(200)
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_shards_can_be_passed_over_and_are_counted(tmp_path: Path, tokenizer, workers: int) -> None:
    texts = [[f"words of shard {shard} number {number}" for number in range(60)] for shard in range(4)]
    folder = write_corpus(tmp_path, texts, ["validation"])
    shard = sorted((folder / "en").glob("c4-train*"))[2]
    shard.write_bytes(shard.read_bytes()[:200])
    order = Order(Corpus.open(Mix.parse(str(folder))), tokenizer.folder, 16, 2, 0, skip_bad_shards=True)
    loader = Loader(order, workers=workers)
    try:
        assert loader.take(400).shape == (400, 17)
        assert loader.bad_shards == {"c4-train.00002-of-00004.json.gz"}
    finally:
        loader.close()
