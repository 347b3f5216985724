"""What a run says of itself."""

import json
import sys
from pathlib import Path

import pytest

from common.run_folder import RunFolder, command


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


def test_a_line_that_was_cut_in_the_middle_of_a_character_is_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    whole = json.dumps({"step": 1, "text": "水"}, ensure_ascii=False) + "\n"
    run.samples.write_bytes((whole + whole).encode()[:-4])
    run.rewind(1)
    assert run.samples.read_text(encoding="utf-8") == whole
