"""The rows of the tasks: from a folder of data or from the hub, the same fields either way."""

import csv
import gzip
import io
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from scoring.competition.downloads import Download
from scoring.competition.task import Row, Task

CHID = Download(
    "https://raw.githubusercontent.com/CLUEbenchmark/FewCLUE/"
    "62a02c6f31cf32814cfe522f78ef088228840f8d/datasets/chid/test_public.json",
    "fewclue/chid/test_public.json",
    "95ced0f30b80a964994ef3eff486ba7b2880e5e4f3aa5be571eb1e88066eed4b",
)
"""No data set of the hub has CHID as FewCLUE published it."""

LATER_TRUTHFULQA = 790
"""Questions of TruthfulQA since 2025; published scores are over the 817 of before."""


@dataclass(frozen=True)
class _Source:
    """How a group's rows are read from either place."""

    parse: Callable[[bytes], list[Any]]
    """The records of a file."""
    of_file: Callable[[Any], Row]
    """A record of a file as a row."""
    hub: str
    """Where the rows come from without a folder of data, for messages."""
    config: str | None = None
    """The data set's on the hub; None: the task's own subtask."""
    split: str = "test"
    of_hub: Callable[[Any], Row] | None = None
    """A record of the hub as a row; None: as one of a file."""


def read_rows(task: Task, data: Path | None) -> list[Row]:
    """All rows of a task, in the order of the published file.

    Args:
        task: one of :data:`scoring.competition.TASKS`.
        data: a folder that has the file, in this project's layout or OpenCompass's, gzipped or not; None: the hub.

    Raises:
        UserError: the file is missing, damaged or of another version; the hub cannot be reached.
    """
    source = _SOURCES[task.group]
    if data is None:
        records, convert, where = _of_hub(task, source)
    else:
        path = find_file(data, task)
        records, convert, where = _parsed(source, path), source.of_file, str(path)
    rows = []
    for number, record in enumerate(records, 1):
        try:
            rows.append(convert(record))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"row {number} of {where} is no question of {task.name} ({type(error).__name__}: {error}); "
                "get the file again"
            ) from error
    if not rows:
        raise UserError(f"{where} has no rows; get the file again")
    if task.group == "truthfulqa" and len(rows) == LATER_TRUTHFULQA:
        raise UserError(
            f"{where} is TruthfulQA of 2025 with {LATER_TRUTHFULQA} questions, and published scores are over the "
            f"{task.rows} of before: take TruthfulQA.csv of an earlier commit, or the hub's (leave --data out)"
        )
    return rows


def find_file(data: Path, task: Task) -> Path:
    """The file of a task in a folder of data; UserError says both ways to get it when it is missing."""
    for name in task.files:
        for path in (data / name, data / f"{name}.gz"):
            if path.is_file():
                return path
    places = " or ".join(str(data / name) for name in task.files)
    raise UserError(
        f"{task.name} needs {places}, plain or with .gz: put the published file there, or leave --data out to fetch "
        f"{_SOURCES[task.group].hub}"
    )


def count_warning(task: Task, rows: int) -> str | None:
    """What a result has to say when a task has not the rows that published scores are over."""
    if rows == task.rows:
        return None
    return f"{task.name} has {rows:,} rows where published scores are over {task.rows:,}"


def choose_rows(name: str, count: int, limit: int | None, seed: int) -> list[int]:
    """Which rows are scored: all, or ``limit`` drawn by the seed and the task's name, in order."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(f"{seed} {name}").sample(range(count), limit))


def read_packed(path: Path) -> bytes:
    """The content of a file, unpacked where it is gzipped; UserError where it cannot be read."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}; get the file again") from error


def read_hub(repo: str, config: str | None, split: str) -> list[Any]:
    """The records of a data set on the hub, kept in datasets' cache; UserError where they cannot be had."""
    import datasets

    try:
        return list(datasets.load_dataset(repo, config, split=split))
    except Exception as error:  # of many kinds: no network, no such set, no such split, rate limits
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{repo} cannot be had from the hub ({type(error).__name__}: {reason}). Without a network give the "
            "published files: --data DIR"
        ) from error


def _parsed(source: _Source, path: Path) -> list[Any]:
    try:
        return source.parse(read_packed(path))
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged or no file of this task: {error}; get it again") from error


def _of_hub(task: Task, source: _Source) -> tuple[list[Any], Callable[[Any], Row], str]:
    if task.group == "chid":
        path = CHID.fetch()
        return _parsed(source, path), source.of_file, str(path)
    config = source.config or task.name.removeprefix("bbh_")
    return read_hub(source.hub, config, source.split), source.of_hub or source.of_file, source.hub


def _json_lines(raw: bytes) -> list[Any]:
    return [json.loads(line) for line in raw.decode().split("\n") if line.strip()]


def _examples(raw: bytes) -> list[Any]:
    examples: list[Any] = json.loads(raw)["examples"]
    return examples


def _table(raw: bytes) -> list[Any]:
    return list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline="")))


def _commonsense_qa(record: Any) -> Row:
    asked = record["question"]
    choices = [choice["text"] for choice in asked["choices"]]
    return {"question": asked["stem"], **_lettered("ABCDE", choices), "answer": record["answerKey"]}


def _commonsense_qa_of_hub(record: Any) -> Row:
    return {
        "question": record["question"],
        **_lettered("ABCDE", record["choices"]["text"]),
        "answer": record["answerKey"],
    }


def _chid(record: Any) -> Row:
    return {
        "content": record["content"].replace("#idiom#", "______"),
        **_lettered("ABCDEFG", record["candidates"]),
        "answer": "ABCDEFG"[record["answer"]],
    }


def _truthfulqa(record: Any) -> Row:
    return {
        "question": record["Question"],
        "best_answer": record["Best Answer"],
        "correct_answers": _split(record["Correct Answers"]),
        "incorrect_answers": _split(record["Incorrect Answers"]),
    }


def _lettered(letters: str, choices: list[str]) -> Row:
    return dict(zip(letters, choices, strict=True))


def _split(answers: str) -> list[str]:
    """Answers are parted by semicolons; there is at least one."""
    found = [answer.strip() for answer in answers.split(";") if answer.strip()]
    if not found:
        raise ValueError("it has a question without answers")
    return found


def _fields(*names: str) -> Callable[[Any], Row]:
    """A row of these fields of a record, lists without their empty entries."""

    def row(record: Any) -> Row:
        return {
            name: [entry for entry in record[name] if entry] if isinstance(record[name], list) else record[name]
            for name in names
        }

    return row


_SOURCES = {
    "commonsense_qa": _Source(
        _json_lines, _commonsense_qa, "tau/commonsense_qa", "default", "validation", _commonsense_qa_of_hub
    ),
    "bbh": _Source(_examples, _fields("input", "target"), "SaylorTwift/bbh"),
    "gsm8k": _Source(_json_lines, _fields("question", "answer"), "openai/gsm8k", "main"),
    "humaneval": _Source(
        _json_lines,
        _fields("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        "openai/openai_humaneval",
        "openai_humaneval",
    ),
    "chid": _Source(_json_lines, _chid, CHID.url),
    "truthfulqa": _Source(
        _table,
        _truthfulqa,
        "truthfulqa/truthful_qa",
        "generation",
        "validation",
        _fields("question", "best_answer", "correct_answers", "incorrect_answers"),
    ),
}
