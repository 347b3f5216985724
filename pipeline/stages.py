"""From a recipe's stages to commands: the words that are typed, where each writes, what each reads.

Every stage's words are parsed by its command's own settings before the first stage runs, so a mistake in the last
is found at once. Imports nothing heavy.
"""

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.settings import parse
from pipeline.recipe import REFERENCE, references
from pipeline.settings import Recipe, Stage
from train.settings import run_path


@dataclass(frozen=True)
class Place:
    """Where a stage writes."""

    result: Path
    """What the stage makes: it is there when the stage is done, and it is what ``${STAGE}`` stands for."""
    run: Path | None = None
    """The run folder around a model, ``${STAGE.run}``."""
    whole: Path | None = None
    """Everything that the command goes on with when it is started again; set aside when its inputs have changed. None:
    the command replaces what is there."""


@dataclass(frozen=True)
class Kind:
    """A command that can be a stage."""

    words: tuple[str, ...]
    """What is typed after ``python``."""
    settings: str
    """Its settings class, ``module:name``."""
    place: Callable[[Path, Any], Place]
    """Where it writes: of the stage's own folder and its settings."""
    subject: str | None = None
    """The setting that is typed first, without its flag."""
    defaults: Callable[[Path, Mapping[str, str]], dict[str, str]] = lambda folder, given: {}
    """Settings that put its results where the recipe has them, where the recipe does not say otherwise; of the stage's
    own folder and what is given."""
    trains: bool = False
    """It has ranks, saves when it is signalled, and has SLURM queue it again."""
    parts: tuple[str, ...] = ()
    """What of a result folder counts for those that read it. Default: everything."""

    def parse(self, values: Mapping[str, str]) -> Any:
        """The settings as the command will understand them; UserError for what it would refuse."""
        module, _, name = self.settings.partition(":")
        words = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        return parse(getattr(import_module(module), name), words, prog="", description="")

    def typed(self, values: Mapping[str, str]) -> list[str]:
        """The words after ``python``."""
        first = [value for key, value in values.items() if key == self.subject]
        rest = [(f"--{key.replace('_', '-')}", value) for key, value in values.items() if key != self.subject]
        return [*self.words, *first, *(word for pair in rest for word in pair)]


def _run(folder: Path, settings: Any) -> Place:
    run = run_path(settings.run)
    return Place(run / "model", run, run)


def _prune(folder: Path, settings: Any) -> Place:
    if not settings.recover:
        return Place(Path(settings.out), None, folder)
    run = run_path(settings.recovery.run)
    return Place(run / "model", run, folder)


