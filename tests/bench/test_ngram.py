import math

import numpy as np
import pytest

from bench.ngram import Ngrams, first_tokens, loss_and_bits, predicted
from data.packing import pack
from data.validation import HeldOut

BEGIN, END, VOCAB = 0, 1, 6
DOCUMENTS = [np.array(ids) for ids in ([0, 2, 3, 2, 3, 1], [0, 3, 2, 4, 1], [0, 1])]


def test_pairs_are_counted_within_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Ngrams.count(DOCUMENTS, VOCAB)
    pairs = {
        divmod(pair, VOCAB): count for pair, count in zip(whole.pairs.tolist(), whole.counts.tolist(), strict=True)
    }
    once = [(0, 2), (0, 3), (0, 1), (3, 1), (2, 4), (4, 1)]
    assert pairs == {(2, 3): 2, (3, 2): 2} | dict.fromkeys(once, 1)
    monkeypatch.setattr("bench.ngram.CHUNK", 3)
    again = Ngrams.count(DOCUMENTS, VOCAB)
    assert np.array_equal(again.pairs, whole.pairs)
    assert np.array_equal(again.counts, whole.counts)


def test_probabilities_sum_to_one_after_every_token_seen_or_not() -> None:
    ngrams, every = Ngrams.count(DOCUMENTS, VOCAB), np.arange(VOCAB)
    assert ngrams.unigram(every).sum() == pytest.approx(1)
    for first in every:
        probabilities = ngrams.bigram(np.full(VOCAB, first), every)
        assert probabilities.sum() == pytest.approx(1)
        assert (probabilities > 0).all()


def test_kneser_ney_by_hand() -> None:
    # 8 different pairs, 6 of them seen once and 2 twice: the discount is 6 / (6 + 2·2) = 0.6.
    # 3 follows two tokens: (2 - 0.6)/8; 1, 2, 3, 4 are followers, so 0.6·4/8 is left for the 6 tokens.
    continuation = 1.4 / 8 + 0.6 * 4 / 8 / 6
    expected = (2 - 0.6) / 3 + 0.6 * 2 / 3 * continuation  # after 2, seen 3 times with 2 different followers
    assert Ngrams.count(DOCUMENTS, VOCAB).bigram(np.array([2]), np.array([3]))[0] == pytest.approx(expected)


def test_all_but_the_first_token_of_a_document_is_predicted() -> None:
    held = HeldOut("", pack(DOCUMENTS, 3, END), 10, 3)
    first, second = predicted(held, END)
    assert second.tolist() == [token for document in DOCUMENTS for token in document[1:].tolist()]
    assert first.tolist() == [token for document in DOCUMENTS for token in document[:-1].tolist()]


def test_bits_per_byte_by_hand() -> None:
    loss, bits = loss_and_bits(np.array([0.5, 0.25, 0.125]), 12)
    assert loss == pytest.approx(2 * math.log(2))
    assert bits == pytest.approx(6 / 12)


def test_counting_stops_at_a_document_when_there_are_enough_tokens() -> None:
    assert [len(document) for document in first_tokens(DOCUMENTS, 7)] == [6, 5]
    assert len(list(first_tokens(DOCUMENTS, None))) == 3
