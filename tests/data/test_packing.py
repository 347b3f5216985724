import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packing import IGNORE, make_batch, one_a_row, pack
from models import transformer

END = 2
documents = st.lists(st.lists(st.integers(3, 50), min_size=0, max_size=30), min_size=1, max_size=20)


def as_arrays(texts: list[list[int]]) -> list[np.ndarray]:
    return [np.array([1, *text, END], dtype=np.uint16) for text in texts]


@given(documents, st.integers(1, 16))
def test_every_token_but_the_first_of_each_document_is_predicted_exactly_once(texts, seq_len) -> None:
    docs = as_arrays(texts)
    batch = make_batch(pack(docs, seq_len, END), END)
    predicted = batch.targets[batch.targets != IGNORE].tolist()
    assert predicted == [token for document in docs for token in document[1:].tolist()]
    assert batch.target_count == sum(len(document) - 1 for document in docs)


@given(documents, st.integers(1, 16))
def test_positions_count_within_the_document_and_the_row(texts, seq_len) -> None:
    batch = make_batch(pack(as_arrays(texts), seq_len, END), END)
    for inputs, positions in zip(batch.inputs, batch.positions, strict=True):
        expected = 0
        for place, (token, position) in enumerate(zip(inputs, positions, strict=True)):
            if place and inputs[place - 1] == END:
                expected = 0
            assert position == expected
            expected += 1
            assert token >= 0


def test_a_packed_row_by_hand() -> None:
    batch = make_batch(np.array([[1, 7, 8, END, 1, 9, END, 1]], dtype=np.uint16), END)
    assert batch.inputs.tolist() == [[1, 7, 8, END, 1, 9, END]]
    assert batch.targets.tolist() == [[7, 8, END, IGNORE, 9, END, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]


def test_the_model_and_the_data_agree_on_what_is_ignored() -> None:
    assert IGNORE == transformer.IGNORE == torch.nn.CrossEntropyLoss().ignore_index


@given(documents, st.integers(1, 16))
def test_a_padded_row_is_the_beginning_of_a_document_and_its_filling_predicts_nothing(texts, seq_len) -> None:
    docs = as_arrays(texts)
    batch = make_batch(one_a_row(docs, seq_len, END), END, "padded")
    for document, inputs, targets, positions in zip(docs, batch.inputs, batch.targets, batch.positions, strict=True):
        kept = document[:seq_len].tolist()
        assert inputs.tolist() == kept + [END] * (seq_len - len(kept))
        assert targets.tolist() == kept[1:] + [IGNORE] * (seq_len - len(kept) + 1)
        assert positions.tolist() == list(range(seq_len))


def test_padded_rows_by_hand() -> None:
    whole, cut = np.array([1, 7, END], dtype=np.uint16), np.array([1, 7, 8, 9, 10, END], dtype=np.uint16)
    batch = make_batch(one_a_row([whole, cut], 4, END), END, "padded")
    assert batch.inputs.tolist() == [[1, 7, END, END], [1, 7, 8, 9]]
    assert batch.targets.tolist() == [[7, END, IGNORE, IGNORE], [7, 8, 9, IGNORE]]
