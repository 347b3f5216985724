"""What an engine is asked: a prompt of a task's row, and when its answer is long enough. Imports nothing heavy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Key = tuple[str, int]
"""Task and row, which name a request within a run."""


def never(text: str) -> bool:
    """No early stop: an answer ends at an end token or at its longest."""
    return False


@dataclass(frozen=True)
class Request:
    """One prompt to answer."""

    task: str
    row: int
    """Of the task's data, in file order from 0."""
    prompt: str
    """As the tokenizer gets it: a base prompt, or the rendered chat template."""
    max_new_tokens: int
    finished: Callable[[str], bool] = never
    """Whether what was written so far decides the score already, so that the rest need not be written."""

    @property
    def key(self) -> Key:
        """What names it within a run."""
        return self.task, self.row


Keep = Callable[[Request, str], None]
"""Takes an answer as soon as it is whole; answers come in the engine's order."""


class Engine(Protocol):
    """What answers requests: :class:`scoring.generation.Generator`, or vLLM."""

    def generate(self, requests: Sequence[Request], keep: Keep) -> None:
        """Answer every request, handing each answer to ``keep`` once."""
