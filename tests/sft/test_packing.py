"""Rows of whole conversations and their order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import IGNORE
from models.sizes import ModelConfig
from models.transformer import Transformer
from sft.packing import ConversationRows, Mixture, make_batch, pack, padding, rows_in, target_count
from sft.rendering import Rendered

CONFIG = ModelConfig(2, 32, 4, 2, 8, 48, 100, 64, tied=True, qk_norm=True)


def rendered(length: int, seed: int = 0) -> Rendered:
    """Tokens that are all different from those of another seed, the last third learned."""
    rng = np.random.RandomState(seed)
    return Rendered(rng.randint(1, 100, length).astype("<u2"), np.arange(length) >= length * 2 // 3)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_every_conversation_is_in_one_row_that_holds_it(lengths: list[int]) -> None:
    rows = pack(lengths, 40)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 40 for row in rows)
    # No two rows would fit into one: best fit leaves none of them half empty but one.
    free = sorted(40 - sum(lengths[index] for index in row) for row in rows)
    assert sum(space >= 20 for space in free) <= 1


def test_rows_of_lengths_like_alpacas_are_full() -> None:
    lengths = np.random.RandomState(0).lognormal(4.6, 0.6, 20_000).astype(int).clip(8, 512).tolist()
    rows = pack(lengths, 512)
    assert 1 - sum(lengths) / (512 * len(rows)) < 0.005


def test_a_batch_token_by_token() -> None:
    one = Rendered(np.array([5, 6, 7, 8]), np.array([False, False, True, True]))
    two = Rendered(np.array([9, 3, 4]), np.array([False, True, False]))
    batch = make_batch([[one, two], [two]], 7)
    assert batch.inputs.tolist() == [[5, 6, 7, 9, 3, 0, 0], [9, 3, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [
        [IGNORE, 7, 8, 3, IGNORE, IGNORE, IGNORE],
        [3, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert (padding([[one, two], [two]], 7), target_count([[one, two]])) == (7 / 14, 3)


@pytest.mark.parametrize("kind", ["ours", "qwen2", "phi"])
def test_packed_and_one_by_one_are_the_same(kind: str, tmp_path) -> None:
    """Loss and gradients of the same conversations, several to a row and each in a row of its own."""
    if kind == "ours":
        model = Transformer(CONFIG)
    else:
        from tests.models.test_foreign import load, write_folder

        write_folder(kind, tmp_path, vocab_size=100)
        model = load(tmp_path)
    conversations = [rendered(length, length) for length in (5, 11, 17, 8, 20, 13, 9)]
    rows = [[conversations[index] for index in row] for row in pack([one.length for one in conversations], 40)]
    assert len(rows) < 4
    found = []
    for batch in (make_batch(rows, 40), make_batch([[one] for one in conversations], 20)):
        model.zero_grad()
        loss, _ = model(*(torch.from_numpy(part) for part in (batch.inputs, batch.positions, batch.targets)))
        loss.backward()
        found.append((loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])))
    (packed, packed_gradient), (alone, alone_gradient) = found
    difference = (packed_gradient - alone_gradient).norm() / alone_gradient.norm()
    print(f"{kind}: loss {abs(packed - alone) / alone:.1e}, gradient {difference:.1e}")
    assert packed == pytest.approx(alone, rel=1e-5)
    assert difference < 1e-5


def mixture(sizes: tuple[int, ...], weights: tuple[float, ...], seed: int = 0) -> Mixture:
    sources = [[rendered(5 + (7 * n) % 30, 1000 * s + n) for n in range(size)] for s, size in enumerate(sizes)]
    return Mixture(sources, [weight / sum(weights) for weight in weights], 40, seed)


def counts(rows: list[list[Rendered]]) -> dict[int, int]:
    seen: dict[int, int] = {}
    for row in rows:
        for one in row:
            seen[id(one)] = seen.get(id(one), 0) + 1
    return seen


def test_an_epoch_of_one_source_has_every_conversation_once() -> None:
    mix = mixture((50,), (1.0,))
    first, second = mix.epoch(0), mix.epoch(1)
    assert counts(first) == counts(second) == {id(one): 1 for one in mix.sources[0]}
    assert [list(map(id, row)) for row in first] != [list(map(id, row)) for row in second]


def test_weights_are_shares_of_the_conversations() -> None:
    mix = mixture((30, 60), (2.0, 1.0))
    seen: dict[int, int] = {}
    for epoch in range(2):
        rows = mix.epoch(epoch)
        small = {id(one) for one in mix.sources[0]}
        assert sum(count for one, count in counts(rows).items() if one in small) == 60
        for one, count in counts(rows).items():
            seen[one] = seen.get(one, 0) + count
    # The small source was gone through four times, the large one once.
    assert {seen[id(one)] for one in mix.sources[0]} == {4}
    assert {seen[id(one)] for one in mix.sources[1]} == {1}


@settings(deadline=None, max_examples=25)
@given(
    world=st.sampled_from([1, 2, 4]), steps=st.integers(1, 12), stop=st.integers(0, 12), other=st.sampled_from([1, 2])
)
def test_the_rows_depend_neither_on_ranks_nor_on_stops(world: int, steps: int, stop: int, other: int) -> None:
    """The batches of one rank are those of several, put together, and of a run that goes on from any row."""
    mix = mixture((20, 9), (1.0, 1.0), seed=3)
    whole = ConversationRows(mix)
    expected = [whole.take(4).inputs for _ in range(steps)]
    ranks = [ConversationRows(mix, rank=rank, world_size=world) for rank in range(world)]
    for step in range(steps):
        if step == stop:
            state = ranks[0].merge([rank.state() for rank in ranks])
            assert all(rank.state() == state for rank in ranks)
            ranks = [ConversationRows(mix, rank=rank, world_size=other, row=state["rows"]) for rank in range(other)]
        parts = [rank.take(4).inputs for rank in ranks]
        together = np.empty_like(expected[step])
        for rank, part in enumerate(parts):
            together[rank :: len(ranks)] = part
        assert together.tolist() == expected[step].tolist()


def test_rows_of_epochs_are_counted() -> None:
    mix = mixture((50, 20), (1.0, 1.0))
    first, second, third = (len(mix.epoch(number)) for number in range(3))
    assert rows_in(mix, 1) == first
    assert rows_in(mix, 2.5) == first + second + round(third / 2)
    assert rows_in(mix, 1e-6) == 1
