"""Settings: dataclasses that become a command line, a YAML file and back.

A settings dataclass documents each field once, in the string under it; that text is the flag's
help. Nested dataclasses are groups (``--optimizer.lr``). A field whose metadata says
``may_change`` may differ when a run resumes; one whose metadata names a folder of :data:`RECIPES` under ``recipes``
names a file there, or any other YAML file, of values that all flags win over.
"""

import dataclasses
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, cast, get_type_hints

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import register_type

from common.errors import UserError
from common.words import CommandLine, closest_first, near_flags

Settings = TypeVar("Settings")

MAY_CHANGE = {"may_change": True}
"""Metadata of a field that does not decide what a run computes."""

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
"""Folders of YAML files of settings, one for each command that takes such."""


def option(default: Any, metadata: dict[str, Any] | None = None) -> Any:
    """A dataclass field with a default that may be mutable or carry metadata."""
    return dataclasses.field(default_factory=lambda: default, metadata=metadata)


class Count(int):
    """A whole number that may be written ``2e9``, ``500M``, ``1.5B`` or ``64k``."""

    _SCALE: ClassVar = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}

    @classmethod
    def parse(cls, value: Any) -> "Count":
        """Read a count; ValueError when it is not a whole number of at least zero."""
        match = re.fullmatch(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE]\+?[0-9]+)?)\s*([kKmMbBgGtT]?)\s*", str(value))
        if match is None:
            raise ValueError(f"{value!r} is not a count; write it like 131072, 2e9, 500M or 1.5B")
        number = Decimal(match[1].replace("_", "")) * cls._SCALE[match[2].lower()]  # 2.01M is no whole number in floats
        if number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return cls(int(number))


register_type(Count, serializer=int, deserializer=Count.parse)


_KEPT_SPACE = "\N{NO-BREAK SPACE}"
"""Between words of the help that stay in one line."""


class _Parser(ArgumentParser):
    """An argument parser whose flags are spelled with dashes and whose errors are one line."""

    line: CommandLine

    def format_help(self, formatter: Any = None) -> str:
        text: str = super().format_help(formatter).replace(_KEPT_SPACE, " ")
        text = re.sub(r"--[a-z_.]+", lambda flag: flag[0].replace("_", "-"), text)
        return re.sub(r"^  --[\w.-]+ CONFIG +Path to a configuration file\.\n", "", text, flags=re.M)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_plainly(message, self.line))


def parse(
    kind: type[Settings],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: str = "",
    commands: Sequence[str] = (),
) -> Settings:
    """Read ``argv`` into the settings dataclass ``kind``.

    Args:
        kind: a dataclass; its fields become flags (``seq_len`` is ``--seq-len``).
        argv: the words after the program's name.
        prog: how the command is typed, for the help.
        description: what the help says first; end it with an example.
        positional: the fields whose values may be typed without a flag, anywhere, separated by spaces; the last may be
            a list.
        commands: what the first word could have been in place of all this, for one that is mistyped.

    Raises:
        UserError: unknown flags, values that do not parse, words for which there is no place, a configuration file or a
            recipe that is not there.
        SystemExit: with 0 after ``--help``.
    """
    # Finding the strings under the fields means reading source again: a sixth of a second, for the help alone.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(argv))
    line = CommandLine(prog, {"config": str} | _hints(kind), positional.split(), commands)
    parser = _Parser(prog=prog, usage=line.usage, description=description, formatter_class=_Formatter)
    parser.line = line
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]
        help="YAML file of settings; flags after it win.",
    )
    parser.add_class_arguments(kind, None)
    words = line.flags(argv)
    recipe = _recipe(kind, words)
    namespace = parser.parse_args(words if recipe is None else ["--config", str(recipe), *words])
    namespace.pop("config", None)
    return _build(kind, namespace)


def _recipe(kind: type, words: Sequence[str]) -> Path | None:
    """The file of the recipe that is asked for, the last of several; None where none is."""
    folders = {f"--{field.name}": field.metadata.get("recipes") for field in dataclasses.fields(kind)}
    asked = None
    for word in words:
        flag, _, value = word.partition("=")
        folder = folders.get(flag)
        if folder is not None:
            asked = recipe_file(value, folder)
    return asked


def recipe_file(name: str, folder: str) -> Path:
    """The recipe called ``name`` in a folder of :data:`RECIPES`, or the file of that path.

    Raises:
        UserError: there is neither.
    """
    if Path(name).suffix:
        if not Path(name).exists():
            raise UserError(f"the recipe {name} is not there")
        return Path(name)
    known = sorted(path.stem for path in (RECIPES / folder).glob("*.yaml"))
    if name not in known:
        ranked = ", ".join(closest_first(name, known))
        raise UserError(f"no recipe is called {name!r}; there are {ranked} (closest first), or give a YAML file")
    return RECIPES / folder / f"{name}.yaml"


