"""What is shown of a recipe: its commands before, its results at the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.console import Console, aligned, duration
from common.files import gigabytes
from pipeline.settings import Recipe
from pipeline.stages import Task
from pipeline.state import State

MODELS = ("train", "sft", "pruning")
"""The commands that make a model folder."""


def show(recipe: Recipe, every: Sequence[Task]) -> None:
    """Print every stage's command and where it stands."""
    console, state = Console(), State(recipe.folder, every)
    waiting: set[str] = set()
    for number, task in enumerate(every, 1):
        stands = "waits for " + ", ".join(one.name for one in task.waits_for if one.name in waiting)
        if not any(one.name in waiting for one in task.waits_for):
            status = state.of(task)
            begun = "its inputs have changed" if status.changed else "begun" if status.record else "to do"
            stands = f"done, in {duration(status.seconds)}" if status.done else begun
        if not stands.startswith("done"):
            waiting.add(task.name)
        console.say(f"{number:2} {task.name}: {stands}\n   {task.shown}")
        if task.stage.slurm is not None:
            console.say(f"   on SLURM: {task.stage.slurm}")


def closing(every: Sequence[Task], console: Console) -> None:
    """Print the models with score, speed and size, the export's speed, and where everything lies."""
    lines = [["model", "score", "decode here", "parameters", "bytes", "folder"]]
    for task in every:
        if task.stage.command in MODELS:
            found = [one for one in every if one.stage.command == "scoring" and task in one.waits_for]
            lines.append([task.name, *_figures([_read(one.place.result / "score.json") for one in found], task)])
    for line in aligned(lines, left=(0, len(lines[0]) - 1)):
        console.say(line)
    console.say("")
    for task in every:
        if task.stage.command not in MODELS:
            console.say(f"{task.name}: {task.place.result}{_more(task)}")


def _figures(scores: Sequence[dict[str, Any]], task: Task) -> list[str]:
    """Score, decode speed, parameters, bytes and folder of a model."""
    files = sum(file.stat().st_size for file in task.place.result.glob("*.safetensors"))
    speeds = [score["speed"]["decode"]["median"] for score in scores if score.get("speed")]
    counts = [score["parameters"]["non_duplicate"] for score in scores if score.get("parameters")]
    return [
        ", ".join(_score(score) for score in scores if score) or "not scored",
        f"{speeds[0]:,.0f} tok/s" if speeds else "not measured",
        f"{counts[0]:,}" if counts else "not counted",
        gigabytes(files),
        str(task.place.result),
    ]


def _score(score: dict[str, Any]) -> str:
    """The geometric mean of a score.json, with what keeps it from comparison with full ones."""
    marks = [mark.partition(":")[0] for mark in score.get("marks", [])]
    mean = score.get("means")
    return ("no mean" if mean is None else f"{mean['geometric']:.2f}") + (f" ({', '.join(marks)})" if marks else "")


def _more(task: Task) -> str:
    """What an export or its bench has to say in a line."""
    if task.stage.command == "export":
        record = _read(task.place.result / "export.json")
        files = sum(file.stat().st_size for file in (task.place.result / "mlc").rglob("*") if file.is_file())
        parity = record.get("parity")
        said = parity.get("summary") if isinstance(parity, dict) else parity
        return f" ({gigabytes(files)} for MLC-LLM; parity: {said})"
    if task.stage.command == "export bench":
        ours = [one for one in _read(task.place.result).get("measurements", []) if one["engine"] == "ours"]
        speeds = [
            (one["threads"], *(one["prompts"][0][kind]["median"] for kind in ("prefill", "decode"))) for one in ours
        ]
        said = (f"{n} threads: prefill {fill:,.0f}, decode {decode:,.0f} tok/s" for n, fill, decode in speeds)
        return f" ({'; '.join(said)})"
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