def _prune_defaults(folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    recovers = KINDS["pruning"].parse(given).recover
    return {"out": str(folder / "cut")} | ({"recovery.run": str(folder / "recovered")} if recovers else {})


def _score_defaults(folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Scores of a run's model lie in the run."""
    model = Path(given.get("model", ""))
    return {"out": str(model.parent / "scores" / folder.name if model.name == "model" else folder)}


def _export(folder: Path, settings: Any) -> Place:
    from export.settings import out_folder

    return Place(out_folder(settings.model, settings.out))


def _own_folder(name: str) -> Callable[[Path, Mapping[str, str]], dict[str, str]]:
    """The stage's own folder, as the value of a flag."""
    return lambda folder, given: {name: str(folder)}


KINDS = {
    "data tokenizer": Kind(
        ("-m", "data", "tokenizer"),
        "data.settings:TokenizerSettings",
        lambda folder, settings: Place(Path(settings.out)),
        defaults=_own_folder("out"),
    ),
    "data prepare": Kind(
        ("-m", "data", "prepare"),
        "data.settings:PrepareSettings",
        lambda folder, settings: Place(Path(settings.out), whole=Path(settings.out)),
        defaults=_own_folder("out"),
    ),
    "train": Kind(("train.py",), "train.settings:TrainCommand", _run, defaults=_own_folder("run"), trains=True),
    "sft": Kind(("-m", "sft"), "sft.settings:SftCommand", _run, "model", _own_folder("run"), trains=True),
    "scoring": Kind(
        ("-m", "scoring"),
        "scoring.settings:ScoreCommand",
        lambda folder, settings: Place(Path(settings.out), whole=Path(settings.out)),
        "model",
        _score_defaults,
        parts=("score.json",),
    ),
    "pruning": Kind(("-m", "pruning"), "pruning.settings:PruneCommand", _prune, "model", _prune_defaults),
    "export": Kind(
        ("-m", "export"), "export.settings:ExportCommand", _export, "model", parts=("config.json", "mlc", "lib")
    ),
    "export bench": Kind(
        ("-m", "export", "bench"),
        "export.settings:BenchCommand",
        lambda folder, settings: Place(Path(settings.folder) / "bench.json"),
        "folder",
    ),
    "submit report": Kind(
        ("-m", "submit", "report"),
        "submit.settings:ReportCommand",
        lambda folder, settings: Place(Path(settings.out or Path(settings.run) / "report.html")),
        "run",
    ),
    "submit bundle": Kind(
        ("-m", "submit", "bundle"),
        "submit.settings:BundleCommand",
        lambda folder, settings: Place(Path(settings.out)),
        "run",
        _own_folder("out"),
    ),
}
"""The commands that a recipe can name, with the word ``python`` and flags left out."""


@dataclass(frozen=True)
class Task:
    """A stage whose references are resolved: a command that can be run."""

    name: str
    kind: Kind
    settings: Any
    """As the command understands them."""
    words: list[str]
    """What is typed after ``python``."""
    place: Place
    waits_for: tuple["Task", ...]
    """The stages whose results it reads."""
    paths: tuple[Path, ...]
    """Files and folders of the user's that its settings may name; those that are there are inputs."""
    stage: Stage

    @property
    def shown(self) -> str:
        """The command as a user would type it."""
        return shlex.join(["python", *self.words])


def tasks(recipe: Recipe) -> list[Task]:
    """Every stage of a recipe as a command, in the recipe's order.

    Raises:
        UserError: a stage names an unknown command, a setting that it does not have or a value that it does not take.
    """
    found: dict[str, Task] = {}
    for stage in recipe.stages:
        if stage.command not in KINDS:
            near = difflib.get_close_matches(stage.command, KINDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"stage {stage.name}: {stage.command!r} is none of {', '.join(KINDS)}{hint}")
        try:
            found[stage.name] = _task(recipe, stage, found)
        except UserError as error:
            raise UserError(f"stage {stage.name}: {error}") from error
    places = [task.place.result for task in found.values()]
    for task in found.values():
        if places.count(task.place.result) > 1:
            raise UserError(f"stage {task.name}: another stage makes {task.place.result} too; give one another place")
    return list(found.values())


def _task(recipe: Recipe, stage: Stage, earlier: Mapping[str, Task]) -> Task:
    kind, folder = KINDS[stage.command], recipe.folder / stage.name
    given = {name.replace("-", "_"): _resolved(value, earlier) for name, value in stage.settings.items()}
    values = given | {name: value for name, value in kind.defaults(folder, given).items() if name not in given}
    settings = kind.parse(values)
    return Task(
        stage.name,
        kind,
        settings,
        kind.typed(values),
        kind.place(folder, settings),
        tuple(earlier[name] for name in references(stage)),
        tuple(path for value in stage.settings.values() for path in _paths(value)),
        stage,
    )


def _resolved(value: str, earlier: Mapping[str, Task]) -> str:
    """A value with paths in place of its references."""

    def path(match: re.Match[str]) -> str:
        place = earlier[match[1]].place
        if match[2] and place.run is None:
            raise UserError(f"{match[0]}: stage {match[1]} makes no run, only {place.result}")
        return str(place.run if match[2] else place.result)

    return REFERENCE.sub(path, value)


def _paths(value: str) -> Iterator[Path]:
    """What in a setting may be the name of a file or folder: the whole, or a part of a mix (``DIR=0.5,FILE=0.5``)."""
    if REFERENCE.search(value):
        value = REFERENCE.sub("", value)
    for word in {value, *(part.rpartition("=")[0] or part for part in value.split(","))}:
        if word and ("/" in word or os.path.exists(word)):
            yield Path(word)


def inputs(task: Task, others: Sequence[Task]) -> dict[str, tuple[Path, tuple[str, ...], tuple[Path, ...]]]:
    """What a stage reads: of each its path, what of it counts, and what of it does not.

    Args:
        task: the stage.
        others: all stages: what they make inside of an input is not part of it.
    """
    found = {}
    for one in task.waits_for:
        inside = tuple(
            other.place.result
            for other in others
            if other.name != one.name and one.place.result in other.place.result.parents
        )
        found[one.name] = (one.place.result, one.kind.parts, inside)
    own = (task.place.result, task.place.run, task.place.whole)
    # What is no path may be too long for one, at which Path.exists raises.
    found |= {str(path): (path, (), ()) for path in task.paths if path not in own and os.path.exists(path)}
    return found
