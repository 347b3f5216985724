"""Random models that MLC-LLM could take, with a tokenizer, and the command that exports them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from export import __main__ as door
from tests.models.test_foreign import write_folder

KINDS = ("llama", "qwen2", "qwen3", "phi")

Folder = Callable[..., Path]


def exporting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str | Path
) -> tuple[int, str, str]:
    """The command in this process: how it ended, what it printed, and its error."""
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    code = 0
    try:
        door.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Folder:
    """Writes a model folder: ``folder("llama", hidden_size=64)``."""

    def write(kind: str, name: str = "", **changes: object) -> Path:
        path = tmp_path / (name or kind)
        write_folder(kind, path, **({"vocab_size": tokenizer.vocab_size, "attention_bias": False} | changes))
        tokenizer.copy_to(path)
        return path

    return write
