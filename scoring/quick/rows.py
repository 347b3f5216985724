"""The rows of the quick tasks: from the hub, or from the files of a data folder."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError
from scoring.competition.data import read_hub
from scoring.quick import TASKS, QuickTask
from scoring.quick.forms import FORMS, Row


def read_rows(name: str, data: Path | None) -> list[Row]:
    """The rows of a task in the form that its YAML file speaks of.

    Args:
        name: of the task.
        data: a folder with the task's file, in itself or in its folder ``extra``; None fetches it from the hub.

    Raises:
        UserError: the file is not there, is damaged, or a row is not of the dataset's published format; the hub
            cannot be reached.
    """
    task = TASKS[name]
    rows = read_hub(task.hub, task.config, task.split) if data is None else _from_file(_find(task, data))
    form, made = FORMS[name], []
    for number, row in enumerate(rows, 1):
        try:
            made.append(form(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            where = task.hub if data is None else _find(task, data)
            raise UserError(f"row {number} of {where} is not in the format of {name}: {error!r}") from error
    if not made:
        raise UserError(f"there is no row in {task.hub if data is None else _find(task, data)}")
    return made


def other_count(name: str, rows: int) -> str | None:
    """A warning for the result when a task has not as many rows as were published."""
    expected = TASKS[name].rows
    return None if rows == expected else f"{name} has {rows:,} rows; published are {expected:,}"


def _find(task: QuickTask, data: Path) -> Path:
    """The task's file in a data folder."""
    for folder in (data, data / "extra"):
        for file in (folder / task.file, folder / f"{task.file}.gz"):
            if file.is_file():
                return file
    raise UserError(
        f"{data} has no {task.file} (or .gz), which holds the rows of {task.name}. Put it there, or leave --data out "
        f"to have {task.hub} from the hub"
    )


def _from_file(file: Path) -> Iterator[Row]:
    """The JSON lines of a file."""
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007  (the message names the line)
                if line.strip():
                    yield json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"line {number} of {file} is no JSON record: {error}") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
