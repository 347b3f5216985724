"""Vocabularies cut, and held to the tokenizer they were cut from."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from common.errors import UserError
from data.packing import Array
from data.settings import Mix
from data.sources import Corpus
from data.tokenizer import Tokenizer, sample_texts
from pruning.byte_level import ByteLevelBpe, text_of_token
from pruning.cut import cut_rows
from pruning.frequency import count_tokens
from pruning.vocabulary import (
    KEPT_FILE,
    choose_tokens,
    cut_vocabulary,
    renumbered,
    smallest_vocabulary,
    special_ids,
    write_tokenizer,
)
from tests.conftest import make_text

CHINESE = ["画蛇添足守株待兔", "守株待兔不可取", "画蛇添足不可取", "简单的回答很少是完整的回答"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(2)
    return [make_text(rng, 40) + " " + rng.choice(CHINESE) for _ in range(300)]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as published ones are: special tokens last, and a template that puts one first."""
    folder = tmp_path_factory.mktemp("published")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    begin = backend.token_to_id("<|begin|>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {
            str(begin): {"content": "<|begin|>", "special": True},
            str(begin + 1): {"content": "<|end|>", "special": True},
        },
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def cut(folder: Path, size: int, texts: list[str], out: Path, **options: int) -> list[int]:
    before = Tokenizer(folder)
    kept = choose_tokens(folder, size, count_tokens(before, texts), rows=before.vocab_size, **options)
    out.mkdir()
    write_tokenizer(folder, kept, out, texts)
    return kept


@pytest.mark.parametrize("size", [400, 560])
def test_a_cut_tokenizer_is_the_old_one_on_what_it_kept(
    folder: Path, texts: list[str], size: int, tmp_path: Path
) -> None:
    kept = cut(folder, size, texts, tmp_path / "cut")
    before, after = Tokenizer(folder), Tokenizer(tmp_path / "cut")
    assert len(kept) == size == after.vocab_size
    assert kept == sorted(kept)
    assert json.loads((tmp_path / "cut" / KEPT_FILE).read_text()) == kept
    words = {word: before.vocabulary[word] for word in after.vocabulary}
    assert [words[token] for token, _ in sorted(after.vocabulary.items(), key=lambda item: item[1])] == kept
    whole = 0
    rng = random.Random(3)
    for text in [*texts, *(make_text(rng, 3) for _ in range(200)), "naïve 🙂\n\tdef f(x):  return ２"]:
        old, new = before.encode(text), after.encode(text)
        assert after.decode(new) == text
        if set(old) <= set(kept):
            assert [kept[one] for one in new] == old
            whole += 1
    assert whole > 5


def test_transformers_reads_it_with_its_special_tokens(folder: Path, texts: list[str], tmp_path: Path) -> None:
    kept = cut(folder, 400, texts, tmp_path / "cut")
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert (kept[after.bos_token_id], kept[after.eos_token_id]) == (before.bos_token_id, before.eos_token_id)
    assert after("the water<|end|>")["input_ids"][0] == after.bos_token_id
    assert after("the water<|end|>")["input_ids"][-1] == after.eos_token_id
    assert len(after) == 400


def test_chinese_tokens_are_kept_first(folder: Path, texts: list[str], tmp_path: Path) -> None:
    english = [text.split(".")[0] for text in texts]
    kept_with = cut(folder, 400, english, tmp_path / "with", chinese=40)
    kept_without = cut(folder, 400, english, tmp_path / "without")

    is_chinese = {
        number: any("一" <= char <= "鿿" for char in text_of_token(token))
        for token, number in Tokenizer(folder).vocabulary.items()
    }
    assert sum(map(is_chinese.get, kept_with)) == sum(is_chinese.values()) > 5
    assert not any(map(is_chinese.get, kept_without))
    assert len(Tokenizer(tmp_path / "with").encode(CHINESE[0])) < len(
        Tokenizer(tmp_path / "without").encode(CHINESE[0])
    )
    with pytest.raises(UserError, match=r"of 300 is too small: .* 40 Chinese tokens \(--chinese-tokens\).* make 3\d\d"):
        choose_tokens(folder, 300, np.zeros(0, dtype=np.int64), rows=800, chinese=40)


