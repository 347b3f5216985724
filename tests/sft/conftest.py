"""A model that can be fine-tuned in seconds, and conversations for it."""

import json
from pathlib import Path

import pytest

from data.chat import Conversation
from data.tokenizer import Tokenizer
from sft.rendering import Renderer

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Write it in capitals.", "input": "water", "output": "WATER"},
    {"instruction": "说出一种水果。", "input": "", "output": "苹果。"},
    {"instruction": "翻译成英文。", "input": "谢谢", "output": "Thank you."},
]
"""English and Chinese, with an input and without."""


def conversation(question: str, answer: str) -> Conversation:
    return Conversation((("user", question), ("assistant", answer)))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def chat_model(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of two thin layers that has room for a conversation."""
    from models.hf import write_model
    from models.sizes import ModelConfig
    from models.transformer import Transformer

    config = ModelConfig(2, 32, 2, 1, 16, 64, tokenizer.vocab_size, 256, tied=True, qk_norm=True)
    folder = tmp_path_factory.mktemp("chat")
    ids = {"bos": tokenizer.begin, "eos": tokenizer.end, "pad": tokenizer.pad}
    write_model(Transformer(config, seed=0).state_dict(), config, folder, **ids)
    tokenizer.copy_to(folder)
    return folder


@pytest.fixture(scope="session")
def renderer(chat_model: Path) -> Renderer:
    return Renderer(chat_model)
