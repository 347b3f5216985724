"""A run folder as it is at this moment, and the models on the way to its own: read, never written.

A run may still be going on, or be one that another version wrote: what is not there is empty, and only a file that is
there and cannot be read is an error.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.settings import read_yaml
from scoring.fingerprint import fingerprint
from scoring.results import missing

STAGES = {"pretrain": "Pre-training", "sft": "Fine-tuning", "prune": "Pruning", "recover": "Recovery"}
"""What a model can come out of, and what it is called."""


class Run:
    """What a run has left so far.

    Args:
        path: the run folder, or the ``model`` folder in it.

    Raises:
        UserError: there is no run.
    """

    def __init__(self, path: Path) -> None:
        path = path.absolute()
        if path.name == "model" and (path.parent / "config.yaml").exists():
            path = path.parent
        if not (path / "config.yaml").exists():
            raise UserError(f"{path} is no run folder: it has no config.yaml. Runs lie under runs/")
        self.path = path
        self.settings = read_yaml(path / "config.yaml")
        self.environment = read_json(path / "env.json")
        self.record = read_json(path / "model" / "palmtop.json")

    @property
    def name(self) -> str:
        """What the run is called: its path below ``runs``, else its folder's name."""
        parts = self.path.parts
        below = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else ()
        return "/".join(below) or self.path.name

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Every line of ``metrics.jsonl``."""
        return read_lines(self.path / "metrics.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """What the model wrote at its evaluations."""
        return read_lines(self.path / "samples.jsonl")

    @cached_property
    def scores(self) -> list["ScoreFile"]:
        """Every result of scoring in the run, the one that can be compared best first."""
        read = [(path, read_json(path)) for path in sorted(self.path.glob("scores/*/score.json"))]
        return sorted([ScoreFile(path, found, self._is_stale(found)) for path, found in read], key=lambda one: one.rank)

    @property
    def score(self) -> "ScoreFile | None":
        """The scores of the run, to be ranked and handed in: of the competition's tasks and the model as it is now."""
        return next((score for score in self.scores if score.competition and not score.stale), None)

    def _is_stale(self, found: Mapping[str, Any]) -> bool:
        """Whether a ``score.json`` is of other weights than the model's; not where either is unknown."""
        scored = (found.get("asked") or {}).get("weights")
        return scored is not None and self._weights not in (None, scored)

    @cached_property
    def _weights(self) -> str | None:
        """The fingerprint of the run's model; None where it has no weights."""
        folder = self.path / "model"
        if not any(folder.glob("*.safetensors")):
            return None
        return _fingerprint(folder, tuple(file.stat().st_mtime_ns for file in sorted(folder.iterdir())))

    @property
    def kind(self) -> str:
        """Which of :data:`STAGES` it is."""
        if isinstance(self.settings.get("model"), str):
            return "sft"
        return "recover" if self.settings.get("init") and self.settings.get("teacher") else "pretrain"

    @property
    def parent(self) -> str | None:
        """The model folder that it started from, as its settings name it."""
        model = self.settings.get("model")
        named = model if isinstance(model, str) else self.settings.get("init")
        return None if named is None else str(named)

    def steps(self) -> list[dict[str, Any]]:
        """The training steps."""
        return [line for line in self.metrics if "loss" in line]

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations, one for each step that was evaluated."""
        return [line for line in self.metrics if any(name.startswith(("val/", "score/")) for name in line)]

    def starts(self) -> list[dict[str, Any]]:
        """When training began, and each time that it went on."""
        return [line for line in self.metrics if line.get("event") == "start"]

    def results(self, name: str) -> dict[str, Any]:
        """A file of the run's export: ``export.json``, ``bench.json`` or ``phone.json``."""
        return read_json(self.path / "export" / name)


