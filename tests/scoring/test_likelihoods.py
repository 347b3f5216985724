"""Likelihoods against lm-evaluation-harness's own model class, and by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from scoring import likelihoods
from scoring.likelihoods import Likelihoods, likelihood
from scoring.loading import load

PAIRS = [
    ("The people of the world", " know the water"),
    ("The people of the world ", "know"),
    ("The people of the world", " A"),
    ("The people of the world", " B"),
    ("", "one day"),
    ("How many?\n", "12"),
    ("word " * 60, "more of the same words"),
    ("短", "的文字"),
]
TEXTS = ["one day", "they could go no more " * 40, ""]


@pytest.fixture(scope="module")
def loaded(micro_model: Path) -> tuple[Any, Any]:
    """A model that sees 64 tokens."""
    return load(micro_model, "cpu")


@pytest.fixture(scope="module")
def theirs(loaded: tuple[Any, Any]) -> HFLM:
    model, tokenizer = loaded
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]  # type: ignore[arg-type]


def test_pairs_are_those_of_the_harness(loaded: tuple[Any, Any], theirs: HFLM) -> None:
    expected = theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    found = Likelihoods(*loaded).of_pairs(PAIRS)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]


def test_whole_texts_are_those_of_the_harness(loaded: tuple[Any, Any], theirs: HFLM) -> None:
    rolling = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert Likelihoods(*loaded).of_texts(TEXTS) == pytest.approx(expected, abs=1e-3)


def test_batches_of_any_size_say_the_same(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Likelihoods(*loaded).of_pairs(PAIRS)
    for tokens, logits in ((1, 1), (64, 5), (128, 4096)):
        monkeypatch.setitem(likelihoods.BATCH_TOKENS, "cpu", tokens)
        monkeypatch.setitem(likelihoods.LOGIT_TOKENS, "cpu", logits)
        found = Likelihoods(*loaded).of_pairs(PAIRS)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in whole], abs=1e-4)


def test_letters_after_one_context_share_a_row(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = likelihoods.last_logits

    def watched(model: Any, ids_BT: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(ids_BT.shape))
        return forward(model, ids_BT, *rest)

    monkeypatch.setattr(likelihoods, "last_logits", watched)
    found = Likelihoods(*loaded).of_tokens([([20, 21, 22], [letter]) for letter in range(30, 34)])
    assert shapes == [(1, 3)]
    assert len({value for value, _ in found}) == 4


def test_nothing_more_is_certain(loaded: tuple[Any, Any]) -> None:
    assert Likelihoods(*loaded).of_tokens([([20], []), ([20, 21], [])]) == [(0.0, True)] * 2


def test_a_likelihood_by_hand() -> None:
    logits = torch.tensor([[9.0, 9.0], [0.0, 0.0], [0.0, 1.0]])
    assert likelihood(logits, [0, 1]) == pytest.approx((-0.693147 - 0.313262, True))
    assert likelihood(logits, [1, 0])[1] is False
