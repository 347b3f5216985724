"""What ``python -m sft chat`` can be told. Imports nothing heavy: ``--help`` reads this module."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ChatSettings:
    """Which model to talk to, and how it answers."""

    model: str
    """A model folder with a chat template in its tokenizer: ours after fine-tuning, or any other of transformers."""
    system: str | None = None
    """The system turn, which stands before the conversation."""
    temperature: float = 0.7
    """How freely words are chosen; 0: always the likeliest."""
    top_p: float = 0.9
    """Choose among the likeliest tokens that together have this probability."""
    max_tokens: int = 512
    """The longest answer, in tokens; half of the model's context where that is less."""
    seed: int | None = None
    """Makes the choice of words repeatable."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs. auto: on the GPU if there is one."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature must be at least 0 (0 takes the likeliest token), not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be above 0 and at most 1 (1 leaves nothing out), not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2^63, not {self.seed}")
