"""Examples of answer formats, made from the rows of Alpaca and Chinese Alpaca alone.

A small model that answers in its own words scores nothing where a program looks for "So the answer is
C." These examples teach the forms of the six tasks, as OpenCompass asks and reads them, without a word of
evaluation data: the texts are those of the rows, and what is said about them is computed (an order of
words, a count) or stands in the row itself. TruthfulQA has no form: it is a bare question.
"""

import ast
import builtins
import json
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError
from common.files import write_text
from data.chat import Conversation

CHOICES, CANDIDATES = "ABCDE", "ABCDEFG"
"""The letters of CommonsenseQA's options and of CHID's idioms."""

# "<noinput>" stands in fields of Alpaca that have no text; half of a surrogate pair has no UTF-8.
_UNFIT = re.compile(r"no ?(in|out)put|[\ud800-\udfff]", re.IGNORECASE)
_WORD = re.compile(r"(?<![\w'’-])[a-z]{3,9}(?![\w'’-])")
_PLAIN_SENTENCE = re.compile(r"(?<!\S)[A-Z][a-z]+(?: [a-z]+){4,9}\.(?!\S)")  # no two ways to count its words
_CHINESE_SENTENCE_END = re.compile(r"(?<=[。！？])|\n")
_PHRASE = re.compile(r"(?<=[，、])[\u4e00-\u9fff]{4}(?=[，、。！？])")  # of four characters, between punctuation


class Row(NamedTuple):
    """A question of the training data and its answer, trimmed."""

    prompt: str
    answer: str


def make_examples(conversations: Sequence[Conversation], count: int, seed: int) -> list[Conversation]:
    """Make ``count`` examples from conversations of one question and one answer, the five kinds in equal shares.

    A kind whose rows are used up (few hold a Python function) leaves its share to the others. The same
    conversations and seed give the same examples.

    Raises:
        UserError: the rows give fewer examples of all kinds together.
    """
    rng = random.Random(seed)
    rows = _rows(conversations)
    kinds = (_multiple_choice, _step_by_step, _arithmetic, _cloze, _functions)
    made = list(islice(_in_turn([kind(rng.sample(rows, len(rows)), rng) for kind in kinds]), count))
    if len(made) < count:
        raise UserError(
            f"only {len(made):,} of {count:,} examples of answer formats can be made from {len(rows):,} rows; "
            "ask for fewer, or give more rows with short answers and plain sentences, as Alpaca has"
        )
    return made


def write_examples(path: Path, examples: Sequence[Conversation], origins: Sequence[str]) -> None:
    """Write examples as JSON lines of ``messages`` and ``derived_from``, the data that their rows are from."""
    lines = (
        json.dumps({"messages": example.messages, "derived_from": list(origins)}, ensure_ascii=False) + "\n"
        for example in examples
    )
    write_text(path, "".join(lines))


def _rows(conversations: Sequence[Conversation]) -> list[Row]:
    rows = []
    for conversation in conversations:
        match conversation.turns:
            case (("user", prompt), ("assistant", answer)) if not _UNFIT.search(conversation.text):
                rows.append(Row(prompt.strip(), answer.strip()))
    return rows


def _in_turn(kinds: Sequence[Iterator[Conversation]]) -> Iterator[Conversation]:
    """One example of each kind after the other; a kind that has no more is passed over."""
    for group in zip_longest(*kinds):
        yield from (example for example in group if example is not None)


def _example(prompt: str, answer: str) -> Conversation:
    return Conversation((("user", prompt), ("assistant", answer)))


def _placed(right: str, wrong: Sequence[str], place: int) -> list[str]:
    """The options in order, the right one at ``place``."""
    return [*wrong[:place], right, *wrong[place:]]


