"""Keeps evaluation data out of training rows: which rows share a run of words with a question that is scored.

The unit is the n-gram of 13 tokens, as in the decontamination of GPT-3 and The Pile: long enough that
ordinary phrases do not share one, short enough that a quoted question does. A token is a run of letters
or digits, whatever its case, or a single character of Chinese or Japanese, which put no spaces between
words; punctuation does not count.

Many questions are shorter than that. One of 8 tokens, the fewest that GPT-3 took, to 12 counts as a single
n-gram of its own length: only a row that repeats all of it overlaps, as a part of it is an ordinary phrase.
A question of 7 tokens or fewer ("What do people do at work?") is an ordinary phrase itself, so it is left
out and counted.
"""

import csv
import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.errors import UserError

LONGEST, SHORTEST = 13, 8
"""Tokens of an n-gram, and of the shortest question that counts as one."""

QUESTION_FIELDS = {
    *("question", "stem", "question_stem"),  # CommonsenseQA, GSM8K, TruthfulQA; OpenBookQA
    *("input", "prompt", "content"),  # BBH, HumanEval, CHID
    *("query", "ctx", "goal", "sentence", "text"),  # ARC, HellaSwag, PIQA, Winogrande, LAMBADA
}
"""What benchmarks call the text that a model is asked, in lower case."""

ANSWER_FIELD = "choices"
"""Nothing below this field is a question: CommonsenseQA's choices have a ``text`` each."""

_SPACELESS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN = re.compile(f"[{_SPACELESS}]|[^\\W_{_SPACELESS}]+")
_NOT_BLANK = re.compile(r"\S")

_BASE = np.uint64(0x9E3779B97F4A7C15)
"""The base of the polynomial over a window's token hashes, modulo 2 ** 64; any odd number of many bits does."""

_BATCH = 16384
"""Texts hashed at once: a few million tokens, so that memory stays small whatever the number of rows."""

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Match:
    """Words of a training text that a question of the evaluation data holds too."""

    words: str
    """As they stand in the training text."""
    file: str
    """Where the question is from, relative to the folder of evaluation data; the first file of several."""


