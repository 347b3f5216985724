"""The words of a command: which are flags, which their values, and which stand alone."""

import difflib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import yaml

from common.errors import UserError

FLAG = re.compile(r"--?[A-Za-z]")
"""How a flag begins; a number below zero does not."""

BOOLEANS = ("true", "false", "yes", "no", "on", "off")


@dataclass(frozen=True)
class CommandLine:
    """What may be typed after a program's name."""

    prog: str
    """How the program is typed."""
    hints: Mapping[str, Any]
    """The type of each flag's value, by the flag's name: ``seq_len`` of ``--seq-len`` or ``--seq_len``."""
    places: Sequence[str]
    """The flags whose values may stand alone, in their order; the last may be a list, and takes all that are left."""
    commands: Sequence[str]
    """What the first word could have been in place of all this."""

    @property
    def usage(self) -> str:
        """The command in a line."""
        typed = [f"[{name.upper()} ...]" if self._is_list(name) else name.upper() for name in self.places]
        return " ".join([self.prog, *typed, "[options]"])

    def flags(self, argv: Sequence[str]) -> list[str]:
        """All words as flags with their values, ``--seq_len=64``, those last that stood alone.

        Raises:
            UserError: there is no such flag or command, a value is missing, or a word has no place.
        """
        flags: list[str] = []
        alone: list[str] = []
        left = list(argv)
        while left:
            word = left.pop(0)
            if FLAG.match(word):
                flags.append(self._flag(word, left, full=len(alone) >= self._most))
            else:
                alone.append(word)
        first = next(iter(argv), "")
        if alone[:1] == [first] and self.commands and (not self.places or _is_meant(first, self.commands)):
            raise no_command(self.prog, first, self.commands)
        return flags + self._placed(alone, {flag.partition("=")[0] for flag in flags})

    def _flag(self, word: str, left: list[str], *, full: bool) -> str:
        """A flag with its value, which is taken from the words after it where it is not in the flag's own."""
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if flag in ("-h", "--help", "--print-config", "--print_config"):  # the parser's own
            return word.replace("print-config", "print_config")
        hint = self.hints.get(name.removesuffix("+"))  # --prompts+ adds to a list
        if hint is None or not flag.startswith("--"):
            raise UserError(f"there is no flag {flag}{near_flags(name, self.hints) or '; --help lists them'}")
        if not equals:
            value = _value(flag, hint, left, full=full)
        return f"--{name}={_as_list(hint, value) if name in self.hints else value}"

    def _placed(self, alone: Sequence[str], given: set[str]) -> list[str]:
        """Words that stand alone, with the flags of their places; where a flag itself is given, its place is taken."""
        flags: list[str] = []
        left = list(alone)
        for name in self.places:
            if left and f"--{name}" not in given:
                several = self._is_list(name)
                flags.append(f"--{name}={json.dumps(left) if several else left[0]}")
                left = [] if several else left[1:]
        if left:
            raise UserError(f"{left[0]!r} is one word too many; the command is {self.usage}")
        return flags

    @property
    def _most(self) -> float:
        """How many words may stand alone."""
        return math.inf if any(map(self._is_list, self.places)) else len(self.places)

    def _is_list(self, name: str) -> bool:
        return self.hints[name] == list[str]


def _value(flag: str, hint: Any, left: list[str], *, full: bool) -> str:
    """The value of a flag, taken from the words after it.

    A switch also stands bare: it takes only a word that can be its value, or any where no more words may stand alone.
    """
    follows = bool(left) and not FLAG.match(left[0])
    values = _switch(hint)
    if values and not (follows and (full or left[0].lower() in values)):
        return values[0]
    if not follows:
        raise UserError(f"{flag} needs a value")
    return left.pop(0)


def _switch(hint: Any) -> tuple[str, ...]:
    """The values of a flag that may stand bare, that which it then has first; none of other flags."""
    if hint is bool:
        return BOOLEANS
    choices = getattr(hint, "__args__", ())
    return ("on", *choices) if {"on", "off"} <= set(choices) else ()


def _as_list(hint: Any, value: str) -> str:
    """A value as the parser reads it: numbers of a list may be typed with commas, a text as a list of one."""
    if hint not in (list[int], list[float], list[str]):
        return value
    with suppress(yaml.YAMLError):
        if value.lstrip().startswith("[") and isinstance(yaml.safe_load(value), list):
            return value
    return json.dumps([value] if hint == list[str] else [number.strip() for number in value.split(",")])


def _is_meant(word: str, commands: Sequence[str]) -> bool:
    """Whether a word is meant to be one of these commands: it is nearly one, and no file or folder here."""
    return bool(difflib.get_close_matches(word, commands, n=1, cutoff=0.7)) and not os.path.exists(word)


def no_command(prog: str, word: str, commands: Sequence[str]) -> UserError:
    """The error of a first word that is no command of a program."""
    there = f"there {'are' if commands[1:] else 'is'} {listed(commands, 'and')}"
    near = difflib.get_close_matches(word, commands, n=1)
    return UserError(f"{prog} {word} is no command; {there}" + (f". Did you mean {near[0]}?" if near else ""))


def near_flags(name: str, names: Collection[str]) -> str:
    """``. Did you mean --optimizer.lr?`` after an unknown name; empty where nothing is near.

    Near are flags of the same last part (``lr``) or in that group (``optimizer``), else what is spelled much alike.
    """
    group, _, last = name.rpartition(".")
    lasts = {known: known.rpartition(".")[2] for known in names}
    near = [known for known in names if lasts[known] == last or known.startswith(f"{name}.")]
    if not near:
        inside = [known for known in names if group and known.startswith(f"{group}.")]
        spelled = [lasts[known] for known in inside] or [*names, *lasts.values()]
        for alike in difflib.get_close_matches(last if inside else name, spelled, n=1, cutoff=0.75):
            near = [alike] if alike in names else [known for known in inside or names if lasts[known] == alike]
    flags = [f"--{known.replace('_', '-')}" for known in near]
    return f". Did you mean {listed(flags, 'or')}?" if flags else ""


def closest_first(word: str, names: Iterable[str]) -> list[str]:
    """Names in the order of how much they are spelled like a word."""
    return sorted(names, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())


def listed(names: Sequence[str], last: str) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
