"""The file of answers: what survives a kill, what is refused, and that nothing is lost by refusing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from scoring.answers import Answers
from scoring.batches import Batch
from scoring.requests import Request

REQUESTS = [Request("gsm8k", row, f"How many are {row}?", 8) for row in range(4)]
PLAN = [Batch("gsm8k", (3, 1), 0), Batch("gsm8k", (0, 2), 0)]
ASKED = {"model": "a1b2", "batch_size": 2}


def begun(path: Path, asked: dict = ASKED) -> Answers:
    answers = Answers(path, asked)
    assert answers.begin(REQUESTS, lambda: PLAN) == PLAN
    return answers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with the answers to the first batch."""
    path = tmp_path / "answers" / "competition.jsonl"
    with begun(path) as answers:
        for row in PLAN[0].rows:
            answers.keep(REQUESTS[row], f"{row}，\n\u2028 \ud83d")
    return path


def test_answers_are_there_again_with_their_plan(path: Path) -> None:
    with Answers(path, ASKED) as answers:
        assert answers.outputs == {("gsm8k", row): f"{row}，\n\u2028 \ud83d" for row in (3, 1)}
        assert answers.begin(REQUESTS[::-1], lambda: pytest.fail("it was planned before")) == PLAN


def test_the_lines_are_those_that_rescore_takes(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["task"], line["row"]) for line in lines] == [("gsm8k", 3), ("gsm8k", 1)]
    assert all(line.keys() == {"task", "row", "output"} for line in lines)


@given(st.data())
def test_wherever_a_kill_cuts_the_file_whole_answers_stay(tmp_path_factory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    with begun(path) as answers:
        for request in REQUESTS:
            answers.keep(request, f"answer {request.row}")
    content = path.read_bytes()
    length = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:length])
    with Answers(path, ASKED) as answers:
        kept = list(answers.outputs)
        assert len(kept) == content[:length].count(b"\n")
        for request in REQUESTS[len(kept) :]:
            answers.keep(request, f"answer {request.row}")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"\xff", b"", b'{"task": "gsm8k", "row": "1", "output": ""}', b'{"task": "gsm8k", "row": 2}'],
)
def test_other_damage_is_named_and_left(path: Path, line: bytes) -> None:
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, line, second, b""]))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"line 2 of .* is damaged.*Remove that line"):
        Answers(path, ASKED)
    assert path.read_bytes() == before


def test_two_answers_to_one_prompt_are_damage(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match=r"line 3 .* another answer to row 3 of gsm8k"):
        Answers(path, ASKED)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"asked": {}, "prompts": "", "plan": [{}]}'])
def test_a_damaged_plan_is_named(path: Path, content: str) -> None:
    path.with_suffix(".plan.json").write_text(content)
    with pytest.raises(UserError, match=r"competition\.plan\.json is damaged"):
        Answers(path, ASKED)


def test_answers_without_their_plan_are_refused(path: Path) -> None:
    path.with_suffix(".plan.json").unlink()
    with pytest.raises(UserError, match=r"has lost its competition\.plan\.json"):
        Answers(path, ASKED)


def test_answers_of_another_model_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"model 'a1b2', now 'c3d4'; chat None, now True"):
        Answers(path, ASKED | {"model": "c3d4", "chat": True})


@pytest.mark.parametrize("requests", [REQUESTS[:3], [*REQUESTS[:3], Request("gsm8k", 3, "How few?", 8)]])
def test_answers_to_other_prompts_are_refused(path: Path, requests: list[Request]) -> None:
    with Answers(path, ASKED) as answers, pytest.raises(UserError, match="other prompts"):
        answers.begin(requests, lambda: PLAN)


def test_one_process_at_a_time_writes(path: Path) -> None:
    with Answers(path, ASKED), pytest.raises(UserError, match="being written by another process"):
        Answers(path, ASKED)
    Answers(path, ASKED).close()
