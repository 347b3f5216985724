"""The competition's ranking: places per task, points for places, two tracks apart.

The rules, as the competition's site gives them: entries are ranked per task, places 1 to 10 get 10 to 1 points;
throughput on the phone counts double; more than 12 GB of memory at inference disqualifies. An entry of track 1 is the
mean of three compressed models, one of track 2 a single model. Ties share the better place. What was not measured gets
no points.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from models.budget import PHONE_MEMORY

TASKS = {
    "commonsense_qa": "CommonsenseQA",
    "bbh": "BBH",
    "gsm8k": "GSM8K",
    "longbench": "LongBench",
    "humaneval": "HumanEval",
    "truthfulqa": "TruthfulQA",
    "chid": "CHID",
}
"""The tasks that get points, and what they are called. The competition's hidden task is not known."""

SIX = [name for name in TASKS if name != "longbench"]
"""The tasks whose mean is the score; no published table has LongBench."""

POINTED = 10
"""Places that get points."""

MODELS = 3
"""Compressed models that are one entry of track 1."""


@dataclass(frozen=True)
class Throughput:
    """Tokens a second while decoding."""

    value: float
    where: str
    """The device; only figures of one device can be compared."""
    phone: bool = False
    """Measured on a real phone: nothing else is ranked."""


@dataclass(frozen=True)
class Entry:
    """What takes part: a run, three runs together, or a published line."""

    name: str
    track: Literal[1, 2] | None
    """None: shown for comparison alone."""
    scores: Mapping[str, float | None]
    """By task, 0 to 100."""
    source: str
    """Where the figures are from."""
    published: bool = False
    parameters: float | None = None
    memory: float | None = None
    """Bytes at inference on a phone."""
    memory_is: str = ""
    """How the memory is known."""
    throughput: Throughput | None = None
    models: int = 1
    unranked: tuple[str, ...] = ()
    """Why it takes no place: what keeps its scores from comparison with full ones."""
    remarks: tuple[str, ...] = ()
    """What else must be seen beside its name."""

    @property
    def disqualified(self) -> bool:
        """Whether it needs more memory than the phone has."""
        return self.memory is not None and self.memory > PHONE_MEMORY


@dataclass(frozen=True)
class Placed:
    """An entry with its place."""

    entry: Entry
    places: Mapping[str, int] = field(default_factory=dict)
    """By task, and ``throughput``; those that were measured."""
    points: int = 0
    place: int | None = None
    """Among its track; None: not ranked."""


def rank(entries: Sequence[Entry]) -> list[Placed]:
    """Place the entries of one track, the best first, those that take no place last."""
    ranked = [entry for entry in entries if not entry.unranked and not entry.disqualified and entry.track is not None]
    by_task = {task: places([entry.scores.get(task) for entry in ranked]) for task in TASKS}
    by_task["throughput"] = places(comparable_throughput(ranked))
    placed = []
    for number, entry in enumerate(ranked):
        own = {task: found[number] for task, found in by_task.items()}
        measured = {task: place for task, place in own.items() if place is not None}
        total = sum(points(place) * (2 if task == "throughput" else 1) for task, place in measured.items())
        placed.append(Placed(entry, measured, total))
    finals = places([one.points for one in placed])
    found = [Placed(one.entry, one.places, one.points, place) for one, place in zip(placed, finals, strict=True)]
    found.sort(key=lambda one: (one.place or 0, one.entry.name))
    return found + [Placed(entry) for entry in entries if entry not in ranked]


def places(values: Sequence[float | None]) -> list[int | None]:
    """The place of each value, the largest first; equal ones share the better place, None has none."""
    known = [value for value in values if value is not None]
    return [None if value is None else 1 + sum(other > value for other in known) for value in values]


def points(place: int) -> int:
    """10 for the first place down to 1 for the tenth."""
    return max(0, POINTED + 1 - place)


def comparable_throughput(entries: Sequence[Entry]) -> list[float | None]:
    """Throughput on a phone; nobody's where the entries were measured on different phones."""
    found = [entry.throughput if entry.throughput and entry.throughput.phone else None for entry in entries]
    phones = {one.where for one in found if one is not None}
    return [one.value if one is not None and len(phones) == 1 else None for one in found]


def front(points: Sequence[tuple[float, float]], *, less_is_better: bool) -> list[int]:
    """Which of (cost or speed, score) no other one equals or beats in both: the Pareto front, by rising first value."""
    sign = -1 if less_is_better else 1
    kept = []
    for number, (x, y) in enumerate(points):
        beaten = any(
            sign * other >= sign * x and above >= y and (sign * other > sign * x or above > y)
            for other, above in points
        )
        if not beaten:
            kept.append(number)
    return sorted(kept, key=lambda number: points[number])
