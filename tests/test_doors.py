"""The words of every command, as they are typed."""

import runpy
import sys
from pathlib import Path

import pytest

from common import signals


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command that is refused, in an empty folder; returns its one message."""
    monkeypatch.chdir(tmp_path)

    def run(package: str, words: str) -> str:
        monkeypatch.setattr(sys, "argv", [package, *words.split()])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(package, run_name="__main__")
        signals.clear()
        error = capsys.readouterr().err
        assert ended.value.code == 2, error
        assert error.count("\n") == 1, error
        return error.removeprefix("error: ").strip()

    return run


@pytest.mark.parametrize(
    "command",
    [
        "train consolidate --out D NOWHERE",
        "sft --data sample NOWHERE",
        "sft chat --seed 3 NOWHERE",
        "scoring --suite sample NOWHERE",
        "scoring rescore --suite sample NOWHERE",
        "pruning --params 0.8 --plan NOWHERE",
        "pruning import --out D NOWHERE",
        "export --parity skip NOWHERE",
        "export bench --threads 2,4 NOWHERE",
        "export phone --threads 2 NOWHERE",
        "submit report --out F NOWHERE",
        "submit leaderboard --out F NOWHERE",
        "submit bundle --verify false NOWHERE",
        "pipeline --plan NOWHERE",
    ],
)
def test_what_a_command_works_on_is_typed_behind_its_flags_too(refused, command: str) -> None:
    package, _, words = command.partition(" ")
    message = refused(package, words)
    assert "NOWHERE" in message
    assert "word too many" not in message
    assert "no command" not in message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train consolodate R", "train.py consolodate is no command; there is consolidate. Did you mean consolidate?"),
        ("sft chta M", "sft chta is no command; there are chat and formats. Did you mean chat?"),
        ("scoring prompt", "scoring prompt is no command; there are prompts and rescore. Did you mean prompts?"),
        ("pruning imprt Q", "pruning imprt is no command; there is import. Did you mean import?"),
        ("export bnech X", "export bnech is no command; there are bench and phone. Did you mean bench?"),
        (
            "submit reprot",
            "submit reprot is no command; there are report, leaderboard and bundle. Did you mean report?",
        ),
        ("data tokeniser", "data tokeniser is no command; there are tokenizer and prepare. Did you mean tokenizer?"),
    ],
)
def test_a_mistyped_command_is_told_the_commands(refused, command: str, message: str) -> None:
    package, _, words = command.partition(" ")
    assert message in refused(package, words)
