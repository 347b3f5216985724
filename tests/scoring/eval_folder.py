"""A small folder of evaluation data in the published layout: every task is there, with few rows."""

import json
import shutil
from pathlib import Path

from scoring.competition import GROUPS
from scoring.quick import TASKS
from scoring.sample import FOLDER

_CHOICES = {"text": ["ice", "steam", "sand"], "label": ["A", "B", "C"]}
_ARC = {"question": "What does water become when it freezes?", "choices": _CHOICES}

QUICK_ROWS = {
    "arc_easy": _ARC | {"answerKey": "A"},
    "arc_challenge": _ARC | {"answerKey": "C"},
    "openbookqa": {"question_stem": "Water that freezes becomes", "choices": _CHOICES, "answerKey": "A"},
    "boolq": {"passage": "Ice floats on water.", "question": "does ice float", "answer": True},
    "piqa": {"goal": "Keep bread fresh.", "sol1": "Wrap it.", "sol2": "Wet it.", "label": 0},
    "winogrande": {
        "sentence": "The jug did not fit into the basket because the _ was too wide.",
        "option1": "jug",
        "option2": "basket",
        "answer": "1",
    },
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A woman opens an oven.",
        "ctx_b": "she",
        "label": "1",
        "endings": ["[title] flies.", "takes out a loaf.", "swims.", "reads it."],
    },
    "lambada": {"text": "He put the letter into the envelope and licked the stamp"},
}
"""A row of each quick task, as published."""


def write_quick(folder: Path) -> None:
    """The quick tasks, a row each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, row in QUICK_ROWS.items():
        (folder / TASKS[name].file).write_text(json.dumps(row) + "\n", encoding="utf-8")


def write_eval(folder: Path) -> Path:
    """The sample's questions under the names of all tasks, and the quick tasks."""
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "sample.json", "__pycache__"))
    for name in GROUPS["bbh"]:
        subtask = name.removeprefix("bbh_")
        for part, ending in (("bbh", "json"), ("cot-prompts", "txt")):
            path = folder / "bbh" / part / f"{subtask}.{ending}"
            if not path.exists():
                shutil.copy(folder / "bbh" / part / f"date_understanding.{ending}", path)
    write_quick(folder / "extra")
    return folder
