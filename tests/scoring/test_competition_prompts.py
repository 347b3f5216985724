"""Every prompt is OpenCompass's own, in both forms; demonstrations come from where they are published."""

import hashlib
import json
from pathlib import Path

import pytest

from common.errors import UserError
from data.chat import CHAT_TEMPLATE
from scoring.competition import GROUPS, TASKS
from scoring.competition import shots as shots_module
from scoring.competition.data import read_rows
from scoring.competition.prompts import base_prompt, chat_messages, prompt_of
from scoring.competition.shots import WHEEL, read_shots, wheel
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "competition_prompts.json").read_text(encoding="utf-8"))["tasks"]

OPENCOMPASS = {
    "commonsense_qa": "commonsense_qa",
    "gsm8k": "gsm8k",
    "chid": "chid-test",
    "humaneval": "openai_humaneval",
    "truthfulqa": "truthful_qa",
}
"""Our names to those of the tasks in OpenCompass."""


@pytest.fixture(scope="module")
def data(shared: Path) -> Path:
    """The published files, and OpenCompass's wheel in the cache."""
    try:
        wheel()
    except UserError:
        pytest.skip(f"needs a package index that has {WHEEL}")
    return shared / "datasets" / "eval"


def test_the_table_has_six_groups_and_the_published_numbers_of_rows() -> None:
    assert list(GROUPS) == ["commonsense_qa", "bbh", "gsm8k", "humaneval", "chid", "truthfulqa"]
    rows = {group: sum(TASKS[name].rows for name in names) for group, names in GROUPS.items()}
    assert list(rows.values()) == [1_221, 6_511, 1_319, 164, 2_002, 817]
    assert len(GROUPS["bbh"]) == 27
    assert {group: TASKS[names[0]].max_new_tokens for group, names in GROUPS.items()} == {
        **dict.fromkeys(["bbh", "gsm8k", "humaneval"], 512),
        **dict.fromkeys(["commonsense_qa", "chid", "truthfulqa"], None),
    }


@pytest.mark.parametrize("name", TASKS)
def test_the_first_prompt_is_the_published_one(data: Path, name: str) -> None:
    golden = json.loads((data / "prompts" / "opencompass-0.3.1.json").read_text(encoding="utf-8"))["tasks"]
    task = TASKS[name]
    entry = golden["bbh"]["rendered_example_0"] if task.group == "bbh" else golden[OPENCOMPASS[name]]
    prompt = base_prompt(task, read_rows(task, data)[0], read_shots(data))
    expected = entry[name.removeprefix("bbh_")] if task.group == "bbh" else entry["rendered_example_0"]
    assert expected == {"chars": len(prompt), "sha256": hashlib.sha256(prompt.encode()).hexdigest()}


@pytest.mark.parametrize("group", GROUPS)
def test_all_prompts_are_those_of_opencompass_in_both_forms(data: Path, group: str) -> None:
    for name in GROUPS[group]:
        task, shots, base, chat = TASKS[name], read_shots(data), hashlib.sha256(), hashlib.sha256()
        rows = read_rows(task, data)
        for row in rows:
            base.update(json.dumps(base_prompt(task, row, shots)).encode())
            chat.update(json.dumps(chat_messages(task, row, shots)).encode())
        assert GOLDEN[name] == {"rows": len(rows), "base": base.hexdigest(), "chat": chat.hexdigest()}


def test_bbh_has_the_same_demonstrations_in_the_wheel_and_in_its_own_files(data: Path) -> None:
    own, published = read_shots(data), read_shots(None)
    for name in GROUPS["bbh"]:
        subtask = name.removeprefix("bbh_")
        assert own.demonstrations(subtask) == published.demonstrations(subtask)


def test_a_chat_goes_through_the_models_template(data: Path, tokenizer) -> None:
    from transformers import AutoTokenizer

    models = AutoTokenizer.from_pretrained(tokenizer.folder)
    models.chat_template = CHAT_TEMPLATE

    def template(messages: list[dict[str, str]]) -> str:
        return models.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    task = TASKS["gsm8k"]
    row = read_rows(task, data)[0]
    messages = chat_messages(task, row, read_shots(data))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 4 + ["user"]
    # OpenCompass joins an empty system turn to every turn of the user.
    assert all(message["content"].endswith("Answer:\n") for message in messages if message["role"] == "user")
    text = prompt_of(task, row, read_shots(data), template)
    assert text.startswith(f"{models.bos_token}<|user|>Question: Angelo and Melanie want to plan")
    assert text.endswith(
        f"<|user|>Question: {row['question']}\nLet's think step by step\nAnswer:<|turn_end|><|assistant|>"
    )
    assert text.count("The answer is") == 4


def test_shots_in_the_folder_of_data_win(tmp_path: Path) -> None:
    turns = [{"role": "HUMAN", "content": "Q: 1?"}, {"role": "BOT", "content": "A: So the answer is A."}]
    (tmp_path / "shots.json").write_text(json.dumps({"commonsense_qa": turns}))
    row = {"question": "2?", **dict(zip("ABCDE", "vwxyz", strict=True)), "answer": "B"}
    prompt = base_prompt(TASKS["commonsense_qa"], row, read_shots(tmp_path))
    expected = "\nQ: 1?\nA: So the answer is A.\nQ:2?  Answer Choices: A. v\nB. w\nC. x\nD. y\nE. z\nA:"
    assert prompt == expected


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "[]",
        '{"gsm8k": [{"role": "user", "content": "Q"}]}',
        '{"gsm8k": [{"role": "system", "content": "Q"}, {"role": "assistant", "content": "A"}]}',
        '{"gsm8k": [{"role": "user", "content": ""}, {"role": "assistant", "content": "A"}]}',
    ],
)
def test_damaged_shots_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "shots.json").write_text(content)
    with pytest.raises(UserError, match="shots.json holds no demonstrations .* the user first"):
        read_shots(tmp_path).turns("gsm8k")


def test_a_wheel_that_cannot_be_had_or_is_damaged_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PALMTOP_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr(shots_module, "_read_wheel", shots_module._read_wheel.__wrapped__)  # not what was read before
    with pytest.raises(UserError, match=f"pip could not fetch .*Put {WHEEL} .* into {tmp_path / 'opencompass'}"):
        read_shots(None).turns("gsm8k")
    (tmp_path / "opencompass" / WHEEL).write_bytes(b"half")
    with pytest.raises(UserError, match=f"{WHEEL} is damaged: its sha256 is"):
        read_shots(None).demonstrations("snarks")
