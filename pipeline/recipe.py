"""Read a recipe: YAML to :class:`pipeline.settings.Recipe`, every mistake named before anything runs.

```yaml
name: mine
slurm: account=lab              # for all stages; a stage's own come on top
stages:
  pretrain:
    command: train              # python train.py
    settings: {size: 125m, tokens: 2e9}
    slurm: gpus=8,time=24:00:00
  sft:
    command: sft                # python -m sft
    settings: {model: "${pretrain}"}
```
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from pipeline.settings import Recipe, Stage
from train.slurm import Request

KEYS = ("name", "folder", "gpu", "price", "slurm", "stages")
STAGE_KEYS = ("command", "settings", "after", "slurm")
REFERENCE = re.compile(r"\$\{([\w-]+)(\.run)?\}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is a mistake: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe, with other values in place of some of its own.

    Args:
        path: the YAML file.
        changes: ``STAGE.SETTING=VALUE`` for a setting of a stage, ``folder=DIR``, or ``slurm=account=lab`` for every
            stage.

    Raises:
        UserError: the file cannot be read, a key or a change is unknown, a value is none, a stage refers to one that
            does not stand before it.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader of ours
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from error
    try:
        return _recipe(path, _mapping(values, "a recipe"), changes)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML that :func:`read_recipe` reads back."""
    stages = {}
    for stage in recipe.stages:
        parts = {
            "command": stage.command,
            "settings": stage.settings,
            "after": list(stage.after),
            "slurm": None if stage.slurm is None else str(stage.slurm),
        }
        stages[stage.name] = {name: value for name, value in parts.items() if value}
    head = {"name": recipe.name, "folder": str(recipe.folder), "gpu": recipe.gpu, "price": recipe.price}
    whole = {name: value for name, value in head.items() if value is not None} | {"stages": stages}
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=120)


def references(stage: Stage) -> list[str]:
    """The stages that a stage waits for, each once: those that its settings name, and those of ``after``."""
    named = [name for value in stage.settings.values() for name, _ in REFERENCE.findall(value)]
    return list(dict.fromkeys([*named, *stage.after]))


def _recipe(path: Path, values: Mapping[str, Any], changes: Sequence[str]) -> Recipe:
    _known(values, KEYS, "a recipe has")
    name = str(values.get("name", path.stem))
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"the name {name!r} is part of paths; use letters, digits, dots and dashes")
    shared = _request(values.get("slurm"), "slurm")
    stages = [_stage(key, one, shared) for key, one in _mapping(values.get("stages"), "stages").items()]
    folder = Path(str(values.get("folder", Path("runs") / name)))
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is no change; write STAGE.SETTING=VALUE or folder=DIR")
        if key == "folder":
            folder = Path(value)
        elif key == "slurm":
            own = _request(value, "slurm")
            stages = [replace(stage, slurm=_joined(stage.slurm, own)) for stage in stages]
        else:
            stages = _changed(stages, key, value)
    for number, stage in enumerate(stages):
        before = [one.name for one in stages[:number]]
        for setting, value in stage.settings.items():
            if "${" in REFERENCE.sub("", value):
                raise ValueError(
                    f"{setting} of stage {stage.name}: {value!r} is like neither ${{STAGE}} nor ${{STAGE.run}}"
                )
        for wanted in references(stage):
            if wanted not in before:
                raise ValueError(
                    f"stage {stage.name} refers to {wanted!r}; before it stand {', '.join(before) or 'none'}"
                )
    price = values.get("price")
    if price is not None and not isinstance(price, int | float):
        raise ValueError(f"price is a number of dollars, not {price!r}")
    gpu = values.get("gpu")
    return Recipe(name, folder, tuple(stages), None if gpu is None else str(gpu), price)


def _stage(name: Any, values: Any, shared: Request | None) -> Stage:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name) or name == "pipeline":
        raise ValueError(f"{name!r} cannot be the name of a stage; use letters, digits and dashes")
    values = _mapping(values, f"stage {name}")
    _known(values, STAGE_KEYS, f"stage {name} has")
    if not isinstance(values.get("command"), str):
        raise ValueError(f"stage {name} has no command, such as: command: train")
    after = values.get("after") or []
    if not isinstance(after, list):
        raise ValueError(f"after of stage {name} is a list of stages, not {after!r}")
    own = _request(values.get("slurm"), f"slurm of stage {name}")
    return Stage(
        name,
        values["command"],
        dict(_typed(values["settings"], f"settings of stage {name}")) if values.get("settings") else {},
        tuple(map(str, after)),
        _joined(shared, own),
    )


def _typed(values: Any, where: str, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Settings as they are typed; groups become names with dots."""
    for name, value in _mapping(values, where).items():
        if isinstance(value, dict):
            yield from _typed(value, where, f"{prefix}{name}.")
        elif value is None:
            raise ValueError(f"{prefix}{name} in the {where} has no value")
        elif isinstance(value, bool | list):
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)
        else:
            yield f"{prefix}{name}", str(value)


def _changed(stages: Sequence[Stage], key: str, value: str) -> list[Stage]:
    name, _, setting = key.partition(".")
    if not setting or name not in [stage.name for stage in stages]:
        names = ", ".join(stage.name for stage in stages)
        raise ValueError(f"{key}={value} changes nothing here; it begins with one of the stages {names}, and a dot")
    return [replace(one, settings={**one.settings, setting: value}) if one.name == name else one for one in stages]


def _request(value: Any, where: str) -> Request | None:
    if value is None:
        return None
    try:
        return Request.parse(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _joined(shared: Request | None, own: Request | None) -> Request | None:
    """Two requests in one; what the second says counts."""
    values = {**(shared.values if shared else {}), **(own.values if own else {})}
    return Request(values) if values else None


def _mapping(value: Any, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{what} is a mapping of names to values; here is {value!r}")
    return value


def _known(values: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key!r} is unknown: {what} {', '.join(known)}{hint}")
