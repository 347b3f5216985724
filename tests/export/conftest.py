"""Random models that MLC-LLM could take, with a tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests.models.test_foreign import write_folder

KINDS = ("llama", "qwen2", "qwen3", "phi")

Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Folder:
    """Writes a model folder: ``folder("llama", hidden_size=64)``."""

    def write(kind: str, name: str = "", **changes: object) -> Path:
        path = tmp_path / (name or kind)
        write_folder(kind, path, **({"vocab_size": tokenizer.vocab_size, "attention_bias": False} | changes))
        tokenizer.copy_to(path)
        return path

    return write
