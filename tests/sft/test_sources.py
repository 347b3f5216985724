"""Rows of every shape that occurs in the wild."""

import gzip
import json
import random
from pathlib import Path

import pytest

from common.errors import UserError
from data.chat import Conversation
from data.settings import Mix
from sft.sources import HELD_OUT, conversation_of, is_held_out, open_sources
from tests.conftest import ROOT, run_command
from tests.data.fake_hub import FakeHub
from tests.sft.conftest import ROWS, conversation, write_rows


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "问", "input": "", "output": "答"},
        {"instruction": " 问\n", "input": "  ", "output": "答 "},
        {"instruction": "问", "output": "答"},
        {"instruction": "问", "input": None, "output": "答"},
        {"instruction": "问", "input": "<noinput>", "output": "答"},
        {"instruction": "问", "input": "No Input.", "output": "答"},
        {"instruction": "问", "input": "不适用", "output": "答", "score": 5},
        {"instruction": "问", "input": "“”", "output": "答"},
        {"zh_instruction": "问", "zh_input": "", "zh_output": "答", "instruction": "ask", "output": "answer"},
        {"instruction_zh": "问", "input_zh": "", "output_zh": "答", "instruction": "a", "input": "b", "output": "c"},
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"},
                      {"role": "user", "content": "and then?"}]},
    ],
)  # fmt: skip
def test_rows_become_conversations(row: dict) -> None:
    assert conversation_of(row) == conversation("问", "答")


def test_the_input_goes_under_the_instruction() -> None:
    row = {"instruction": "Sort these.", "input": "b, a", "output": "a, b"}
    assert conversation_of(row) == conversation("Sort these.\n\nb, a", "a, b")


def test_marks_may_be_an_input() -> None:
    """Alpaca has a Morse code and a row of stars."""
    for given in ("+", "★★★★★", "... --- ... / -.-", "*\n**\n***", "n/a or not?"):
        row = {"instruction": "Explain.", "input": given, "output": "So."}
        assert conversation_of(row) == conversation(f"Explain.\n\n{given}", "So.")


def test_a_chat_keeps_its_turns() -> None:
    turns = [("system", "Be brief."), ("user", "1?"), ("assistant", "1."), ("user", "2?"), ("assistant", "2.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert conversation_of(row) == Conversation(tuple(turns))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "ask", "input": "", "output": "  "}, "empty answer"),
        ({"instruction": "", "input": "", "output": "answer"}, "empty question"),
        ({"instruction": "ask", "output": None}, "no conversation"),
        ({"text": "prose"}, "no conversation"),
        ("prose", "no conversation"),
        ({"messages": [{"role": "user", "content": "ask"}]}, "empty answer"),
        ({"messages": [{"role": "assistant", "content": "answer"}]}, "empty question"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]}, "empty question"),
        ({"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": " "}]}, "empty answer"),
        ({"messages": [{"role": "tool", "content": "ask"}]}, "no conversation"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "no conversation"),
        ({"messages": "ask"}, "no conversation"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "hi"},
                    {"role": "user", "content": "ask"},
                    {"role": "assistant", "content": "answer"},
                ]
            },
            "empty question",
        ),
        ({"instruction": "ask \ud83d", "input": "", "output": "answer"}, "broken characters"),
        (
            {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "\udc00"}]},
            "broken characters",
        ),
    ],
)
def test_what_cannot_be_learned_from_says_why(row: object, reason: str) -> None:
    assert conversation_of(row) == reason


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("lines", [False, True], ids=["json", "jsonl"])
def test_files_of_either_form_are_read(tmp_path: Path, packed: bool, lines: bool) -> None:
    text = "\n".join(map(json.dumps, ROWS)) + "\n" if lines else json.dumps(ROWS, indent=1)
    path = tmp_path / "any name"
    path.write_bytes(gzip.compress(text.encode()) if packed else b"\xef\xbb\xbf" + text.encode())
    (source,) = open_sources(Mix.parse(str(path)))
    assert {one.turns[0][1] for one in source.train + source.held_out} == {
        "Name a colour.", "Write it in capitals.\n\nwater", "说出一种水果。", "翻译成英文。\n\n谢谢",
    }  # fmt: skip


def test_a_line_of_json_may_hold_other_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "one\u2028two\x85three", "output": "yes", "derived_from": ["tatsu-lab/alpaca"]}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (source,) = open_sources(Mix.parse(str(path)))
    assert (source.train + source.held_out)[0].turns[0][1] == "one\u2028two\x85three"
    assert source.origin == f"{path} (made of tatsu-lab/alpaca)"
    with pytest.raises(UserError, match="is a folder; give a JSON"):
        open_sources(Mix.parse(str(tmp_path)))


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [*ROWS, ROWS[0], {"instruction": "ask", "input": "", "output": ""}, {"text": "prose"}]
    first, second = (
        write_rows(tmp_path / "a.json", rows),
        write_rows(tmp_path / "b.json", [*ROWS[:2], ROWS[0] | {"output": "Blue."}]),
    )
    one, other = open_sources(Mix.parse(f"{first}=3,{second}=1"))
    assert one.dropped == {"duplicate": 1, "empty answer": 1, "no conversation": 1}
    assert other.dropped == {"duplicate": 2}  # copies count across sources; another answer is no copy
    assert (one.weight, other.weight) == (0.75, 0.25)


