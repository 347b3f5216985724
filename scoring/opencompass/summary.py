"""What OpenCompass found, under our names: its summary, its answers."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from scoring.competition import GROUPS

HUMANEVAL = "openai_humaneval"
TRUTHFULQA = "truthful_qa"

NAMES = {
    "commonsense_qa": "commonsense_qa",
    "bbh": "bbh",
    "gsm8k": "gsm8k",
    HUMANEVAL: "humaneval",
    "chid-test": "chid",
    TRUTHFULQA: "truthfulqa",
}
"""OpenCompass's name of each task and ours; its ``bbh-NAME`` is our ``bbh_NAME``."""

SUBTASKS = tuple(name.removeprefix("bbh_") for name in GROUPS["bbh"])
DATASETS = frozenset(NAMES) - {"bbh"} | {f"bbh-{name}" for name in SUBTASKS}
"""OpenCompass's names of all that is asked."""

BLEU_ACC = "bleu_acc"
HEADER = ["dataset", "version", "metric", "mode"]


def our_name(dataset: str) -> str | None:
    """Our name of a task, by OpenCompass's; None for one that is not the competition's."""
    if dataset.startswith("bbh-"):
        return "bbh_" + dataset.removeprefix("bbh-")
    return NAMES.get(dataset)


def read_summary(path: Path) -> dict[str, float]:
    """The scores, 0 to 100, of each task and subtask in an OpenCompass summary of one model.

    Tasks without a score are left out. TruthfulQA's is 100 x bleu_acc, which a summary rounds to two decimals.

    Raises:
        UserError: it is no such summary.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a summary of OpenCompass: {error}") from error
    if header[:4] != HEADER or any(len(row) != 5 for row in (header, *rows)):
        raise UserError(f"{path} is no summary of one model: its columns should be {', '.join(HEADER)} and a name")
    scores = {}
    for dataset, _, metric, _, score in rows:
        name = our_name(dataset)
        if name is None or score == "-" or (name == "truthfulqa" and metric != BLEU_ACC):
            continue
        try:
            scores[name] = float(score) * (100 if metric == BLEU_ACC else 1)
        except ValueError as error:
            raise UserError(f"{path}: the score of {dataset} is no number: {score!r}") from error
    return scores


def read_run(run: Path, model: str) -> dict[str, float]:
    """As :func:`read_summary`, of the last summary in a run's folder, with TruthfulQA as exact as it was measured."""
    summaries = sorted((run / "summary").glob("summary_*.csv"))
    if not summaries:
        raise UserError(f"OpenCompass wrote no summary into {run / 'summary'}; its logs are in {run / 'logs'}")
    scores = read_summary(summaries[-1])
    measured = run / "results" / model / f"{TRUTHFULQA}.json"
    if "truthfulqa" in scores and measured.exists():
        scores["truthfulqa"] = 100 * float(_json(measured)[BLEU_ACC])
    return scores


def read_answers(run: Path, model: str) -> Iterator[dict[str, Any]]:
    """Task, row and output of every answer in a run's folder, in the tasks' and their files' order.

    Raises:
        UserError: a file of answers is damaged.
    """
    for file in sorted((run / "predictions" / model).glob("*.json")):
        name = our_name(file.stem)
        if name is None:
            continue
        answers = _json(file)
        for row in range(len(answers)):
            yield {"task": name, "row": row, "output": answers[str(row)]["prediction"]}


def forget_errors(run: Path, model: str) -> None:
    """Remove results that are errors: OpenCompass takes every file of a result for a task that is done."""
    for file in (run / "results" / model).glob("*.json"):
        if "error" in _json(file):
            file.unlink()


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and the next run makes it anew") from error
