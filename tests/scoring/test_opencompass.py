"""OpenCompass from outside: what it is given, how it is run, what is read back."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from scoring import sandbox
from scoring.opencompass import read_summary, running, score_with_opencompass
from scoring.opencompass.data_folder import lay_out
from scoring.opencompass.running import find_opencompass
from scoring.opencompass.summary import SUBTASKS
from tests.scoring.opencompass_reader import parsed

FAKE = Path(__file__).with_name("fake_opencompass.py")


@pytest.fixture
def python(tmp_path) -> str:
    """The stand-in as an interpreter."""
    script = tmp_path / "python-of-opencompass"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def data(tmp_path) -> Path:
    """Files of a row or two, in the layout in which they are published."""
    folder = tmp_path / "data"
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "entry_point": "one",
        "canonical_solution": "",
        "test": "",
    }
    problem["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    files = {
        "commonsenseqa/dev_rand_split.jsonl": "{}\n",
        "chid/test_public.json": "{}\n",
        "humaneval/HumanEval.jsonl": "".join(
            json.dumps(problem | {"task_id": f"HumanEval/{row}"}) + "\n" for row in range(3)
        ),
        "gsm8k/test.jsonl": "{}\n",
        **{f"bbh/bbh/{name}.json": '{"examples": []}' for name in SUBTASKS},
        "truthfulqa/TruthfulQA.csv": "\ufeffType,Question,Best Answer,Correct Answers,Incorrect Answers\n"
        'A,"What, then?",No,"No; Not so ; ",Yes\n',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def scores_of(model: Path, out: Path, python: str, data: Path, **more) -> tuple[dict[str, float], str]:
    said: list[str] = []
    found = score_with_opencompass(model, out, python, data, max_out_len=256, form="base", say=said.append, **more)
    return found, "\n".join(said)


def test_a_run_from_folder_to_scores(micro_model, tmp_path, python, data):
    found, said = scores_of(micro_model, tmp_path / "out", python, data)
    humaneval = found.pop("humaneval", None)
    assert found == {
        "commonsense_qa": 25.0,
        "bbh": 13.0,
        **{f"bbh_{name}": float(number) for number, name in enumerate(sorted(SUBTASKS))},
        "gsm8k": 12.5,
        "chid": 14.29,
        "truthfulqa": pytest.approx(28.34),
    }
    assert humaneval == (100.0 if sandbox.available() is None else None)
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 32 * 3
    assert {"task": "commonsense_qa", "row": 2, "output": "So the answer is A."} in answers
    assert {"task": "bbh_word_sorting", "row": 0, "output": "A"} in answers
    assert "judging" in said


def test_opencompass_judges_humaneval_only_where_that_is_asked_for(micro_model, tmp_path, python, data):
    found, _ = scores_of(micro_model, tmp_path / "out", python, data, unsafe=True)
    assert found["humaneval"] == 99.0


def test_a_second_call_asks_nothing_again_and_another_model_all(micro_model, tmp_path, python, data):
    model, out = shutil.copytree(micro_model, tmp_path / "model"), tmp_path / "out"
    first, _ = scores_of(model, out, python, data)
    again, _ = scores_of(model, out, python, data)
    assert again == first
    assert len((out / "answered.txt").read_text().split()) == 32
    later = time.time() + 10
    os.utime(model / "model.safetensors", (later, later))
    scores_of(model, out, python, data)
    assert len((out / "answered.txt").read_text().split()) == 64


def test_what_failed_is_told_and_asked_again(micro_model, tmp_path, python, data, monkeypatch):
    monkeypatch.setenv("FAKE_OPENCOMPASS", "fail=truthful_qa")
    found, said = scores_of(micro_model, tmp_path / "out", python, data)
    assert "truthfulqa" not in found
    assert found["gsm8k"] == 12.5
    assert "OpenCompass made no predictions for truthful_qa; the end of" in said
    assert "OSError: no hub" in said
    monkeypatch.setenv("FAKE_OPENCOMPASS", "error=gsm8k")
    found, _ = scores_of(micro_model, tmp_path / "out", python, data)
    assert found["truthfulqa"] == pytest.approx(28.34)
    monkeypatch.delenv("FAKE_OPENCOMPASS")


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("crash", "OpenCompass failed; the end of .*\n(.*\n)*RuntimeError: no such thing"),
        ("silent", "OpenCompass made no predictions"),
        ("version=0.4.2", "has OpenCompass 0.4.2, and the competition's is 0.3.1; make an environment"),
    ],
)
def test_trouble_is_one_message(micro_model, tmp_path, python, data, monkeypatch, trouble, message):
    monkeypatch.setenv("FAKE_OPENCOMPASS", trouble)
    with pytest.raises(UserError, match=message):
        scores_of(micro_model, tmp_path / "out", python, data)


def test_an_interrupt_ends_opencompass_too(micro_model, tmp_path, python, data, monkeypatch):
    monkeypatch.setenv("FAKE_OPENCOMPASS", "hang")
    monkeypatch.setattr(running, "PAUSE", 0.05)

    def say(text: str) -> None:
        if "answered" in text:
            while not (tmp_path / "out" / "pid").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_with_opencompass(micro_model, tmp_path / "out", python, data, max_out_len=256, form="base", say=say)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "out" / "pid").read_text()), 0)


def test_an_interpreter_without_opencompass(tmp_path):
    with pytest.raises(UserError, match=r"has no OpenCompass that works \(.*No package metadata.*python3.10 -m venv"):
        find_opencompass(sys.executable)
    with pytest.raises(UserError, match="is no Python interpreter"):
        find_opencompass(str(tmp_path / "python"))


def test_data_in_opencompass_own_layout_and_missing_data(data, tmp_path):
    truthfulqa = lay_out(data, tmp_path / "first")
    row = json.loads(truthfulqa.read_text())
    assert row == {
        "question": "What, then?",
        "best_answer": "No",
        "correct_answers": ["No", "Not so"],
        "incorrect_answers": ["Yes"],
    }
    own = tmp_path / "first" / "data"
    assert (own / "gsm8k" / "train.jsonl").read_text() == (own / "gsm8k" / "test.jsonl").read_text()
    shutil.copy(data / "truthfulqa" / "TruthfulQA.csv", own)
    lay_out(own, tmp_path / "second")
    files = [
        sorted(str(file.relative_to(one)) for file in one.rglob("*.json*")) for one in (own, tmp_path / "second/data")
    ]
    assert files[0] == files[1]
    (data / "chid" / "test_public.json").unlink()
    with pytest.raises(UserError, match="has no FewCLUE/chid/test_public.json and no chid/test_public.json"):
        lay_out(data, tmp_path / "third")


def test_real_data_unpacked(shared, tmp_path):
    truthfulqa = lay_out(shared / "datasets" / "eval", tmp_path / "out")
    lines = {
        file: len((tmp_path / "out" / "data" / file).read_text(encoding="utf-8").splitlines())
        for file in ("commonsenseqa/train_rand_split.jsonl", "humaneval/human-eval-v2-20210705.jsonl")
    }
    assert lines == {"commonsenseqa/train_rand_split.jsonl": 9741, "humaneval/human-eval-v2-20210705.jsonl": 164}
    assert len(truthfulqa.read_text(encoding="utf-8").splitlines()) == 817
    assert len(list((tmp_path / "out" / "data" / "BBH" / "data").glob("*.json"))) == 27


def test_a_published_summary(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text(
        "dataset,version,metric,mode,nGPT_hf\n"
        "commonsense_qa,5545e2,accuracy,gen,8.93\nbbh,-,naive_average,gen,16.80\nbbh-snarks,6b4d1f,accuracy,gen,52.81\n"
        "openai_humaneval,8e312c,humaneval_pass@1,gen,0.00\nchid-dev,211ee7,accuracy,gen,3.47\nlambada,-,-,-,-\n"
        "truthful_qa,5ddc62,bleu_max,gen,0.06\ntruthful_qa,5ddc62,bleu_acc,gen,0.15\ngsm8k,-,-,-,-\n"
    )
    assert read_summary(path) == {
        "commonsense_qa": 8.93,
        "bbh": 16.8,
        "bbh_snarks": 52.81,
        "humaneval": 0.0,
        "truthfulqa": 15.0,
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "task,score\ngsm8k,1\n",
        "dataset,version,metric,mode,a,b\n",
        "dataset,version,metric,mode,a\ngsm8k,x,y,z,ten\n",
    ],
)
def test_no_summary(tmp_path, text):
    (tmp_path / "summary.csv").write_text(text)
    with pytest.raises(UserError, match=r"summary.csv"):
        read_summary(tmp_path / "summary.csv")


def test_this_machines_variant_read_by_opencompass_own_reader(micro_model, tmp_path, python, data):
    scores_of(micro_model, tmp_path / "out", python, data)
    to_answer, to_judge = (parsed(tmp_path / "out" / name)["datasets"] for name in ("to_answer.py", "to_judge.py"))
    assert len(to_answer) == len(to_judge) + 1
    assert "openai_humaneval" not in {dataset["abbr"] for dataset in to_judge}
    assert to_judge[-1]["path"] == "json"
    assert (tmp_path / "out" / to_judge[-1]["data_files"]["validation"]).exists()
