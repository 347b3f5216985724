"""The sample's items: eight of each format, right by calculation, scored by the rules of the competition."""

import datetime
import doctest
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from scoring.competition import GROUPS, TASKS, Row, Task, programs_of, score_rows, task_score
from scoring.competition.data import read_rows
from scoring.competition.prompts import base_prompt
from scoring.competition.shots import read_shots
from scoring.sample import FOLDER

BBH = ("bbh_boolean_expressions", "bbh_date_understanding")
NAMES = [name for group, names in GROUPS.items() for name in (BBH if group == "bbh" else names)]

RIGHT = {
    "commonsense_qa": "Only one of them fits. So the answer is {}.\n\nQ: What comes next?",
    "gsm8k": "I count them.\nThe answer is {}\n\nQuestion: How many are 2 and 3?",
    "humaneval": "```python\n{}```",
    "chid": "{}。",
    "truthfulqa": "{}",
    "bbh_boolean_expressions": "One after the other. So the answer is {}.\n\nQ: True is",
    "bbh_date_understanding": "I count the days. So the answer is ({}).",
}
"""What a model would write that knows the answer."""


@dataclass(frozen=True)
class Result:
    """How a program ended. The solutions are ours, so no sandbox is needed to run them."""

    passed: bool

    @classmethod
    def of(cls, program: str) -> "Result":
        try:
            exec(program, {})
        except Exception:
            return cls(False)
        return cls(True)


def score(task: Task, rows: list[Row], outputs: list[str]) -> float | None:
    programs = [Result.of(program) for program in programs_of(task, rows, outputs)]
    return task_score(task, score_rows(task, rows, outputs, programs if task.judge is None else None))


def test_there_are_eight_items_of_each_format() -> None:
    for group in GROUPS:
        assert sum(len(read_rows(TASKS[name], FOLDER)) for name in NAMES if TASKS[name].group == group) == 8
    assert json.loads((FOLDER / "sample.json").read_text())["sample"] is True


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_get_full_marks_and_others_none(name: str) -> None:
    task, rows = TASKS[name], read_rows(TASKS[name], FOLDER)
    right = [RIGHT[name].format(task.gold(row)) for row in rows]
    assert score(task, rows, right) == 100.0
    # Each answer to the next item's question. Truths take turns with falsehoods of their own item instead.
    wrong = [row["incorrect_answers"][0] for row in rows] if name == "truthfulqa" else _other_answers(task, rows)
    assert score(task, rows, wrong) == 0.0


def _other_answers(task: Task, rows: list[Row]) -> list[str]:
    golds = [task.gold(row) for row in rows]
    return [RIGHT[task.name].format(next(gold for gold in golds if gold != own)) for own in golds]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_short_and_are_made_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object, **options: object) -> NoReturn:
        raise AssertionError("the sample brings its own demonstrations")

    monkeypatch.setattr(subprocess, "run", refuse)
    task, shots = TASKS[name], read_shots(FOLDER)
    prompts = [base_prompt(task, row, shots) for row in read_rows(task, FOLDER)]
    assert len(set(prompts)) == len(prompts)
    assert max(map(len, prompts)) < 1_500


def test_demonstrations_end_as_the_rules_of_extraction_want_it() -> None:
    shots = read_shots(FOLDER)
    answers = {
        name: [TASKS[name].extract(turn["content"]) for turn in shots.turns(name) if turn["role"] == "assistant"]
        for name in ("commonsense_qa", "gsm8k")
    }
    assert answers == {"commonsense_qa": ["B", "D"], "gsm8k": ["26", "25"]}
    for name, expected in zip(BBH, (["True", "False", "False"], ["B", "A", "C"]), strict=True):
        text = shots.demonstrations(name.removeprefix("bbh_"))
        assert "palmtop" not in text
        assert [TASKS[name].extract(part) for part in text.split("\n\nQ: ")[1:]] == expected


def test_expressions_and_dates_are_what_python_says() -> None:
    for row in read_rows(TASKS["bbh_boolean_expressions"], FOLDER):
        assert str(eval(row["input"].removesuffix(" is"))) == row["target"]
    day = datetime.timedelta(days=1)
    dates = [
        datetime.date(2022, 3, 14) + 7 * day,
        datetime.date(2019, 4, 30) + day,
        datetime.date(2020, 2, 28) + 2 * day,
        datetime.date(1999, 12, 31).replace(year=2009) - day,
    ]
    assert dates[0].weekday() == 0
    for row, date in zip(read_rows(TASKS["bbh_date_understanding"], FOLDER), dates, strict=True):
        choices = dict(re.findall(r"(\([A-E]\)) (\S+)", row["input"]))
        assert choices[row["target"]] == date.strftime("%m/%d/%Y")


def test_every_step_of_the_arithmetic_is_right_and_the_last_is_the_answer() -> None:
    for row in read_rows(TASKS["gsm8k"], FOLDER):
        steps = re.findall(r"<<(.+?)=(.+?)>>", row["answer"])
        assert [eval(left) for left, _ in steps] == [float(right) for _, right in steps]
        assert steps[-1][1] == TASKS["gsm8k"].gold(row)


def test_examples_in_the_functions_are_right() -> None:
    for row in read_rows(TASKS["humaneval"], FOLDER):
        names: dict[str, object] = {}
        exec(row["prompt"] + row["canonical_solution"], names)
        (test,) = doctest.DocTestFinder().find(names[row["entry_point"]], globs=names)
        assert test.examples
        assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 0


def test_idioms_are_seven_different_ones_and_the_letters_are_spread() -> None:
    rows = read_rows(TASKS["chid"], FOLDER)
    for row in rows:
        assert len({row[letter] for letter in "ABCDEFG"}) == 7
        assert all(re.fullmatch(r"[\u4e00-\u9fff]{4}", row[letter]) for letter in "ABCDEFG")
        assert row["content"].count("______") == 1
        assert row[row["answer"]] not in row["content"]
    for name in ("chid", "commonsense_qa"):
        golds = [TASKS[name].gold(row) for row in read_rows(TASKS[name], FOLDER)]
        assert max(map(golds.count, golds)) <= 2


def test_no_item_is_one_of_the_competitions(shared: Path) -> None:
    data = shared / "datasets" / "eval"
    asks = {"commonsense_qa": "question", "gsm8k": "question", "truthfulqa": "question", "chid": "content"}
    asks |= {"humaneval": "prompt"} | dict.fromkeys(BBH, "input")
    for name in NAMES:
        theirs = {row[asks[name]] for row in read_rows(TASKS[name], data)}
        assert not theirs & {row[asks[name]] for row in read_rows(TASKS[name], FOLDER)}