def test_rows_without_a_token_fill_up_the_matrix(folder: Path, texts: list[str]) -> None:
    before = Tokenizer(folder)
    kept = choose_tokens(folder, before.vocab_size + 6, count_tokens(before, texts), rows=before.vocab_size + 10)
    assert kept == list(range(before.vocab_size + 6))


def test_tokens_on_the_way_are_kept_too(folder: Path) -> None:
    bpe = ByteLevelBpe(folder)
    longest = max((token for token in bpe.vocab if token.isascii()), key=len)
    passed = bpe.passed(longest)
    assert {longest, *longest} <= set(passed)
    made = {left + right for left, right in bpe.merges}
    assert set(passed) - set(longest) <= made
    assert bpe.passed("no such token") == ["no such token"]


def test_matrices_and_configurations_follow(folder: Path) -> None:
    kept = [0, 2, 5]
    matrix = torch.arange(12.0).view(6, 2)
    assert cut_rows(matrix, kept).tolist() == [[0, 1], [4, 5], [10, 11]]
    assert cut_rows(torch.arange(6), kept).tolist() == kept
    config = {"bos_token_id": 2, "eos_token_id": [5, 1], "pad_token_id": 3, "unk_token_id": None, "vocab_size": 6}
    assert special_ids(config) == {"bos_token_id": [2], "eos_token_id": [5, 1], "pad_token_id": [3]}
    assert renumbered(config, kept) == {**config, "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": None}


def test_other_tokenizers_are_refused(tmp_path: Path, folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    others = [
        (content | {"model": {"type": "Unigram", "vocab": {}, "merges": []}}, "no byte-level BPE .Unigram behind Byte"),
        (content | {"pre_tokenizer": None}, "BPE behind no pre-tokenizer.*--vocab keep"),
        (content | {"post_processor": {"type": "RobertaProcessing"}}, "post-processor of an unknown kind, Roberta"),
        ({}, "cannot be read"),
    ]
    for other, message in others:
        (tmp_path / "tokenizer.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=message):
            ByteLevelBpe(tmp_path)


def test_a_real_tokenizer(smollm2: Path, shared: Path, tmp_path: Path) -> None:
    """Half of SmolLM2's tokens encode C4 in hardly more of them, and all of the text comes back."""
    corpus = Corpus.open(Mix.parse(str(shared / "datasets" / "c4" / "en")))
    texts = list(sample_texts(corpus, 1_000_000))
    kept = cut(smollm2, 24_576, texts[:200], tmp_path / "cut", chinese=100)
    before, after = Tokenizer(smollm2), Tokenizer(tmp_path / "cut")
    unseen = texts[400:440]
    assert all(after.decode(after.encode(text)) == text for text in unseen)
    longer = sum(len(after.encode(text)) for text in unseen) / sum(len(before.encode(text)) for text in unseen)
    assert longer < 1.08
    assert [kept[one] for one in (after.begin, after.end, after.pad)] == [before.begin, before.end, before.pad]


def test_what_counts_are_taken_to_say_decides(micro_model: Path, corpus: Path, tmp_path: Path) -> None:
    mix, size, vocab = Mix.parse(str(corpus)), 400, Tokenizer(micro_model).vocab_size
    by_counts = cut_vocabulary(micro_model, tmp_path, size, mix, frequencies=lambda counts: counts, chinese=0)
    gone = next(one for one in range(vocab) if one not in by_counts)

    def frequencies(counts: Array) -> Array:
        assert counts.sum() > 0
        return counts + 5e6 * (np.arange(vocab) == gone)

    assert gone in cut_vocabulary(micro_model, tmp_path, size, mix, frequencies=frequencies, chinese=0)


def test_a_model_folder_is_cut_by_a_corpus(micro_model: Path, corpus: Path, tmp_path: Path) -> None:
    """Special tokens of the configuration stay, and what must stay is known beforehand."""
    smallest = smallest_vocabulary(micro_model, 4_000)
    assert smallest == 256 + 16
    mix = Mix.parse(str(corpus))
    kept = cut_vocabulary(micro_model, tmp_path, 320, mix, frequencies=lambda counts: counts, chinese=4_000)
    assert len(kept) == 320
    assert kept[:16] == list(range(16))  # ours are the first
    with pytest.raises(UserError, match="of 264 is too small"):
        cut_vocabulary(micro_model, tmp_path, 264, mix, frequencies=lambda counts: counts, chinese=4_000)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    assert smallest_vocabulary(tmp_path, 4_000) is None
