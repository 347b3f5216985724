"""Scores of the quick tasks, of a model folder or of a model in training."""

from collections.abc import Sequence
from pathlib import Path

from lm_eval.api.model import LM

from scoring.competition.data import choose_rows
from scoring.harness import evaluate
from scoring.quick import TASKS
from scoring.quick.harness import load
from scoring.quick.rows import other_count
from scoring.results import TaskResult, interval


def score_quick(
    model: LM, names: Sequence[str], data: Path | None, *, limit: int | None = None, seed: int = 0
) -> tuple[list[TaskResult], list[str]]:
    """Score a model on tasks of :data:`scoring.quick.TASKS`.

    Args:
        model: whom to ask.
        names: of the tasks.
        data: the folder with their files; None: the hub.
        limit: rows of a task, drawn by ``seed``; None: all.
        seed: of the draw and of the intervals.

    Returns:
        A result for each task, and what a reader of them has to know.

    Raises:
        UserError: rows cannot be read.
    """
    tasks = load(names, data)
    counts = {name: len(task.eval_docs) for name, task in tasks["tasks"].items()}
    rows = {name: choose_rows(name, count, limit, seed) for name, count in counts.items()}
    found = evaluate(model, tasks, samples=rows)["samples"]
    results = []
    for name in names:
        values = [100.0 * sample[TASKS[name].metric] for sample in found[name]]
        score = sum(values) / len(values)
        results.append(TaskResult(name, score, interval([values], seed), TASKS[name].chance, len(values)))
    warnings = [other_count(name, counts[name]) for name in names]
    return results, [warning for warning in warnings if warning]
