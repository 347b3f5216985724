"""The tokenizer: byte-level BPE, trained on a sample of the stream, saved as transformers saves it.

Text is split as GPT-4's tokenizer splits it, except that every digit stands alone (numbers of any
length are then read alike, which arithmetic needs). Bytes make every text encodable, Chinese too.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
import xxhash
from tokenizers import decoders, models, pre_tokenizers, trainers

from common.errors import UserError
from common.files import new_folder, turn, write_json
from data.chat import CHAT_TEMPLATE
from data.packing import Array
from data.sources import Corpus, DamagedShardError, TextSource, held_out, lines, text_of

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|turn_end|>")
SPECIAL = (PAD, BEGIN, END, *ROLES, *(f"<|reserved_{number}|>" for number in range(9)))
"""Tokens that text never encodes to, ids 0 to 15; the reserved ones can be renamed later."""

FILES = ("tokenizer*.json", "special_tokens_map.json", "chat_template.jinja")
"""Of a tokenizer folder."""

SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
"""A word with at most one leading mark or space, one digit, a run of marks, or white space."""

_CHINESE = re.compile(r"[\u4e00-\u9fff]")

_PROBES = {
    "English": "The quick answer is rarely the whole answer. A small model has to choose what it remembers, and "
    "most of what it reads in a day is soon forgotten; what stays is how words follow one another.",
    "Chinese": "简单的回答很少是完整的回答。一个小模型必须选择它要记住的东西，它一天中读到的大部分内容很快就会被遗忘，"
    "留下来的是词语之间如何相互衔接。",
}


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer folder (``tokenizer.json`` and ``tokenizer_config.json``), ours or another's."""

    folder: Path

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{self.folder / 'tokenizer.json'} cannot be read: {error}") from error
        backend.encode_special_tokens = True  # text that spells a special token stays text
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _special(self) -> dict[str, int | None]:
        try:
            config = json.loads((self.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / 'tokenizer_config.json'} cannot be read: {error}") from error
        ids: dict[str, int | None] = {}
        for kind in ("bos", "eos", "pad"):
            token = config.get(f"{kind}_token")
            text = token["content"] if isinstance(token, dict) else token
            ids[kind] = self._backend.token_to_id(text) if text else None
        return ids

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.vocabulary.values()) + 1

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    @property
    def begin(self) -> int | None:
        """Id that opens documents, or None where the tokenizer has no such token."""
        return self._special["bos"]

    @property
    def end(self) -> int:
        """Id that closes documents; UserError where there is none."""
        if self._special["eos"] is None:
            raise UserError(f"the tokenizer in {self.folder} names no eos_token, which closes documents")
        return self._special["eos"]

    @property
    def pad(self) -> int | None:
        """Id that fills up batches, or None."""
        return self._special["pad"]

    @property
    def dtype(self) -> str:
        """The smallest unsigned integers that hold its ids."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"

    @property
    def digest(self) -> str:
        """A hash of ``tokenizer.json``: equal for tokenizers that encode alike."""
        return xxhash.xxh3_64_hexdigest((self.folder / "tokenizer.json").read_bytes())

    def encode_documents(self, texts: list[str]) -> list[Array]:
        """Ids of each text between begin and end; no ids at all for an empty text.

        Where one token is both, as in GPT-2's, only the end is written: two of them would be a document of nothing.
        """
        opening = [] if self.begin in (None, self.end) else [self.begin]
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array([*opening, *one.ids, self.end] if text else [], dtype=self.dtype)
            for text, one in zip(texts, encoded, strict=True)
        ]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """The text of some ids, special tokens left out unless they are asked for."""
        return str(self._backend.decode(ids, skip_special_tokens=not special))

    def copy_to(self, folder: Path) -> None:
        """Copy the tokenizer's files into an existing folder."""
        for pattern in FILES:
            for file in self.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)


