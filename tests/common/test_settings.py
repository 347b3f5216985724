from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from common.errors import UserError
from common.settings import MAY_CHANGE, Count, differences, option, parse, to_dict, to_yaml


@dataclass
class Inner:
    """A group."""

    rate: float | None = None
    """Speed."""
    depth: int = field(default=3, metadata=MAY_CHANGE)
    """Levels."""


@dataclass
class Outer:
    """A command."""

    name: str = "a"
    """What it is called."""
    seq_len: Count = option(Count(64))
    """Tokens in a row."""
    tokens: Count | None = None
    """Budget."""
    strict: bool = False
    """Insist."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile."""
    inner: Inner = field(default_factory=Inner)
    """Inner things."""


def read(*words: str) -> Outer:
    return parse(Outer, words, prog="x", description="Does x.")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e9", 2_000_000_000),
        ("500M", 500_000_000),
        ("1.5B", 1_500_000_000),
        ("64k", 64_000),
        ("2.01M", 2_010_000),
        ("1.07B", 1_070_000_000),
        ("1_000", 1000),
        ("0", 0),
    ],
)
def test_counts_are_read_as_people_write_them(text: str, value: int) -> None:
    assert Count.parse(text) == value


@pytest.mark.parametrize("text", ["2.5", "-1", "many", "1e-3", "3X", ""])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="count|whole"):
        Count.parse(text)


def test_flags_are_spelled_with_dashes_or_underscores_and_bare_switches_mean_yes() -> None:
    settings = read("--seq-len", "1k", "--strict", "--compile", "--inner.rate", "1e-3")
    assert settings == Outer(seq_len=Count(1000), strict=True, compile="on", inner=Inner(rate=1e-3))
    assert read("--seq_len=2k", "--strict", "false").seq_len == 2000


def test_yaml_goes_out_and_comes_back(tmp_path) -> None:
    settings = Outer(name="b", tokens=Count(5), inner=Inner(depth=9))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(settings))
    assert read("--config", str(file)) == settings
    assert read("--config", str(file), "--name", "c").name == "c"
    assert yaml.safe_load(to_yaml(settings)) == to_dict(settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seqlen", "3"], "--seq-len"),
        (["--tokens", "2.5"], "--tokens: .*whole number"),
        (["--compile", "maybe"], "--compile"),
        (["--config", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_flags_give_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(*words)
    assert "\n" not in str(caught.value)


def test_differences_leave_out_what_may_change() -> None:
    stored = to_dict(Outer())
    assert differences(Outer(inner=Inner(depth=8)), stored) == []
    assert differences(Outer(name="b", inner=Inner(rate=2.0)), stored) == [
        ("name", "a", "b"),
        ("inner.rate", None, 2.0),
    ]


def test_a_field_that_came_later_had_its_default() -> None:
    @dataclass
    class Later(Inner):
        layout: str = "packed"
        """Came later."""

    stored = to_dict(Outer())
    assert differences(Outer(inner=Later()), stored) == []
    assert differences(Outer(inner=Later(layout="padded")), stored) == [("inner.layout", "packed", "padded")]
