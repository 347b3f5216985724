"""Where a run's weights come from: nothing, another model's weights, or a checkpoint to go on from."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.errors import UserError
from common.run_folder import RunFolder
from common.settings import differences, read_yaml
from data.tokenizer import Tokenizer
from train import checkpoint
from train.records import read_state
from train.settings import PretrainSettings, Run, RunSettings

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Origin:
    """What a run starts from; at most one of the two."""

    checkpoint: Path | None = None
    """Go on from here: weights, optimiser, data."""
    init: Path | None = None
    """Take the weights alone."""
    verified: bool = False
    """The checkpoint's files have been compared with their checksums."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that belongs to the weights."""
        for folder in _tokenizer_folders(self.checkpoint or self.init):
            if (folder / "tokenizer.json").exists():
                return Tokenizer(folder)
        return None


def _tokenizer_folders(path: Path | None) -> list[Path]:
    """A model folder holds its tokenizer; a checkpoint's is its run's."""
    return [] if path is None else [path, path.absolute().parent.parent / "tokenizer"]


def adopt_stored(settings: Run, run: RunFolder) -> Run:
    """Take what the command leaves open from the run it goes on with.

    Defaults that depend on the budget (batch, warm-up, decay) must not move when ``--tokens`` grows.
    """
    stored = _stored_settings(settings, run)
    return settings if stored is None else _fill(settings, stored)


def stored_model(settings: RunSettings, run: RunFolder) -> Path | None:
    """A checkpoint with the ``config.json`` of the model that the run goes on with; None for a new run."""
    asked = _asked_for(settings, run)
    if asked is not None:
        return asked
    steps = checkpoint.steps_in(run.checkpoints)
    readable = [run.checkpoints / f"step-{step:07d}" for step in reversed(steps)]
    return next((path for path in readable if (path / "config.json").exists()), None)


def find_origin(settings: RunSettings, run: RunFolder, warn: Callable[[str], None], init: str | None) -> Origin:
    """Decide what the run starts from; ``init`` names the weights of a new run, None leaves them to be drawn.

    Raises:
        UserError: the run was made with other settings (shows them), exists though ``--resume never`` or
            another run's checkpoint was asked for, or has only damaged checkpoints; the folder is no run's and has a
            model in it.
    """
    stored = _stored_settings(settings, run)
    if stored is not None:
        _refuse_differences(settings, stored, run)
    steps = checkpoint.steps_in(run.checkpoints)
    asked = _asked_for(settings, run)
    if asked is not None:
        own = asked.absolute().parent == run.checkpoints.absolute()
        if steps and not own:
            raise UserError(
                f"the run {run.path} has checkpoints of its own; choose another --run to go on from {asked}"
            )
        damage = checkpoint.damaged(asked)
        if damage is not None:
            raise UserError(f"the checkpoint {asked} is damaged: {damage}")
        return Origin(checkpoint=asked, verified=True)
    if steps:
        if settings.resume == "never":
            raise UserError(f"the run {run.path} exists; leave --resume out to go on with it, or choose another --run")
        newest = checkpoint.newest_good(run.checkpoints, warn)
        if newest is None:
            raise UserError(f"all checkpoints in {run.checkpoints} are damaged; start a new run with another --run")
        return Origin(checkpoint=newest, verified=True)
    if run.model.exists() and not run.config.exists():
        raise UserError(f"{run.model} is there already, though {run.path} is no run; choose another --run")
    if stored is None:
        _set_tokenizer_aside(run, settings)
    return Origin(init=Path(init) if init else None)


def _set_tokenizer_aside(run: RunFolder, settings: RunSettings) -> None:
    """Rename a tokenizer that stands where the run's will: it may be of a start with other settings, or the user's."""
    named = settings.tokenizer if isinstance(settings, PretrainSettings) else None
    if named is not None and Path(named).expanduser().absolute() == run.tokenizer.absolute():
        return
    if run.tokenizer.exists():
        aside = run.tokenizer.with_name(f"superseded-{run.tokenizer.name}")
        shutil.rmtree(aside, ignore_errors=True)
        run.tokenizer.rename(aside)


def _asked_for(settings: RunSettings, run: RunFolder) -> Path | None:
    """The checkpoint that ``--resume PATH`` names; None when the run has gone on from it already.

    So the same command can be given again, by a user or by SLURM, without starting over each time.
    """
    if settings.resume in ("auto", "never"):
        return None
    asked = Path(settings.resume)
    if run.config.exists() and read_yaml(run.config).get("resume") == settings.resume:
        steps = checkpoint.steps_in(run.checkpoints)
        # A run that has gone on from it may have removed it, as it does with old ones.
        if steps and (not asked.exists() or steps[-1] > read_state(asked)["step"]):
            return None
    return asked


def _stored_settings(settings: RunSettings, run: RunFolder) -> dict[str, Any] | None:
    """The settings that the checkpoint to go on from was made with, or None for a new run.

    A run that was stopped before its first checkpoint binds nobody, unless its settings are the same.
    """
    asked = _asked_for(settings, run)
    if asked is not None:
        return dict(read_state(asked)["settings"])
    if not run.config.exists():
        return None
    stored = read_yaml(run.config)
    if checkpoint.steps_in(run.checkpoints) or not differences(_fill(settings, stored), stored):
        return stored
    return None


def _fill(settings: Settings, stored: dict[str, Any]) -> Settings:
    """``settings`` with stored values where it has None or auto."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value, before = getattr(settings, field.name), stored.get(field.name)
        if field.metadata.get("may_change"):
            continue
        if dataclasses.is_dataclass(value):
            changes[field.name] = _fill(value, before if isinstance(before, dict) else {})
        elif value is None or value == "auto":
            changes[field.name] = value if before is None else before
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def _refuse_differences(settings: RunSettings, stored: dict[str, Any], run: RunFolder) -> None:
    different = [
        (name, old, new)
        for name, old, new in differences(settings, stored)
        if not (name == "tokens" and old is not None and new >= old)
    ]
    if different:
        shown = "; ".join(f"{name} was {old}, now {new}" for name, old, new in different)
        raise UserError(
            f"the run {run.path} belongs to other settings: {shown}. "
            "Give the same settings to go on with it, or choose another --run"
        )
