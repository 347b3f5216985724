"""Words that stand alone, lists, and what is said of words that are not understood."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from common.errors import UserError
from common.settings import Count, option, parse
from common.words import listed, no_command


@dataclass
class Rates:
    """A group."""

    lr: float | None = None
    """Speed."""
    every: Count = option(Count(5))
    """Steps."""


@dataclass
class Tool:
    """A command with a place for a model, and one for changes."""

    model: str | None = None
    """What it works on."""
    changes: list[str] = option([])
    """What else."""
    plan: bool = False
    """Plan only."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights."""
    threads: list[int] = option([1, 2])
    """Numbers of threads."""
    vocab: Count | Literal["auto", "keep"] = "auto"
    """Tokens."""
    max_tokens: int = 5
    """Of an answer."""
    optimizer: Rates = field(default_factory=Rates)
    """Optimiser."""
    log: Rates = field(default_factory=Rates)
    """Log."""


def read(*words: str, positional: str = "model", commands: tuple[str, ...] = ()) -> Tool:
    return parse(Tool, words, prog="tool", description="", positional=positional, commands=commands)


@pytest.mark.parametrize(
    "words",
    [
        "M --plan --threads 2",
        "--plan M --threads 2",
        "--threads 2 --plan M",
        "--threads=2 --plan true M",
        "--plan TRUE --threads 2 --model M",
    ],
)
def test_a_word_that_no_flag_takes_stands_anywhere(words: str) -> None:
    assert read(*words.split()) == Tool(model="M", plan=True, threads=[2])


def test_a_bare_switch_takes_only_what_is_a_value_of_it() -> None:
    assert read("--compile", "M") == Tool(model="M", compile="on")
    assert read("--compile", "auto", "M") == Tool(model="M", compile="auto")
    assert read("--plan", "no", "M") == Tool(model="M")
    with pytest.raises(UserError, match="--plan: 'maybe' is neither true nor false"):
        read("M", "--plan", "maybe")


def test_the_last_place_takes_all_words() -> None:
    words = ["--plan", "M", "a=1", "--threads", "3", "b=2"]
    assert read(*words, positional="model changes") == Tool(model="M", changes=["a=1", "b=2"], plan=True, threads=[3])
    assert read("--model", "M", "a=1", positional="model changes") == Tool(model="M", changes=["a=1"])
    assert read("--changes+", "c", positional="model changes").changes == ["c"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["M", "N"], "'N' is one word too many; the command is tool MODEL [options]"),
        (["--model", "M", "N"], "'N' is one word too many; the command is tool MODEL [options]"),
        (["--max-tokens"], "--max-tokens needs a value"),
        (["--max-tokens", "--plan"], "--max-tokens needs a value"),
        (["--max-tokens", "-x"], "--max-tokens needs a value"),
        (["--lr", "1e-3"], "there is no flag --lr. Did you mean --optimizer.lr or --log.lr?"),
        (["--optimizer", "adamw"], "there is no flag --optimizer. Did you mean --optimizer.lr or --optimizer.every?"),
        (["--optimizer.evry", "3"], "there is no flag --optimizer.evry. Did you mean --optimizer.every?"),
        (["--optimizer.foo", "3"], "there is no flag --optimizer.foo; --help lists them"),
        (["--max-tokenss", "3"], "there is no flag --max-tokenss. Did you mean --max-tokens?"),
        (["--max_tokenss=3"], "there is no flag --max_tokenss. Did you mean --max-tokens?"),
        (["--gpu", "h100"], "there is no flag --gpu; --help lists them"),
        (["-plan"], "there is no flag -plan. Did you mean --plan?"),
        (["--dtype", "fp16"], "--dtype: 'fp16' is not one of float16, bfloat16, float32"),
        (["--optimizer.lr", "1e-3x"], "--optimizer.lr: '1e-3x' is not a number"),
        (["--max-tokens", "many"], "--max-tokens: 'many' is not a whole number"),
        (["--threads", "2,x"], "--threads: 'x' is not a whole number"),
        (["--changes", "[5]"], "--changes: '5' is not text; put it in quotes"),
        (
            ["--vocab", "few"],
            "--vocab: 'few' is not a count; write it like 131072, 2e9, 500M or 1.5B, or one of keep, auto",
        ),
        (["--log.every", "x"], "--log.every: 'x' is not a count; write it like 131072, 2e9, 500M or 1.5B"),
    ],
)
def test_what_is_not_understood_is_named_as_it_was_typed(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(*words)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {lrr: 1}", "the file of settings has optimizer.lrr, which is no setting here. Did you mean"),
        ("optimizer: 3", "optimizer is a group of settings, not 3"),
        ("log: {every: 2.5}", "--log.every: 2.5 is not a whole number"),
        ("vocab: 2.5", "--vocab: '2.5' is not a whole number, or one of auto, keep"),
    ],
)
def test_a_file_of_settings_is_told_what_is_wrong_with_it(text: str, message: str, tmp_path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read("--config", str(tmp_path / "file.yaml"))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["2,4", "2, 4", "[2,4]", "[2, 4]"])
def test_numbers_of_a_list_are_typed_with_commas(text: str) -> None:
    assert read("--threads", text).threads == [2, 4]


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("Hello, you", ["Hello, you"]),
        ('["a", "b"]', ["a", "b"]),
        ("[INST] hello", ["[INST] hello"]),
        ("- a: b", ["- a: b"]),
        ("5", ["5"]),
    ],
)
def test_a_text_is_a_list_of_one(text: str, texts: list[str]) -> None:
    assert read("--changes", text).changes == texts


def test_a_mistyped_command_is_told_the_commands(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = ("bench", "phone")
    with pytest.raises(UserError) as caught:
        read("bnech", "X", "--threads", "2", commands=commands)
    assert str(caught.value) == "tool bnech is no command; there are bench and phone. Did you mean bench?"
    assert read("phi-2", commands=commands).model == "phi-2"
    (tmp_path / "bnech").mkdir()
    assert read("bnech", commands=commands).model == "bnech"
    with pytest.raises(UserError, match="tool phi-2 is no command; there is bench$"):
        read("phi-2", positional="", commands=("bench",))
    assert str(no_command("tool", "x", ("a", "b", "c"))) == "tool x is no command; there are a, b and c"
    assert listed(["a"], "or") == "a"


def test_help_shows_the_places_and_no_leftovers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("M", "--help", positional="model changes")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tool MODEL [CHANGES ...] [options]\n")
    assert "(default: float32)" in shown
    for leftover in ("default: )", "null", "type:", "required", "default: []", "configuration file"):
        assert leftover not in shown, leftover
