"""OpenCompass from outside: what it is given, how it is run, what is read back."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import cache_folder, new_folder
from scoring import sandbox
from scoring.opencompass import Submission, read_summary, running, score_with_opencompass, write_submission
from scoring.opencompass.data_folder import lay_out
from scoring.opencompass.running import find_opencompass
from scoring.opencompass.submission import CONFIG, WRAPPER
from scoring.opencompass.summary import DATASETS, SUBTASKS

PARSER = ["opencompass==0.3.1", "mmengine-lite==0.10.7", "addict==2.4.0", "yapf==0.43.0", "termcolor", "platformdirs"]
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


def test_a_chat_score_needs_a_template(micro_model, tmp_path):
    model = shutil.copytree(micro_model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    Submission(model, "base", 256)
    with pytest.raises(UserError, match="no chat template"):
        Submission(model, "chat", 256)


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


def parser_packages() -> Path:
    """OpenCompass's wheel and what reads its configurations, from the package index; without the rest of its needs."""
    folder = cache_folder() / "opencompass-parser"
    if not folder.exists():
        with new_folder(folder) as temporary:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(temporary)]
            subprocess.run([*pip, *PARSER, "setuptools<81"], check=True, timeout=300, capture_output=True)
    return folder


PARSE = """
import json, sys
sys.builtin_module_names += ("os",)  # as run_opencompass.py does
from mmengine.config import Config
Config.fromfile(sys.argv[1], format_python_code=False).dump(sys.argv[1] + ".plain.py")
config = Config.fromfile(sys.argv[1] + ".plain.py", format_python_code=False).to_dict()
for dataset in config["datasets"]:
    dataset["max_out_len"] = dataset["infer_cfg"]["inferencer"].get("max_out_len")
print(json.dumps(config))
"""


def parsed(config: Path) -> dict:
    """A configuration as the real reader of OpenCompass sees it."""
    try:
        packages = parser_packages()
    except subprocess.SubprocessError:
        pytest.skip(f"needs a package index that has {', '.join(PARSER)}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE, config.name],
        cwd=config.parent,
        env=os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{config.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_configuration_read_by_opencompass_own_reader(micro_model, tmp_path):
    write_submission(Submission(micro_model, "chat", 1024, max_seq_len=512, gpus=2), tmp_path)
    config = parsed(tmp_path / CONFIG)
    lengths = {dataset["abbr"]: dataset["max_out_len"] for dataset in config["datasets"]}
    assert set(lengths) == DATASETS
    assert len(lengths) == 27 + 5
    assert list(lengths)[-1] == "truthful_qa"
    open_ended = {name for name, length in lengths.items() if length is None}
    assert open_ended == {"commonsense_qa", "chid-test", "truthful_qa"}
    assert {length for name, length in lengths.items() if name not in open_ended} == {512}
    (model,) = config["models"]
    assert (tmp_path / model["path"]).resolve() == micro_model.resolve()
    del model["path"]
    assert model == {
        "type": "palmtop_model.PalmtopChat",
        "abbr": micro_model.name,
        "model_kwargs": {"torch_dtype": "torch.float16", "device_map": "auto"},
        "max_seq_len": 512,
        "max_out_len": 1024,
        "batch_size": 8,
        "run_cfg": {"num_gpus": 1},
    }
    (group,) = config["summarizer"]["summary_groups"]
    assert group["name"] == "bbh"
    assert set(group["subsets"]) <= set(lengths)


def test_this_machines_variant_read_by_opencompass_own_reader(micro_model, tmp_path, python, data):
    scores_of(micro_model, tmp_path / "out", python, data)
    to_answer, to_judge = (parsed(tmp_path / "out" / name)["datasets"] for name in ("to_answer.py", "to_judge.py"))
    assert len(to_answer) == len(to_judge) + 1
    assert "openai_humaneval" not in {dataset["abbr"] for dataset in to_judge}
    assert to_judge[-1]["path"] == "json"
    assert (tmp_path / "out" / to_judge[-1]["data_files"]["validation"]).exists()


def test_rotary_settings_that_an_older_transformers_would_not_see(micro_model, tmp_path):
    model = shutil.copytree(micro_model, tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    del values["rope_theta"]
    values["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    values.pop("rope_scaling", None)
    (model / "config.json").write_text(json.dumps(values))
    write_submission(Submission(model, "base", 256, gpus=0), tmp_path / "out")
    text = (tmp_path / "out" / CONFIG).read_text()
    assert "'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}" in text
    assert "'torch_dtype': 'torch.float', 'device_map': 'cpu'" in text


def test_the_wrapper_reads_a_tokenizer_that_transformers_5_wrote(micro_model, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    calls = []

    class Theirs:
        def _load_tokenizer(self, *arguments):
            calls.append(arguments)

        def _load_model(self, path, kwargs, **adapter):
            calls.append((path, kwargs))

    models = type(sys)("opencompass.models")
    models.HuggingFaceBaseModel = models.HuggingFacewithChatTemplate = Theirs
    monkeypatch.setitem(sys.modules, "opencompass", type(sys)("opencompass"))
    monkeypatch.setitem(sys.modules, "opencompass.models", models)
    write_submission(Submission(micro_model, "chat", 256), tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, Path(WRAPPER).stem, raising=False)
    from palmtop_model import PalmtopChat

    wrapped = PalmtopChat()
    wrapped._load_tokenizer(str(micro_model), {})
    ours, theirs = wrapped.tokenizer, AutoTokenizer.from_pretrained(micro_model)
    messages = [{"role": "user", "content": "the of and"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours("the of <|user|>")["input_ids"] == theirs("the of <|user|>")["input_ids"]
    assert ours(["the", "the of and to"], padding=True)["attention_mask"][0][0] == 0
    assert ours("a b c d", truncation=True, max_length=1)["input_ids"] == ours("a b c d")["input_ids"][-1:]
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert not calls
    other = shutil.copytree(micro_model, tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    wrapped._load_tokenizer(str(other), {})
    wrapped._load_model(str(other), {"torch_dtype": "auto"})
    assert calls[0] == (str(other), {"trust_remote_code": False}, None)
    assert calls[1][1] == {"trust_remote_code": False, "use_safetensors": True, "torch_dtype": "auto"}