def to_dict(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain, YAML-safe values."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values[field.name] = to_dict(value)
        elif isinstance(value, bool) or value is None:
            values[field.name] = value
        elif isinstance(value, int):
            values[field.name] = int(value)
        elif isinstance(value, (float, str)):
            values[field.name] = value
        elif isinstance(value, (list, tuple)):
            values[field.name] = list(value)
        else:
            values[field.name] = str(value)
    return values


def to_yaml(settings: Any) -> str:
    """A settings dataclass as YAML that ``--config`` reads back."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError when there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as settings: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings")
    return values


def differences(settings: Any, stored: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Fields that decide what a run computes and that differ from ``stored``.

    A field that a stored group does not know came later: what was stored had its default.

    Returns:
        ``(name, stored value, new value)`` for each, nested names joined by dots.
    """
    found: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(settings):
        if field.metadata.get("may_change"):
            continue
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found += differences(value, _group(stored.get(field.name)), f"{prefix}{field.name}.")
            continue
        new, old = to_dict(settings)[field.name], stored.get(field.name)
        if prefix and stored and field.name not in stored and field.default is not dataclasses.MISSING:
            old = field.default
        if new != old:
            found.append((f"{prefix}{field.name}", old, new))
    return found


def _group(stored: Any) -> dict[str, Any]:
    """A stored group of settings; empty where another command has stored something else under its name."""
    return stored if isinstance(stored, dict) else {}


_WRONG = {
    "int": "is not a whole number",
    "float": "is not a number",
    "bool": "is neither true nor false",
    "str": "is not text; put it in quotes",
    "list": "is not a list such as [1, 2]",
}
"""What is said of a value that is not of a type."""


def _plainly(message: str, line: CommandLine) -> str:
    """One sentence of jsonargparse's report: the flag as it is typed, its value, and what is wrong with that."""
    missing = re.search(r"arguments are required: ([\w.]+)", message)
    if missing:
        return f"{missing[1].upper()} is missing; the command is {line.usage}"
    stranger = re.search(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'", message)
    if stranger:  # in a file
        name = ".".join(filter(None, stranger.groups()))
        return f"the file of settings has {name}, which is no setting here{near_flags(name, line.hints)}"
    key = re.match(r'Parser key "([\w.]+)":\s*', message)
    flag, report = (f"--{key[1].replace('_', '-')}: ", message[key.end() :]) if key else ("", message)
    return flag + (_wrong(report) or " ".join(report.split()))[:400]


def _wrong(report: str) -> str:
    """What is wrong with a value, of jsonargparse's report on it; empty where that says something else."""
    given = re.search(r"(?:Got|Given) value: (.*)", report, re.S)
    value = given[1].strip() if given else ""
    choices = re.search(r"Expected a typing\.Literal\[(.*)\]", report)
    names = ", ".join(closest_first(value, re.findall(r"'(.*?)'", choices[1]))) if choices else ""
    own = re.search(r"Not of type \w+: (.*)", report)
    if own:  # the sentence of the type itself, in which the report may have left the value out
        sentence = f"{value!r} {own[1]}" if own[1].startswith("is ") else own[1]
        return f"{sentence}, or one of {names}" if names else sentence
    if names:
        return f"{value!r} is not one of {names}"
    kind = re.search(r"Expected a <class '(\w+)'>", report)
    return f"{value!r} {_WRONG[kind[1]]}" if kind else ""


class _Formatter(DefaultHelpFormatter):
    """Wide enough that a flag and its text share a line; the description keeps its lines."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **({"max_help_position": 32} | options))

    def _get_help_string(self, action: Any) -> str:
        """The text of a flag, and its default where it has one."""
        text, typed = re.subn(r" \((?:required, )?type: .*\)$", "", super()._get_help_string(action))
        return f"{text} (default:{_KEPT_SPACE}%(default)s)" if typed and action.default not in (None, "", []) else text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _hints(kind: type, prefix: str = "") -> dict[str, Any]:
    """The type of every flag's value, by the flag's name; groups are their flags."""
    hints: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            hints |= _hints(cast(type, hint), f"{prefix}{name}.")
        else:
            hints[prefix + name] = hint
    return hints


def _build(kind: type[Settings], namespace: Namespace) -> Settings:
    hints = get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if not hasattr(namespace, field.name):
            continue
        value = getattr(namespace, field.name)
        if isinstance(value, Namespace):
            value = _build(cast(type, hints[field.name]), value)
        elif dataclasses.is_dataclass(hints[field.name]):
            raise UserError(f"{field.name} is a group of settings, not {value!r}")
        values[field.name] = value
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(str(error)) from error