def test_what_is_held_out_does_not_depend_on_the_mix(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"instruction": f"Question {n}?", "input": "", "output": str(rng.random())} for n in range(5000)]
    alone = open_sources(Mix.parse(str(write_rows(tmp_path / "a.json", rows))))[0]
    rng.shuffle(rows)
    mixed = open_sources(
        Mix.parse(f"{write_rows(tmp_path / 'b.json', rows[:3000])}=1,{write_rows(tmp_path / 'c.json', rows[3000:])}=5")
    )
    held = {one for source in mixed for one in source.held_out}
    assert held == set(alone.held_out)
    assert len(held) == pytest.approx(5000 / HELD_OUT, rel=0.3)
    assert not held & {one for source in mixed for one in source.train}
    assert is_held_out(conversation(alone.held_out[0].turns[0][1], "another answer"))


def test_the_sample_has_both_languages_and_something_to_hold_out() -> None:
    from data.tokenizer import is_chinese

    (source,) = open_sources(Mix.parse("sample"))
    assert not source.dropped
    everything = source.train + source.held_out
    assert len(everything) == 150
    assert sum(is_chinese(one.text) for one in everything) == pytest.approx(75, abs=3)
    assert {is_chinese(one.text) for one in source.held_out} == {True, False}
    assert sum("\n\n" in one.turns[0][1] for one in everything) > 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no valid JSON"),
        ('{"instruction": 1}\n{', "line 2 of .* is no valid JSON"),
        ("[]", "holds nothing to train on: it is empty"),
        ('[{"text": "prose"}]', "holds nothing to train on: 1 no conversation.*fields are text"),
        (b"\x1f\x8b\x08", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_sources(Mix.parse(str(path)))


def test_a_source_that_is_not_there_says_what_there_is() -> None:
    with pytest.raises(UserError, match=r"alpacca is no file, and none of alpaca, alpaca_zh, sample"):
        open_sources(Mix.parse("alpacca"))


def test_both_alpacas_come_from_the_hub(tmp_path: Path) -> None:
    """As they lie there: one as parquet, the other as JSON lines with both languages in a row."""
    import pandas

    english = [{**row, "text": "Below is an instruction"} for row in ROWS[:2]]
    pandas.DataFrame(english).to_parquet(tmp_path / "alpaca.parquet")
    chinese = [{"instruction_zh": row["instruction"], "instruction": "x", "input_zh": row["input"], "input": "y",
                "output_zh": row["output"], "output": "z"} for row in ROWS[2:]]  # fmt: skip
    repos = {
        "tatsu-lab/alpaca": {"data/train-00000-of-00001.parquet": (tmp_path / "alpaca.parquet").read_bytes()},
        "silk-road/alpaca-data-gpt4-chinese": {
            "Alpaca_data_gpt4_zh.jsonl": "\n".join(map(json.dumps, chinese)).encode()
        },
    }
    program = """
from data.settings import Mix
from sft.sources import open_sources
for source in open_sources(Mix.parse("alpaca=1,alpaca_zh=1")):
    print(source.origin, sorted(turn[1] for one in source.train + source.held_out for turn in one.turns))
"""
    with FakeHub(repos) as hub:
        done = run_command("-c", program, environment=hub.environment(tmp_path), folder=ROOT)
        assert done.stdout.splitlines() == [
            "tatsu-lab/alpaca ['Name a colour.', 'Red.', 'WATER', 'Write it in capitals.\\n\\nwater']",
            "silk-road/alpaca-data-gpt4-chinese ['Thank you.', '翻译成英文。\\n\\n谢谢', '苹果。', '说出一种水果。']",
        ], done.stderr
        hub.repos.clear()
        done = run_command("-c", program, environment=hub.environment(tmp_path / "other"), folder=ROOT)
    assert "UserError: tatsu-lab/alpaca cannot be had from the hub: " in done.stderr
    assert "--data alpaca_data.json.gz=1" in done.stderr


def test_the_real_alpacas_are_read(shared: Path) -> None:
    folder = shared / "datasets"
    mix = f"{folder}/alpaca/alpaca_data.json.gz=1,{folder}/alpaca_zh/alpaca_chinese_52k_v3.json.gz=1"
    english, chinese = open_sources(Mix.parse(mix))
    assert len(english.train) + len(english.held_out) == 52_002 - 28
    assert english.dropped == {"empty answer": 28}
    assert len(chinese.train) + len(chinese.held_out) == 52_002 - 51
    assert chinese.dropped == {"empty answer": 50, "duplicate": 1}
