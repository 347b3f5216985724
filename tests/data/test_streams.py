"""The order of the data: property tests on small corpora of one-token words."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.loader import Loader, Order
from data.packing import Layout, one_a_row
from data.prepare import prepare
from data.settings import Mix
from data.sources import Corpus, held_out, open_source
from data.streams import make_plans, share_streams
from data.tokenizer import Tokenizer
from tests.conftest import write_corpus

corpora = st.lists(
    st.lists(st.text("abcdefgh ", min_size=0, max_size=40), min_size=0, max_size=14), min_size=1, max_size=6
).filter(lambda shards: sum(bool(text) for shard in shards for text in shard) >= 1)


def write_both(folder: Path, shards: list[list[str]], tokenizer: Tokenizer) -> tuple[Corpus, Corpus]:
    """The same corpus as text and prepared."""
    write_corpus(folder / "text", shards, ["validation text"])
    source = open_source(str(folder / "text"))
    list(prepare(source, tokenizer, folder / "prepared", workers=0))
    return Corpus.open(Mix.parse(str(folder / "text"))), Corpus.open(Mix.parse(str(folder / "prepared")))


def order(
    corpus: Corpus, tokenizer: Tokenizer, streams: int, seq_len: int = 8, seed: int = 0, layout: Layout = "packed"
) -> Order:
    return Order(corpus, tokenizer.folder, seq_len, streams, seed, layout=layout)


def take(loader: Loader, rows: int, times: int = 1) -> list[list[int]]:
    return np.concatenate([loader.take(rows) for _ in range(times)]).tolist()


@settings(deadline=None, max_examples=40)
@given(corpora, st.integers(1, 7), st.integers(1, 12), st.integers(0, 3))
def test_every_document_is_seen_once_an_epoch_streamed_and_prepared(tokenizer, shards, streams, seq_len, seed) -> None:
    with tempfile.TemporaryDirectory() as name:
        text, prepared = write_both(Path(name), shards, tokenizer)
        plans = make_plans(text, streams, seed)
        documents = [[doc.tolist() for doc in tokenizer.encode_documents(shard)] for shard in shards]
        expected = []
        for plan in plans:
            own = [doc for part in plan.parts for doc in documents[part.shard][part.phase :: part.stride]]
            expected.append([token for doc in own for token in doc])
        assert sorted(t for tokens in expected for t in tokens) == sorted(
            t for shard in documents for doc in shard for t in doc
        )
        if not all(expected):
            for corpus in (text, prepared):
                with pytest.raises(UserError, match="too few for so many streams"):
                    take(Loader(order(corpus, tokenizer, streams, seq_len, seed)), streams, 1)
            return
        rounds = 2 + max(map(len, expected)) // seq_len
        rows = take(Loader(order(text, tokenizer, streams, seq_len, seed)), streams, rounds)
        assert rows == take(Loader(order(prepared, tokenizer, streams, seq_len, seed)), streams, rounds)
        for stream, tokens in enumerate(expected):
            own = rows[stream::streams]
            flat = [token for row in own for token in row[:-1]]
            repeated = tokens * (len(flat) // len(tokens) + 2)
            assert flat == repeated[: len(flat)]
            assert [row[-1] for row in own] == [repeated[(i + 1) * seq_len] for i in range(len(own))]


@settings(deadline=None, max_examples=12)
@given(corpora, st.integers(1, 7), st.integers(1, 12), st.integers(0, 3))
def test_a_padded_row_is_a_document_streamed_and_prepared(tokenizer, shards, streams, seq_len, seed) -> None:
    with tempfile.TemporaryDirectory() as name:
        text, prepared = write_both(Path(name), shards, tokenizer)
        encoded = [tokenizer.encode_documents(shard) for shard in shards]
        expected = []
        for plan in make_plans(text, streams, seed):
            own = [doc for part in plan.parts for doc in encoded[part.shard][part.phase :: part.stride] if len(doc)]
            expected.append(one_a_row(own, seq_len, tokenizer.end).tolist() if own else [])
        for corpus in (text, prepared):
            loader = Loader(order(corpus, tokenizer, streams, seq_len, seed, "padded"))
            if not all(expected):
                with pytest.raises(UserError, match="too few for so many streams"):
                    take(loader, streams, 1)
                continue
            rows = take(loader, streams, 2 + max(map(len, expected)))
            for stream, own in enumerate(expected):
                found = rows[stream::streams]
                assert found == (own * len(found))[: len(found)]  # and then the next epoch


@settings(deadline=None, max_examples=25)
@given(
    corpora,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 5),
    st.integers(1, 6),
    st.sampled_from(["packed", "padded"]),
)
def test_a_run_goes_on_exactly_in_either_form_and_on_any_number_of_ranks(
    tokenizer, shards, before, after, steps, more, layout
) -> None:
    streams, rows = 4, 8
    with tempfile.TemporaryDirectory() as name:
        text, prepared = write_both(Path(name), shards, tokenizer)
        try:
            whole = take(Loader(order(text, tokenizer, streams, layout=layout)), rows, steps + more)
        except UserError:
            return  # a stream without documents, which another test is about
        text, prepared = (order(corpus, tokenizer, streams, layout=layout) for corpus in (text, prepared))
        ranks = [Loader(text, rank=rank, world_size=before) for rank in range(before)]
        first = [[take(loader, rows) for loader in ranks] for _ in range(steps)]
        state = {"rows": ranks[0].rows, "positions": {}}
        for loader in ranks:
            state["positions"] |= loader.state()["positions"]
        state = json.loads(json.dumps(state))
        ranks = [Loader(prepared, rank=rank, world_size=after, state=state) for rank in range(after)]
        second = [[take(loader, rows) for loader in ranks] for _ in range(more)]
        got = [row for parts in first + second for together in zip(*parts, strict=True) for row in together]
        assert got == whole


def test_shards_are_dealt_whole_or_their_documents_in_turn(tmp_path: Path) -> None:
    few = Corpus.open(Mix.parse(str(write_corpus(tmp_path / "few", [["a"], ["b"], ["c"]], ["v"]))))
    plans = make_plans(few, 7, seed=0)
    dealt = sorted((part.shard, part.phase, part.stride) for plan in plans for part in plan.parts)
    assert [stride for _, _, stride in dealt] in ([3, 3, 3, 2, 2, 2, 2], [2, 2, 3, 3, 3, 2, 2], [2, 2, 2, 2, 3, 3, 3])
    assert {(shard, phase) for shard, phase, _ in dealt} >= {(shard, phase) for shard in range(3) for phase in (0, 1)}
    many = Corpus.open(Mix.parse(str(write_corpus(tmp_path / "many", [["a"]] * 10, ["v"]))))
    plans = make_plans(many, 4, seed=0)
    assert sorted(len(plan.parts) for plan in plans) == [2, 2, 3, 3]
    assert sorted(part.shard for plan in plans for part in plan.parts) == list(range(10))
    assert make_plans(many, 4, seed=1) != plans


def test_sources_share_the_streams_by_weight_and_evenly_in_time() -> None:
    owners = share_streams([0.75, 0.25], 64)
    assert owners.count(0) == 48
    assert all(owners[start : start + 8].count(1) == 2 for start in range(0, 64, 8))


def test_a_weight_too_small_for_a_stream_is_refused(tmp_path: Path) -> None:
    a, b = (write_corpus(tmp_path / name, [["x"]], ["v"]) for name in "ab")
    with pytest.raises(UserError, match=r"--loader.streams 128"):
        make_plans(Corpus.open(Mix.parse(f"{a}=0.99,{b}=0.01")), 16, seed=0)


def test_held_out_documents_are_not_trained_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [f"document {number}" for number in range(2000)]
    write_corpus(tmp_path, [texts])
    source = open_source(str(tmp_path))
    kept = [text for text in texts if not held_out(text)]
    assert 0 < len(texts) - len(kept) < 40
    loader = Loader(order(Corpus((source,), (1.0,)), tokenizer, 1, 16))
    expected = np.concatenate(tokenizer.encode_documents(kept))
    rows = take(loader, len(expected) // 16)
    assert [token for row in rows for token in row[:-1]] == expected[: len(rows) * 16].tolist()


def test_uneven_loads_are_refused_with_numbers(corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="64 streams cannot be shared evenly by 3 devices"):
        Loader(order(Corpus.open(Mix.parse(str(corpus))), tokenizer, 64), world_size=3)
