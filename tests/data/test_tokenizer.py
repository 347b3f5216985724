import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common.errors import UserError
from data.settings import Mix
from data.sources import Corpus
from data.tokenizer import (
    BEGIN,
    END,
    SPECIAL,
    Tokenizer,
    bytes_per_token,
    check_replaceable,
    find_tokenizer,
    sample_texts,
    train_tokenizer,
)
from tests.conftest import write_corpus

HARD = [
    "Hello, world!",
    " two  spaces\n\n\ttabs ",
    "12345 + 67.8",
    "它说：“你好，世界”。",
    "naïve café 🙂",
    "<|end|> is text here",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", HARD)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(id >= len(SPECIAL) for id in ids)


def test_documents_are_closed_and_empty_ones_have_no_tokens(tokenizer: Tokenizer) -> None:
    full, empty = tokenizer.encode_documents(["know", ""])
    assert full.tolist() == [tokenizer.begin, *tokenizer.encode("know"), tokenizer.end]
    assert empty.tolist() == []


def test_a_token_that_begins_and_ends_documents_is_written_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.copy_to(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": END}))
    [ids] = Tokenizer(tmp_path).encode_documents(["know"])
    assert ids.tolist() == [*tokenizer.encode("know"), tokenizer.end]


def test_only_a_tokenizer_is_replaced_by_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new")
    tokenizer.copy_to(tmp_path)
    check_replaceable(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"holds thesis\.txt, which no tokenizer has"):
        check_replaceable(tmp_path)
    with pytest.raises(UserError, match=r"thesis\.txt is a file"):
        check_replaceable(tmp_path / "thesis.txt")


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("20241")) == 5


def test_transformers_reads_it_the_same(tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    for text in HARD[:5]:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    assert (theirs.bos_token, theirs.eos_token) == (BEGIN, END)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.begin,
        tokenizer.end,
        tokenizer.pad,
    )
    assert len(theirs) == tokenizer.vocab_size == 512
    assert not (tokenizer.folder / "chat_template.jinja").exists()
    turns = [
        {"role": "user", "content": " hi "},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so"},
    ]
    shown = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert shown == "<|begin|><|user|>hi<|turn_end|><|assistant|>yes<|turn_end|><|user|>so<|turn_end|><|assistant|>"


def test_training_is_repeatable(tmp_path: Path) -> None:
    texts = ["the same words again and again " + str(number) for number in range(100)]
    files = [train_tokenizer(texts, 300, tmp_path / name).folder / "tokenizer.json" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_chinese_in_the_sample_pays(tmp_path: Path, shared: Path) -> None:
    english, chinese = shared / "datasets" / "c4", shared / "datasets" / "wikipedia-zh-2024"
    rates = []
    for mix in (f"{english}", f"{english}=0.5,{chinese}=0.5"):
        texts = list(sample_texts(Corpus.open(Mix.parse(mix)), 1_500_000))
        assert sum(len(text.encode()) for text in texts) == pytest.approx(1_500_000, rel=0.1)
        tokenizer = train_tokenizer(texts, 4096, tmp_path / str(len(rates)))
        rates.append({language: rate for language, (rate, _) in bytes_per_token(tokenizer, texts[::20]).items()})
    assert rates[1]["Chinese"] > 1.5 * rates[0]["Chinese"]
    assert rates[0]["English"] > 3


def test_a_sample_takes_from_every_shard(tmp_path: Path) -> None:
    texts = [["a" * 2**19] * 8, ["b" * 2**19] * 8]
    corpus = Corpus.open(Mix.parse(str(write_corpus(tmp_path, texts, ["v"]))))
    assert {text[0] for text in sample_texts(corpus, 2**21)} == {"a", "b"}


@pytest.mark.parametrize("where", ["nowhere", "{tmp}"])
def test_what_is_no_tokenizer_is_explained(tmp_path: Path, where: str) -> None:
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        find_tokenizer(where.format(tmp=tmp_path), tmp_path)


def test_broken_tokenizers_are_explained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        find_tokenizer(str(tmp_path), tmp_path).encode("x")
    tokenizer.copy_to(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names no eos_token"):
        _ = Tokenizer(tmp_path).end


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small: 16 special tokens and 256 bytes make 272"):
        train_tokenizer(["x"], 200, tmp_path / "t")
