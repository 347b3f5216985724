"""Random models that MLC-LLM could take, with a tokenizer, and the command that exports them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from export import __main__ as door
from tests.conftest import Command
from tests.models.test_foreign import write_folder

KINDS = ("llama", "qwen2", "qwen3", "phi")

Folder = Callable[..., Path]


@pytest.fixture
def exporting(run_here: Command) -> Command:
    """The command in this process."""
    return partial(run_here, door.main)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Folder:
    """Writes a model folder: ``folder("llama", hidden_size=64)``."""

    def write(kind: str, name: str = "", **changes: object) -> Path:
        path = tmp_path / (name or kind)
        write_folder(kind, path, **({"vocab_size": tokenizer.vocab_size, "attention_bias": False} | changes))
        tokenizer.copy_to(path)
        return path

    return write