def find_tokenizer(name: str, cache: Path) -> Tokenizer:
    """A tokenizer by a folder, a ``tokenizer.json``, or a name on the hub (kept under ``cache``)."""
    path = Path(name).expanduser()
    folder = path.parent if path.name == "tokenizer.json" else path
    if (folder / "tokenizer.json").exists():
        return Tokenizer(folder)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"{name} holds no tokenizer.json; give a tokenizer's folder, a model folder or ORG/NAME on the hub"
        )
    kept = cache / "tokenizers" / name.replace("/", "--")
    with turn(kept):
        if not (kept / "tokenizer.json").exists():
            _download(name, kept)
    return Tokenizer(kept)


def _download(name: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer {name} is no folder here and cannot be had from the hub: {error}") from error
    with new_folder(folder) as temporary:
        found.save_pretrained(temporary)


def check_replaceable(out: Path) -> None:
    """UserError when ``out`` is a file or holds anything but a tokenizer, which writing one there would remove."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give the name of a folder")
    strangers = [path.name for path in sorted(out.glob("*")) if not any(map(path.match, FILES))]
    if strangers:
        raise UserError(f"{out} holds {strangers[0]}, which no tokenizer has; choose another --out")


def train_tokenizer(texts: Iterable[str], vocab: int, folder: Path) -> Tokenizer:
    """Learn a byte-level BPE of ``vocab`` tokens, :data:`SPECIAL` included, and save it.

    A sample too small for so many merges gives fewer tokens.

    Raises:
        UserError: ``vocab`` cannot hold the special tokens and the 256 bytes.
    """
    least = len(SPECIAL) + 256
    if vocab < least:
        raise UserError(
            f"a vocabulary of {vocab} is too small: {len(SPECIAL)} special tokens and 256 bytes make {least}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    with new_folder(folder) as temporary:
        save_tokenizer(backend, temporary)
    return Tokenizer(folder)


def save_tokenizer(backend: tokenizers.Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, the chat template inside.

    What transformers would write, without its import, and with a class that its older versions know too.
    """
    backend.save(str(folder / "tokenizer.json"))
    values = {
        "bos_token": BEGIN,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds one that no causal model takes
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", values)


def sample_texts(corpus: Corpus, budget: int) -> Iterator[str]:
    """Texts of about ``budget`` bytes: each source by its weight, its shards in turn.

    Documents that are held out for validation are left out here too.
    """
    for source, weight in zip(corpus.sources, corpus.weights, strict=True):
        assert isinstance(source, TextSource)
        left = budget * weight
        for text in _in_turn(source, int(left)):
            if left <= 0:
                break
            left -= len(text.encode())
            yield text


def _in_turn(source: TextSource, budget: int) -> Iterator[str]:
    """A few texts from each shard in turn, opening no more shards than the budget (bytes) calls for."""
    wanted = max(1, min(len(source.train), budget // 2**20))
    readers = [_readable(source, number) for number in range(0, len(source.train), len(source.train) // wanted)][
        :wanted
    ]
    while readers:
        for reader in list(readers):
            text = next(reader, None)
            if text is None:
                readers.remove(reader)
            else:
                yield text


def _readable(source: TextSource, number: int) -> Iterator[str]:
    """The training texts of a shard up to where it is damaged; the run itself reports the damage."""
    shard = source.train[number]
    try:
        for count, line in enumerate(lines(shard), 1):
            text = text_of(line, shard, count)
            if text and not (source.holds_out and held_out(text)):
                yield text
    except DamagedShardError:
        return


def is_chinese(text: str) -> bool:
    """Whether a text counts as Chinese: a fifth or more of its characters are."""
    return len(_CHINESE.findall(text)) * 5 >= len(text)


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> dict[str, tuple[float, str]]:
    """Bytes of UTF-8 a token for English and for Chinese, each with what it was measured on.

    A language that does not occur is measured on a short paragraph.
    """
    groups: dict[str, list[str]] = {"English": [], "Chinese": []}
    for text in texts:
        groups["Chinese" if is_chinese(text) else "English"].append(text)
    measured = {}
    for language, found in groups.items():
        on = f"{len(found):,} documents of the corpus" if found else "a short paragraph: the corpus has no such text"
        sample = found or [_PROBES[language]]
        tokens = sum(len(tokenizer.encode(text)) for text in sample)
        measured[language] = (sum(len(text.encode()) for text in sample) / max(tokens, 1), on)
    return measured
