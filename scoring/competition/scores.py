"""From outputs to scores: of rows, of tasks and of the groups of the competition's table."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from scoring import sandbox
from scoring.competition.task import Row, Scored, Task
from scoring.competition.tasks import GROUPS


class ProgramResult(Protocol):
    """What the judge of HumanEval has to know of a program that was run."""

    @property
    def passed(self) -> bool:
        """Whether its tests passed."""


def score_outputs(
    task: Task,
    rows: Sequence[Row],
    outputs: Sequence[str],
    *,
    unsafe: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Scored], str | None]:
    """Score outputs, one for each row, and run programs for that where the task needs it.

    Args:
        task: whose rows these are.
        rows: as :func:`scoring.competition.data.read_rows` gives them.
        outputs: what the model wrote, in the same order.
        unsafe: run programs without the sandbox.
        progress: called with the number of programs that have been run.

    Returns:
        The scored rows, and why programs could not be run, where they could not: then no row counts.
    """
    programs = programs_of(task, rows, outputs)
    if not programs:
        return score_rows(task, rows, outputs), None
    missing = None if unsafe else sandbox.available()
    if missing is not None:
        return score_rows(task, rows, outputs), missing
    return score_rows(task, rows, outputs, sandbox.run_programs(programs, unsafe=unsafe, progress=progress)), None


def score_rows(
    task: Task, rows: Sequence[Row], outputs: Sequence[str], programs: Sequence[ProgramResult] | None = None
) -> list[Scored]:
    """Score outputs, one for each row.

    Args:
        task: whose rows these are.
        rows: as :func:`scoring.competition.data.read_rows` gives them.
        outputs: what the model wrote, in the same order.
        programs: results of :func:`programs_of`, where the task has programs; without them no row counts.
    """
    extracted = [task.extract(output) for output in outputs]
    if task.judge is not None:
        return [task.judge(answer, row) for answer, row in zip(extracted, rows, strict=True)]
    passed = [result.passed for result in programs] if programs is not None else [None] * len(rows)
    return [Scored(answer, result) for answer, result in zip(extracted, passed, strict=True)]


def programs_of(task: Task, rows: Sequence[Row], outputs: Sequence[str]) -> list[str]:
    """The programs that have to be run to score outputs; none for most tasks."""
    if task.program is None:
        return []
    return [task.program(row, task.extract(output)) for row, output in zip(rows, outputs, strict=True)]


def task_score(task: Task, scored: Iterable[Scored]) -> float | None:
    """The score of a task, 0-100: the mean of what counts; None where nothing does.

    OpenCompass leaves blank answers to TruthfulQA out of the mean, and its ``bleu_acc`` is a hundredth of this.
    """
    return _mean([one.value for one in scored if one.value is not None])


def task_extras(task: Task, scored: Iterable[Scored]) -> dict[str, float]:
    """Further figures of a task, the means of its rows': TruthfulQA's ``bleu_max`` and ``bleu_diff``, on 0-1."""
    values: dict[str, list[float]] = {}
    for one in scored:
        for name, value in one.extras.items():
            values.setdefault(name, []).append(value)
    return {name: math.fsum(found) / len(found) for name, found in values.items()}


def group_score(group: str, scores: Mapping[str, float | None]) -> float | None:
    """The score of a group from those of its tasks, each with the same weight; None where one has none.

    Args:
        group: a key of :data:`scoring.competition.GROUPS`.
        scores: of its tasks, by name; those of other groups are passed over.
    """
    found = [scores[name] for name in GROUPS[group] if name in scores]
    return None if None in found else _mean([score for score in found if score is not None])


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
