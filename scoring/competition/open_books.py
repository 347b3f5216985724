"""Prompts out, answers in: what anyone needs to make answers elsewhere and to check our scores.

A line of prompts is ``{"task", "row", "prompt"}``, one of answers ``{"task", "row", "output"}``; rows are counted
from 0 in the order of the published file.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_text
from scoring.competition.data import choose_rows, count_warning, read_packed, read_rows
from scoring.competition.prompts import Template, prompt_of
from scoring.competition.scores import group_score, score_outputs, task_extras, task_score
from scoring.competition.shots import read_shots
from scoring.competition.tasks import GROUPS, TASKS

Answers = dict[str, dict[int, dict[str, Any]]]
"""Lines of answers by task and row."""


def write_prompts(
    path: Path,
    data: Path | None,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    seed: int = 0,
    template: Template | None = None,
) -> int:
    """Write the prompts of tasks as JSON lines; returns how many.

    Args:
        path: the file; replaced in one step.
        data: folder of data; None: the hub.
        tasks: names of :data:`scoring.competition.TASKS`.
        limit: rows of a task, drawn by ``seed``; None: all.
        seed: of the draw.
        template: renders a chat; None: the form of base models.

    Raises:
        UserError: data or demonstrations are missing.
    """
    shots, lines = read_shots(data), []
    for task in (TASKS[name] for name in tasks):
        rows = read_rows(task, data)
        for number in choose_rows(task.name, len(rows), limit, seed):
            line = {"task": task.name, "row": number, "prompt": prompt_of(task, rows[number], shots, template)}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    return len(lines)


def rescore(
    answers: Path,
    data: Path | None,
    *,
    out: Path,
    unsafe: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score given outputs without a model.

    Args:
        answers: JSON lines of ``task``, ``row``, ``output``, in any order, also gzipped.
        data: folder of data; None: the hub.
        out: where the lines go, with ``extracted`` and ``correct`` (null: does not count) added to each.
        unsafe: run HumanEval's programs without the sandbox.
        progress: called with the number of programs that have been run.

    Returns:
        ``tasks``: ``score`` (0-100 or None), ``answered``, ``rows`` and further figures by name of task; ``groups``:
        the scores of those that have tasks here; ``warnings``: what a reader of the scores has to know.

    Raises:
        UserError: a line is no answer, or answers no question there is; data is missing.
    """
    lines = read_answers(answers)
    summary: dict[str, Any] = {"tasks": {}, "groups": {}, "warnings": []}
    for name, task in TASKS.items():
        if name not in lines:
            continue
        rows = read_rows(task, data)
        given = lines[name]
        _check_rows(name, given, len(rows))
        scored, not_run = score_outputs(
            task,
            [rows[number] for number in given],
            [line["output"] for line in given.values()],
            unsafe=unsafe,
            progress=progress,
        )
        if not_run:
            summary["warnings"].append(f"{name} was not run: {not_run}")
        for line, one in zip(given.values(), scored, strict=True):
            line |= {"extracted": one.extracted, "correct": one.correct}
        summary["tasks"][name] = {
            "score": task_score(task, scored),
            "answered": len(given),
            "rows": len(rows),
            **task_extras(task, scored),
        }
        if warning := count_warning(task, len(given)):
            summary["warnings"].append(warning)
    scores = {name: found["score"] for name, found in summary["tasks"].items()}
    for group, names in GROUPS.items():
        there = sum(name in scores for name in names)
        if there:
            summary["groups"][group] = group_score(group, scores)
        if 0 < there < len(names):
            summary["warnings"].append(f"{group} is the mean of {there} of its {len(names)} tasks")
    # In ASCII, like the answers of a run: lone surrogates are no UTF-8.
    written = [json.dumps(line) + "\n" for by_row in lines.values() for line in by_row.values()]
    write_text(out, "".join(written))
    return summary


def read_answers(path: Path) -> Answers:
    """The lines of a file of answers, in its order; UserError where one is no answer, or there twice."""
    found: Answers = defaultdict(dict)
    try:
        content = read_packed(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}") from error
    for number, text in enumerate(content.split("\n"), 1):
        if not text.strip():
            continue
        line = _answer(text, f"line {number} of {path}")
        if line["row"] in found[line["task"]]:
            raise UserError(f"line {number} of {path} answers row {line['row']} of {line['task']} again; keep one")
        found[line["task"]][line["row"]] = line
    if not found:
        raise UserError(f"{path} has no answers; a line is {_EXAMPLE}")
    return dict(found)


_EXAMPLE = '{"task": "gsm8k", "row": 0, "output": "... The answer is 18"}'


def _answer(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is no valid JSON: {error}") from error
    if not isinstance(line, dict) or not isinstance(line.get("output"), str) or type(line.get("row")) is not int:
        raise UserError(f"{where} is no answer; a line is {_EXAMPLE}")
    if line.get("task") not in TASKS:
        raise UserError(f"{where} answers {line.get('task')!r}, which is no task; there are {', '.join(TASKS)}")
    return line


def _check_rows(name: str, given: Mapping[int, Any], count: int) -> None:
    outside = next((row for row in given if not 0 <= row < count), None)
    if outside is not None:
        raise UserError(f"there is an answer to row {outside} of {name}, whose rows are 0 to {count - 1}")
