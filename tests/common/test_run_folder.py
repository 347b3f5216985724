"""What a run says of itself."""

import sys

import pytest

from common.run_folder import command


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["/a/train.py", "--size", "1b"], "python train.py --size 1b"),
        (["/a/sft/__main__.py", "runs/a b/model"], "python -m sft 'runs/a b/model'"),
        (["/a/sft/__main__.py", "--eval.prompts", '["Who?"]'], """python -m sft --eval.prompts '["Who?"]'"""),
    ],
)
def test_a_command_can_be_typed_again(words: list[str], typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", words)
    assert command() == typed