@dataclass(frozen=True)
class ScoreFile:
    """A ``score.json``."""

    path: Path
    found: Mapping[str, Any]
    stale: bool
    """Of other weights than the run's model has now."""

    @property
    def marks(self) -> list[str]:
        """What keeps it from comparison with full scores: ``sample: …``, ``limit: …``."""
        return [str(mark) for mark in self.found.get("marks") or ()]

    @property
    def competition(self) -> dict[str, dict[str, Any]]:
        """The competition's tasks by name."""
        return {one["name"]: one for one in self.found.get("competition") or ()}

    @property
    def scores(self) -> dict[str, float | None]:
        """Their scores, 0 to 100, and LongBench where it was asked for."""
        longbench = (self.found.get("tasks") or {}).get("longbench", {}).get("score,none")
        scores: dict[str, float | None] = {name: one["score"] for name, one in self.competition.items()}
        return scores if longbench is None else scores | {"longbench": 100 * longbench}

    @property
    def missing(self) -> list[str]:
        """The competition's tasks that it has no score of, where it has any."""
        return missing({name: one["score"] for name, one in self.competition.items()})

    @property
    def caveats(self) -> list[str]:
        """What it is short of full scores by: its marks, ``stale: …`` and ``incomplete: …``."""
        stale = ["stale: the run's model has other weights now"] * self.stale
        return [*stale, *self.marks, *[f"incomplete: no score of {', '.join(self.missing)}"] * bool(self.missing)]

    @property
    def rank(self) -> tuple[bool, bool, bool, bool, float]:
        """Sorts scores of the competition before other suites: full ones, incomplete ones, marked ones, stale ones.

        A task alone can be compared with others' scores, a sample or a few rows of all six with nobody's. Of one kind
        the newer comes first.
        """
        marked, incomplete = bool(self.marks), bool(self.missing)
        return not self.competition, self.stale, marked, incomplete, -self.path.stat().st_mtime


@dataclass(frozen=True)
class Made:
    """A model on the way: what made it, and from what."""

    folder: Path
    """The model folder; of a run that is going on it may not be there yet."""
    kind: str
    """One of :data:`STAGES`; else what its ``palmtop.json`` says."""
    run: Run | None
    """The run that trained it; None for a cut, and for a model from elsewhere."""
    record: Mapping[str, Any]
    """Its ``palmtop.json``."""

    @property
    def name(self) -> str:
        """What it is called."""
        return self.run.name if self.run is not None else self.folder.name

    @property
    def pruning(self) -> dict[str, Any]:
        """Its ``pruning.json``; empty where it was not cut."""
        return read_json(self.folder / "pruning.json")


def lineage(run: Run) -> list[Made]:
    """The models from which a run's own came, the first one first, the run's own last.

    Parents are looked for where the records say; a relative path is taken from here, then from every folder above the
    run. The line ends where one is not found.
    """
    made = [Made(run.path / "model", run.kind, run, run.record)]
    while (named := _parent_of(made[-1])) is not None:
        folder = _find(named, made[-1].folder)
        if folder is None or folder in [one.folder for one in made]:
            break
        made.append(_made(folder))
    return made[::-1]


def _parent_of(one: Made) -> str | None:
    named = one.run.parent if one.run is not None else one.record.get("parent")
    return None if named is None else str(named)


def _made(folder: Path) -> Made:
    with suppress(UserError):
        run = Run(folder)
        return Made(folder, run.kind, run, run.record)
    record = read_json(folder / "palmtop.json")
    return Made(folder, str(record.get("stage", "unknown")), None, record)


def _find(named: str, beside: Path) -> Path | None:
    """A model folder by the name that a record gives it."""
    for base in (Path.cwd(), *beside.parents):
        folder = (base / named).absolute()
        if (folder / "config.json").exists():
            return folder
    return None


@lru_cache
def _fingerprint(folder: Path, written: tuple[int, ...]) -> str:
    """The fingerprint of a model whose files were written then: a page that is served is made every few seconds."""
    return fingerprint(folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. UserError where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; put it right, or remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; put it right, or remove it")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file, if there is one; the last may be half-written."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    for line in lines:
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append(record)
    return found


def data_of(line: Sequence[Made]) -> list[dict[str, Any]]:
    """What the weights at the end of a line have seen, by stage; of a run going on, what its parents have."""
    for one in reversed(line):
        if one.record:
            return list(one.record.get("data") or [])
    return []