def _lettered(letters: str, options: Sequence[str]) -> str:
    """Lines ``A. option``."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))


# CommonsenseQA: five options, "So the answer is C."


def _multiple_choice(rows: Sequence[Row], rng: random.Random) -> Iterator[Conversation]:
    """Tasks with a short answer; the wrong options are answers of other rows with as many words."""
    tasks = [Row(row.prompt, row.answer.rstrip(".")) for row in rows if _has_short_answer(row)]
    by_length: dict[int, list[str]] = defaultdict(list)
    for answer in {task.answer.lower(): task.answer for task in tasks}.values():
        by_length[len(answer.split())].append(answer)
    places = cycle(range(len(CHOICES)))
    for question, right in tasks:
        others = [answer for answer in by_length[len(right.split())] if answer.lower() != right.lower()]
        if len(others) < len(CHOICES) - 1:
            continue
        place = next(places)
        options = _placed(right, rng.sample(others, len(CHOICES) - 1), place)
        yield _example(
            f"Q:{' '.join(question.split())}  Answer Choices: {_lettered(CHOICES, options)}\nA:",
            f'Of the above choices, "{right}" fits. So the answer is {CHOICES[place]}.',
        )


def _has_short_answer(row: Row) -> bool:
    """Whether a row is an English instruction with an input, a line each, and an answer of six words at most."""
    lines = re.fullmatch(r"[^\n]+\n\n[^\n]+", row.prompt) and not re.search(r'["\n]', row.answer)
    short = len(row.prompt) <= 300 and len(row.answer) <= 60 and 1 <= len(row.answer.rstrip(".").split()) <= 6
    return short and bool(lines) and row.prompt.isascii() and row.answer.isascii()


# BBH: steps, then "So the answer is X." or "So the answer is (C)."


def _step_by_step(rows: Sequence[Row], rng: random.Random) -> Iterator[Conversation]:
    return _in_turn([_alphabetical_order(rows, rng), _longest_word(rows, rng)])


def _alphabetical_order(rows: Sequence[Row], rng: random.Random) -> Iterator[Conversation]:
    """Words of an answer, no two of one first letter, so that the first letters alone give the order."""
    for row in rows:
        words = list({word[0]: word for word in _WORD.findall(row.answer)}.values())
        if len(words) < 3:
            continue
        words = rng.sample(words, rng.randint(3, min(6, len(words))))
        number = {word: ord(word[0]) - ord("a") + 1 for word in words}
        ordered = sorted(words)
        yield _example(
            f"Q: Put these words into alphabetical order: {' '.join(words)}\nA: Let's think step by step.",
            f"Their first letters have these places in the alphabet: {_listed(number, words)}. "
            f"From the lowest to the highest: {_listed(number, ordered)}. So the answer is {' '.join(ordered)}.",
        )


def _longest_word(rows: Sequence[Row], rng: random.Random) -> Iterator[Conversation]:
    """Five words of an answer as options, one of them longer than the others."""
    places = cycle(range(len(CHOICES)))
    for row in rows:
        words = list(dict.fromkeys(_WORD.findall(row.answer)))
        if len(words) < len(CHOICES):
            continue
        *wrong, next_longest, longest = sorted(rng.sample(words, len(CHOICES)), key=len)
        if len(next_longest) == len(longest):
            continue
        wrong = rng.sample([*wrong, next_longest], len(CHOICES) - 1)
        place = next(places)
        options = _placed(longest, wrong, place)
        listed = "\n".join(f"({letter}) {word}" for letter, word in zip(CHOICES, options, strict=True))
        yield _example(
            f"Q: Which of these words has the most letters?\nOptions:\n{listed}\nA: Let's think step by step.",
            f"The words have this many letters: {_listed({word: len(word) for word in options}, options)}. "
            f"The highest number is {len(longest)}, of {longest}. So the answer is ({CHOICES[place]}).",
        )


def _listed(number: dict[str, int], words: Sequence[str]) -> str:
    return ", ".join(f"{word} ({number[word]})" for word in words)


# GSM8K: steps with numbers, then "The answer is N"


def _arithmetic(rows: Sequence[Row], _: random.Random) -> Iterator[Conversation]:
    return _in_turn([_count_words(rows), _count_letters(rows)])


def _plain_sentences(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if found := _PLAIN_SENTENCE.search(row.answer):
            yield found.group()


def _count_words(rows: Sequence[Row]) -> Iterator[Conversation]:
    for sentence in _plain_sentences(rows):
        words = sentence.rstrip(".").split()
        counted = ", ".join(f"{number} {word}" for number, word in enumerate(words, 1))
        yield _worked(
            f'How many words are in the sentence "{sentence}"?',
            f"Count the words: {counted}.\nThere are {len(words)} words.",
            len(words),
        )


def _count_letters(rows: Sequence[Row]) -> Iterator[Conversation]:
    for sentence in _plain_sentences(rows):
        words = sentence.rstrip(".").split()
        total = len(words[0])
        steps = [_listed({word: len(word) for word in words}, words) + "."]
        for word in words[1:]:
            steps.append(f"{total} + {len(word)} = {total + len(word)}")
            total += len(word)
        yield _worked(f'How many letters are in the sentence "{sentence}"?', "\n".join(steps), total)


def _worked(question: str, steps: str, answer: int) -> Conversation:
    return _example(
        f"Question: {question}\nLet's think step by step\nAnswer:",
        f"{steps}\nThe answer is {answer}",
    )


# CHID: a blank and seven candidates, the letter


def _cloze(rows: Sequence[Row], rng: random.Random) -> Iterator[Conversation]:
    """Chinese sentences without one phrase of four characters; the other candidates are phrases of other rows."""
    passages = [found for row in rows if (found := _sentence_with_phrase(row.answer))]
    phrases = list(dict.fromkeys(phrase for _, phrase in passages))
    places = cycle(range(len(CANDIDATES)))
    for sentence, right in passages:
        others = [phrase for phrase in phrases if phrase not in sentence]
        if len(others) < len(CANDIDATES) - 1:
            continue
        place = next(places)
        options = _placed(right, rng.sample(others, len(CANDIDATES) - 1), place)
        choice = "，".join(f"”{letter}“" for letter in CANDIDATES)
        yield _example(
            f"{sentence.replace(right, '______', 1)}\n请选择______处所填的词\n"
            f"{_lettered(CANDIDATES, options)}\n请从{choice}中进行选择。答：",
            CANDIDATES[place],
        )


def _sentence_with_phrase(text: str) -> tuple[str, str] | None:
    """The first sentence with a phrase of four characters between punctuation and no blank yet, and that phrase."""
    for sentence in _CHINESE_SENTENCE_END.split(text):
        phrase = _PHRASE.search(sentence)
        if phrase and 20 <= len(sentence) <= 150 and "_" not in sentence:
            return sentence, phrase.group()
    return None


# HumanEval: a function's head and docstring, the whole function as a block of code


def _functions(rows: Sequence[Row], _: random.Random) -> Iterator[Conversation]:
    for row in rows:
        head = row.answer.partition("\n")[0].rstrip()
        fits_docstring = row.prompt.isascii() and not re.search(r'["\\\n]', row.prompt)
        if fits_docstring and head.startswith("def ") and head.endswith(":") and _runs_alone(row.answer):
            yield _example(
                f'Complete the following python code:\n{head}\n    """{row.prompt}"""\n',
                f"```python\n{row.answer}\n```",
            )


def _runs_alone(code: str) -> bool:
    """Whether code is one function that parses and uses no name from outside but Python's own."""
    with warnings.catch_warnings(action="error"):  # an invalid escape becomes a SyntaxError
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError):
            return False
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = {node.arg for node in nodes if isinstance(node, ast.arg)}
    known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    known |= {name.id for name in names if isinstance(name.ctx, ast.Store)} | set(dir(builtins))
    known |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
    return len(tree.body) == 1 and all(name.id in known for name in names)
