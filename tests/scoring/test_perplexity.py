"""Perplexity by both protocols, against training's validation loss and against one document at a time."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.distributed import Job
from common.errors import UserError
from data.prepare import prepare
from data.sources import TextSource, open_source
from data.tokenizer import Tokenizer
from data.validation import held_out_texts, read_held_out
from models.hf import load_model, write_model
from scoring import perplexity
from scoring.perplexity import GALORE_TOKENS, Perplexity, c4
from tests.conftest import write_corpus
from train.evaluate import validate


@pytest.fixture(scope="module")
def lively(micro_model: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose weights are large enough that it matters what a token can see."""
    model, folder = load_model(micro_model), tmp_path_factory.mktemp("lively")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 3)
    ids = {"bos": tokenizer.begin, "eos": tokenizer.end, "pad": tokenizer.pad}
    write_model(model.state_dict(), model.config, folder, **ids)
    tokenizer.copy_to(folder)
    return folder


@pytest.fixture(scope="module")
def pair(lively: Path):
    return AutoModelForCausalLM.from_pretrained(lively).eval(), AutoTokenizer.from_pretrained(lively)


def texts_of(corpus: Path) -> list[str]:
    source = open_source(str(corpus))
    assert isinstance(source, TextSource)
    return list(held_out_texts(source))


def losses_alone(model, tokenizer: Tokenizer, texts: list[str], cut: int | None) -> list[float]:
    """The negative log-likelihood of each token that is predicted, one document at a time."""
    losses: list[float] = []
    for ids in tokenizer.encode_documents(texts):
        kept = torch.tensor(ids[:cut].astype("int64"))
        with torch.no_grad():
            chances = model(input_ids=kept[None, :-1]).logits[0].log_softmax(-1)
        losses += (-chances.gather(1, kept[1:, None]).flatten()).tolist()
    return losses


def test_packed_is_the_validation_loss_of_training(pair, lively: Path, tokenizer: Tokenizer, corpus: Path) -> None:
    report = c4(*pair, corpus)
    source = open_source(str(corpus))
    held = read_held_out(source, tokenizer, 64, GALORE_TOKENS)
    figures = validate(load_model(lively).eval(), [held], [1.0], tokenizer.end, 8, torch.device("cpu"), Job())
    assert report.packed.loss == pytest.approx(figures["val/loss"], rel=1e-5)
    assert report.bits_per_byte == pytest.approx(figures["val/bpb"], rel=1e-5)
    assert report.packed.documents == 20
    assert report.packed.length == 64
    assert report.text_bytes == sum(len(text.encode()) for text in texts_of(corpus))


def test_galore_is_the_mean_over_tokens_of_documents_read_alone(pair, tokenizer: Tokenizer, corpus: Path) -> None:
    told: list[tuple[int, int]] = []
    report = c4(*pair, corpus, progress=lambda done, total: told.append((done, total)))
    losses = losses_alone(pair[0], tokenizer, texts_of(corpus), 64)
    assert report.galore.tokens == len(losses)
    assert report.galore.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert report.galore.perplexity == pytest.approx(math.exp(report.galore.loss))
    assert told[-1] == (report.packed.tokens + report.galore.tokens,) * 2
    read = sum(min(len(ids), 64) for ids in tokenizer.encode_documents(texts_of(corpus)))
    assert report.notes == (
        f"the text is {corpus}",
        f"GaLore's protocol reads 10,000,000 tokens; {read:,} were read",
        "GaLore's protocol keeps 256 tokens of a document; the model's context is 64",
    )


def test_short_documents_are_padded_and_the_padding_costs_nothing(pair, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["One.", "And there were many more words than one in the last of them all.", "Two words."]
    corpus = write_corpus(tmp_path, [["x"]], texts)
    losses = losses_alone(pair[0], tokenizer, texts, None)
    report = c4(*pair, corpus)
    assert report.galore.tokens == report.packed.tokens == len(losses)
    assert report.galore.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert report.packed.loss == pytest.approx(report.galore.loss, rel=1e-5)  # nothing is cut, and no row is full


def test_reading_stops_at_the_tokens_asked_for_whatever_the_batch(
    pair, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = c4(*pair, corpus, tokens=450)
    assert few.packed.documents < few.galore.documents < 20
    monkeypatch.setattr(perplexity, "LOGITS", 1)
    one_row_at_a_time = c4(*pair, corpus, tokens=450)
    assert one_row_at_a_time.packed.loss == pytest.approx(few.packed.loss, rel=1e-5)
    assert one_row_at_a_time.galore.loss == pytest.approx(few.galore.loss, rel=1e-5)


def test_text_that_spells_a_special_token_stays_text(pair, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "The mark <|end|> closes a document, and <|begin|> opens one."
    corpus = write_corpus(tmp_path, [["x"]], [text])
    (ids,) = tokenizer.encode_documents([text])
    assert c4(*pair, corpus).packed.tokens == len(ids) - 1


def test_a_hopeless_model_has_an_infinite_perplexity() -> None:
    assert Perplexity(800.0, 1, 1, 1).perplexity == math.inf
    assert math.isnan(Perplexity(math.nan, 1, 1, 1).perplexity)


def test_what_cannot_be_measured_is_said(pair, tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no source 'nowhere'"):
        c4(*pair, "nowhere")
    with pytest.raises(UserError, match="holds no validation text"):
        c4(*pair, write_corpus(tmp_path / "empty", [["only one"]]))
    list(prepare(open_source(str(corpus)), tokenizer, tmp_path / "prepared", workers=0))
    with pytest.raises(UserError, match=f"prepared tokens; perplexity is measured on text: give {corpus} instead"):
        c4(*pair, tmp_path / "prepared")
