"""The data in the places where OpenCompass looks."""

import gzip
import json
import shutil
from pathlib import Path

from common.errors import UserError
from common.files import new_folder, write_text
from scoring.competition import TASKS
from scoring.competition.data import read_rows
from scoring.opencompass.summary import SUBTASKS

PLACES = {
    "commonsenseqa/dev_rand_split.jsonl": ("commonsenseqa/dev_rand_split.jsonl",),
    "commonsenseqa/train_rand_split.jsonl": ("commonsenseqa/train_rand_split.jsonl",),
    "FewCLUE/chid/test_public.json": ("FewCLUE/chid/test_public.json", "chid/test_public.json"),
    "humaneval/human-eval-v2-20210705.jsonl": (
        "humaneval/human-eval-v2-20210705.jsonl",
        "humaneval/HumanEval.jsonl",
    ),
    "gsm8k/test.jsonl": ("gsm8k/test.jsonl",),
    "gsm8k/train.jsonl": ("gsm8k/train.jsonl",),
    **{f"BBH/data/{name}.json": (f"BBH/data/{name}.json", f"bbh/bbh/{name}.json") for name in SUBTASKS},
}
"""Files that OpenCompass opens, and where they may lie: in its own data folder, or as they are published."""

STAND_INS = {
    "commonsenseqa/train_rand_split.jsonl": "commonsenseqa/dev_rand_split.jsonl",
    "gsm8k/train.jsonl": "gsm8k/test.jsonl",
}
"""Splits that OpenCompass opens and draws nothing from: where one is missing, another of the same format does."""


def lay_out(data: Path, folder: Path) -> Path:
    """Fill a folder with what OpenCompass reads; returns the path of TruthfulQA in the form that ``datasets`` reads.

    Args:
        data: evaluation data as they are published, or OpenCompass's own data folder; files may be gzipped.
        folder: replaced.

    Raises:
        UserError: a file is missing, or TruthfulQA is damaged or of another version; the message names it.
    """
    with new_folder(folder) as temporary:
        for place, candidates in PLACES.items():
            _unpack(_found(data, candidates, STAND_INS.get(place)), temporary / "data" / place)
        # Our rows have the fields of the hub's data set, which OpenCompass would fetch.
        rows = read_rows(TASKS["truthfulqa"], data)
        write_text(temporary / "truthfulqa.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder / "truthfulqa.jsonl"


def _found(data: Path, candidates: tuple[str, ...], stand_in: str | None = None) -> Path:
    for name in (*candidates, *([stand_in] if stand_in else [])):
        for path in (data / name, data / f"{name}.gz"):
            if path.exists():
                return path
    raise UserError(
        f"{data} has no {' and no '.join(candidates)}, which OpenCompass needs; put it there, or leave out the data "
        "folder, and OpenCompass downloads its own"
    )


def _unpack(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix != ".gz":
        shutil.copyfile(source, target)
        return
    with gzip.open(source) as packed, open(target, "wb") as file:
        shutil.copyfileobj(packed, file)