@dataclass(frozen=True)
class _Grams:
    """The n-grams of one length that the questions hold."""

    hashes: Hashes
    """Sorted, each once."""
    questions: NDArray[np.int64]
    """For each hash the first question that holds the n-gram."""

    def look_up(self, windows: Hashes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places in ``windows`` that hold one of the hashes, and the question of each."""
        nearest = np.minimum(np.searchsorted(self.hashes, windows), len(self.hashes) - 1)
        places = np.flatnonzero(self.hashes[nearest] == windows)
        return places, self.questions[nearest[places]]


class Overlap:
    """The n-grams of evaluation data, to look for in training texts."""

    def __init__(self, questions: Iterable[tuple[str, str]]):
        """Take questions, each as (text, file it is from)."""
        self._questions: list[tuple[str, str]] = []
        self.too_short = 0
        """Questions that are left out, as they have too few tokens to be told from ordinary phrases."""
        hashes: dict[int, list[Hashes]] = defaultdict(list)
        numbers: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        for text, file in questions:
            windows = list(_windows(_hashes(_TOKEN.findall(text))))
            if not windows:
                self.too_short += 1
                continue
            length, grams = windows[-1]  # all of a short question, else its windows of the full length
            hashes[length].append(grams)
            numbers[length].append(np.full(len(grams), len(self._questions)))
            self._questions.append((text, file))
        self._grams: dict[int, _Grams] = {}
        for length, parts in hashes.items():
            unique, first = np.unique(np.concatenate(parts), return_index=True)
            self._grams[length] = _Grams(unique, np.concatenate(numbers[length])[first])

    @classmethod
    def of(cls, folder: Path) -> "Overlap":
        """Take the questions of every benchmark in a folder; UserError when it is missing or holds none.

        Files that end in .json, .jsonl or .csv, gzipped or not, are read at any depth. Left out are files
        of training data (``train`` in the name), as they are not scored, and folders of few-shot prompts.
        """
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give the folder that holds the evaluation data")
        overlap = cls((text, str(path.relative_to(folder))) for path in _files(folder) for text in _texts(path))
        if not overlap._questions:
            fields = ", ".join(sorted(QUESTION_FIELDS))
            raise UserError(
                f"{folder} holds no questions of {SHORTEST} words or more: .json, .jsonl or .csv files, "
                f"gzipped or not, with one of the fields {fields}"
            )
        return overlap

    def __len__(self) -> int:
        """How many questions are looked for."""
        return len(self._questions)

    def find(self, texts: Sequence[str]) -> list[int]:
        """Which of the texts hold an n-gram of the evaluation data: their indices, in order."""
        found: list[int] = []
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            found += (start + index for index in self._suspects(batch) if self.matches(batch[index]))
        return found

    def matches(self, text: str) -> list[Match]:
        """The words of one text that the evaluation data holds too, a run of them each, in order of the text."""
        spans = [token.span() for token in _TOKEN.finditer(text)]
        runs: list[tuple[str, int, int]] = []  # file, first token, end
        for file, first, end in sorted(self._hits([text[start:end] for start, end in spans])):
            if runs and runs[-1][0] == file and first <= runs[-1][2]:  # a token further in the same words
                _, first, reached = runs.pop()
                end = max(end, reached)
            runs.append((file, first, end))
        runs.sort(key=lambda run: run[1:])
        return [Match(text[spans[first][0] : spans[end - 1][1]], file) for file, first, end in runs]

    def _suspects(self, texts: Sequence[str]) -> list[int]:
        """The texts with a window whose hash is known; some may hold none, as windows reach over their ends."""
        tokens = [_TOKEN.findall(text) for text in texts]
        ends = np.cumsum([len(words) for words in tokens])
        suspects: set[int] = set()
        for length, windows in _windows(_hashes(chain.from_iterable(tokens))):
            if length in self._grams:
                places, _ = self._grams[length].look_up(windows)
                suspects.update(np.searchsorted(ends, places, side="right").tolist())
        return sorted(suspects)

    def _hits(self, tokens: Sequence[str]) -> Iterator[tuple[str, int, int]]:
        """(file, first token, end) of every n-gram that a question holds, compared as words: a hash proves nothing."""
        for length, windows in _windows(_hashes(tokens)):
            if length not in self._grams:
                continue
            for place, number in zip(*self._grams[length].look_up(windows), strict=True):
                question, file = self._questions[number]
                if _spaced(tokens[place : place + length]) in _spaced(_TOKEN.findall(question)):
                    yield file, int(place), int(place) + length


@cache
def _hash(token: str) -> int:
    return xxhash.xxh3_64_intdigest(token.lower().encode())


def _hashes(tokens: Iterable[str]) -> Hashes:
    return np.fromiter(map(_hash, tokens), dtype=np.uint64)


def _windows(hashes: Hashes) -> Iterator[tuple[int, Hashes]]:
    """(n, hash of each window of n tokens) for n from SHORTEST to LONGEST, as far as there are that many tokens."""
    windows = hashes
    for length in range(2, min(LONGEST, len(hashes)) + 1):
        windows = windows[:-1] * _BASE + hashes[length - 1 :]  # one token more, by Horner's rule
        if length >= SHORTEST:
            yield length, windows


def _spaced(tokens: Sequence[str]) -> str:
    """The tokens as a text in which a run of them is found as a substring, never a part of a token."""
    return f" {' '.join(tokens).lower()} "


def _files(folder: Path) -> list[Path]:
    """The files of evaluation data in a folder, at any depth."""
    endings = (".json", ".jsonl", ".csv")
    files = sorted(path for path in folder.rglob("*") if path.name.removesuffix(".gz").endswith(endings))
    scored = [path for path in files if "train" not in path.name.lower()]
    return [path for path in scored if "prompt" not in str(path.parent.relative_to(folder)).lower()]


def _texts(path: Path) -> Iterator[str]:
    """The questions of a file; UserError names one that cannot be read."""
    opener = gzip.open if path.name.endswith(".gz") else open
    table = path.name.removesuffix(".gz").endswith(".csv")
    try:
        # TruthfulQA's table begins with a byte order mark, and its quoted fields may hold line breaks.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            for record in csv.DictReader(file) if table else _json_values(file.read()):
                yield from _questions_in(record)
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as evaluation data: {error}; replace or remove it") from error


def _json_values(text: str) -> Iterator[Any]:
    """The JSON values that stand one after the other: one document, or lines of records, whatever the file is called.

    Published files do not keep to their endings: CHID's ``test_public.json`` holds lines.
    """
    decoder = json.JSONDecoder()
    end = 0
    while begin := _NOT_BLANK.search(text, end):
        value, end = decoder.raw_decode(text, begin.start())
        yield value


def _questions_in(value: Any) -> Iterator[str]:
    """The texts of the question fields at any depth of a record."""
    if isinstance(value, list):
        for item in value:
            yield from _questions_in(item)
    elif isinstance(value, dict):
        for field, item in value.items():
            if isinstance(item, str) and field.lower() in QUESTION_FIELDS:
                yield item
            elif field != ANSWER_FIELD:
                yield from _questions_in(item)
