"""What a task of the competition is: its prompt, the answer taken from a text, and how that is judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scoring.competition.shots import Shots

Row = dict[str, Any]
"""A question with its answer, the same fields whichever layout of data it was read from."""

Turn = dict[str, str]
"""``{"role": "user" or "assistant", "content": ...}``; OpenCompass calls the roles HUMAN and BOT."""


@dataclass(frozen=True)
class Scored:
    """What an output is worth."""

    extracted: str
    """The answer taken from the output."""
    correct: bool | None
    """None: it does not count (a blank answer of TruthfulQA, a program that was not run)."""
    extras: Mapping[str, float] = field(default_factory=dict)
    """Further figures of this row, by name: their means are shown beside the score."""

    @property
    def value(self) -> float | None:
        """What it adds to the mean, 0 or 100; None where it does not count."""
        return None if self.correct is None else 100.0 * self.correct


@dataclass(frozen=True)
class Task:
    """One of the tasks, as OpenCompass 0.3.1 asks and judges it."""

    name: str
    """``gsm8k``, ``bbh_snarks``."""
    group: str
    """The task of the competition's table that it counts for; ``bbh`` has 27, the others are their own group."""
    rows: int
    """Rows that published scores are over."""
    chance: float
    """Score, 0-100, of guessing in the right format; 0 where there is nothing to choose from."""
    max_new_tokens: int | None
    """None: what the command line says (OpenCompass's --max-out-len)."""
    files: tuple[str, ...]
    """Where its rows may lie inside a folder of data, also with ``.gz``; the first that is there is read."""
    turns: "Callable[[Row, Shots], list[Turn]]"
    """The conversation that asks a row; the user has the last turn."""
    extract: Callable[[str], str]
    """The answer in an output."""
    finished: Callable[[str], bool]
    """Whether nothing that an output may go on with can change what is extracted."""
    gold: Callable[[Row], str]
    """The right answer, as the extracted one would have to be; the first of several."""
    judge: Callable[[str, Row], Scored] | None
    """Scores what was extracted; None where a program has to be run for that."""
    program: Callable[[Row, str], str] | None = None
    """The program that tests what was extracted: it ends without an exception where that is right."""
    leading_newline: bool = False
    """Whether a base model's prompt begins with an empty line: OpenCompass joins an empty marker to it."""
