"""Settings: dataclasses that become a command line, a YAML file and back.

A settings dataclass documents each field once, in the string under it; that text is the flag's
help. Nested dataclasses are groups (``--optimizer.lr``). A field whose metadata says
``may_change`` may differ when a run resumes; one whose metadata names a folder of :data:`RECIPES` under ``recipes``
names a file there, or any other YAML file, of values that all flags win over.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, cast, get_type_hints

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import register_type

from common.errors import UserError

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


class _Parser(ArgumentParser):
    """An argument parser whose flags are spelled with dashes and whose errors are one line."""

    def format_help(self, formatter: Any = None) -> str:
        text: str = super().format_help(formatter)
        text = re.sub(r"--[a-z_.]+", lambda flag: flag[0].replace("_", "-"), text)
        text = re.sub(r"\s*\(type:\s[^()]*?,\s+default:\s+null\)", "", text)
        text = re.sub(r"\(type:\s[^()]*?,\s+default:\s+", "(default: ", text)
        text = re.sub(r"^  --\w+ CONFIG +Path to a configuration file\.\n", "", text, flags=re.M)
        return re.sub(r"\s+\[--(?!config)\w+ CONFIG\]", "", text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(self._with_suggestions(_shorter(message)))

    def _with_suggestions(self, message: str) -> str:
        unknown = re.findall(r"--[\w.-]+", message) if "nrecognized" in message else []
        known = [flag.replace("_", "-") for flag in self._option_string_actions if flag.startswith("--")]
        near = [match for flag in unknown for match in difflib.get_close_matches(flag, known, n=1)]
        return message + (f" Did you mean {', '.join(near)}?" if near else "")


def parse(
    kind: type[Settings],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
) -> Settings:
    """Read ``argv`` into the settings dataclass ``kind``.

    Args:
        kind: a dataclass; its fields become flags (``seq_len`` is ``--seq-len``).
        argv: the words after the program's name.
        prog: how the command is typed, for the help.
        description: what the help says first; end it with an example.

    Raises:
        UserError: unknown flags, values that do not parse, a configuration file or a recipe that is not there.
        SystemExit: with 0 after ``--help``.
    """
    # Finding the strings under the fields means reading source again: a sixth of a second, for the help alone.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=not {"-h", "--help"}.isdisjoint(argv))
    parser = _Parser(prog=prog, description=description, formatter_class=_Formatter)
    parser.add_argument(
        "--config",
        action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]
        help="YAML file of settings; flags after it win.",
    )
    parser.add_class_arguments(kind, None)
    words = _normalise(kind, argv)
    recipe = _recipe(kind, words)
    namespace = parser.parse_args(words if recipe is None else ["--config", str(recipe), *words])
    namespace.pop("config", None)
    return _build(kind, namespace)


def _recipe(kind: type, words: Sequence[str]) -> Path | None:
    """The file of the recipe that is asked for, the last of several; None where none is."""
    folders = {f"--{field.name}": field.metadata.get("recipes") for field in dataclasses.fields(kind)}
    asked = None
    for word, following in pairwise([*words, ""]):
        flag, equals, value = word.partition("=")
        folder = folders.get(flag)
        if folder is not None:
            asked = recipe_file(value if equals else following, folder)
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
        ranked = sorted(known, key=lambda one: -difflib.SequenceMatcher(None, name, one).ratio())
        raise UserError(
            f"no recipe is called {name!r}; there are {', '.join(ranked)} (closest first), or give a YAML file"
        )
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


def _shorter(message: str) -> str:
    """One line of jsonargparse's report: the flag as it is typed, and what is wrong with its value."""
    message = re.sub(r'Parser key "([\w.]+)":\s*', lambda key: f"--{key[1].replace('_', '-')}: ", message)
    reasons = [line.strip(" -") for line in message.splitlines() if line.strip().startswith("- ")]
    telling = [reason.split(": ", 1)[-1] for reason in reasons if "NoneType" not in reason]
    head, *rest = message.splitlines()
    if telling and "Union" in message:
        return f"{head.partition(': ')[0]}: {telling[0]}"
    return " ".join([head, *(line.strip() for line in rest)])[:400]


class _Formatter(DefaultHelpFormatter):
    """Wide enough that a flag and its text share a line; the description keeps its lines."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **({"max_help_position": 32} | options))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _normalise(kind: type, argv: Sequence[str]) -> list[str]:
    """Accept ``--seq-len`` for the field ``seq_len``, and a bare ``--deterministic`` or ``--compile``."""
    words: list[str] = []
    bare = _bare_values(kind)
    for position, word in enumerate(argv):
        if not word.startswith("--"):
            words.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if not equals and following.startswith("--") and name in bare:
            equals, value = "=", bare[name]
        words.append("--" + name + equals + value)
    return words


def _bare_values(kind: type, prefix: str = "") -> dict[str, str]:
    """What a flag without a value means: true for a bool, on for a choice of auto, on and off."""
    values: dict[str, str] = {}
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            values |= _bare_values(cast(type, hint), f"{prefix}{name}.")
        elif hint is bool:
            values[prefix + name] = "true"
        elif {"on", "off"} <= set(getattr(hint, "__args__", ())):
            values[prefix + name] = "on"
    return values


def _build(kind: type[Settings], namespace: Namespace) -> Settings:
    hints = get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if not hasattr(namespace, field.name):
            continue
        value = getattr(namespace, field.name)
        if isinstance(value, Namespace):
            value = _build(cast(type, hints[field.name]), value)
        values[field.name] = value
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(str(error)) from error
