"""What a runner is told and what it answers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scoring.sandbox.bubblewrap import Interpreter


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    """It ran to its end, tests included."""
    reason: str
    """Why it did not, else "passed". Parts of it may be the program's own words."""
    seconds: float
    """Wall clock, from the program's own start."""


@dataclass(frozen=True)
class Settings:
    """What a runner is started with."""

    interpreter: Interpreter
    binary: str | None
    """The bubblewrap to use; None runs programs bare."""
    timeout: float
    """Seconds."""
    groups: Sequence[str] = ()
    """``cgroup.procs`` files of the groups to enter, and boxes with it."""

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Settings":
        """From JSON."""
        values = json.loads(text)
        return cls(**values | {"interpreter": Interpreter(**values["interpreter"])})
