"""The command and the one function behind it, on folders of every origin."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig

from common.errors import UserError
from scoring.__main__ import main
from scoring.score import choose_form, empty_score, score
from scoring.settings import ScoreSettings, out_folder
from tests.conftest import ROOT, run_command

SHORT = {"suite": "sample", "max_out_len": 4, "max_seq_len": 48, "speed": False}


def quick_score(folder: Path, out: Path, **options: object):
    return score(folder, ScoreSettings(**{**SHORT, "out": str(out), **options}))


def narrowed(folder: Path, out: Path) -> Path:
    """A folder whose feed-forward layers were cut to half their width, by hand."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] //= 2
    (out / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    half = config["intermediate_size"]
    for name, tensor in weights.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            weights[name] = tensor[:half].clone()
        elif name.endswith("down_proj.weight"):
            weights[name] = tensor[:, :half].clone()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def foreign(tokenizer, out: Path) -> Path:
    """A Phi that another library wrote."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.begin,
        eos_token_id=tokenizer.end,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    tokenizer.copy_to(out)
    return out


@pytest.fixture(scope="module")
def scored(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("scores")
    quick_score(micro_model, out)
    return out, json.loads((out / "score.json").read_text())


def test_one_function_scores_folders_of_every_origin(micro_model: Path, tokenizer, tmp_path: Path, scored) -> None:
    folders = [narrowed(micro_model, tmp_path / "narrowed"), foreign(tokenizer, tmp_path / "phi")]
    found = [quick_score(folder, tmp_path / f"out-{folder.name}", only="chid,gsm8k") for folder in folders]
    for one in found:
        assert [result.name for result in one.competition] == ["gsm8k", "chid"]
        assert all(result.score is not None and result.items == 8 for result in one.competition)
        assert one.means is None
    sizes = [one.parameters["non_duplicate"] for one in found]
    assert sizes[0] == scored[1]["parameters"]["non_duplicate"] - 3 * 32 * 32 * 2
    assert sizes[1] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders[1]).parameters())


def test_all_six_tasks_their_mean_and_what_they_were_asked_with(scored) -> None:
    _, found = scored
    names = ["commonsense_qa", "bbh", "gsm8k", "humaneval", "chid", "truthfulqa"]
    assert [result["name"] for result in found["competition"]] == names
    assert found["means"]["geometric"] == 0  # random weights solve nothing
    assert found["marks"][0].startswith("sample")
    assert found["asked"]["form"] == "chat"
    assert any("bbh is the mean of 2 of its 27" in warning for warning in found["warnings"])


def test_the_same_folder_twice_gives_the_same_score_and_answers(micro_model: Path, scored, tmp_path: Path) -> None:
    out, found = scored
    quick_score(micro_model, tmp_path)
    again = json.loads((tmp_path / "score.json").read_text())
    assert (again["competition"], again["means"]) == (found["competition"], found["means"])
    assert (tmp_path / "answers.jsonl").read_bytes() == (out / "answers.jsonl").read_bytes()


def test_a_finished_run_is_scored_from_its_answers(micro_model: Path, scored) -> None:
    out, found = scored
    before = (out / "answers.jsonl").stat().st_mtime_ns
    assert [one.score for one in quick_score(micro_model, out).competition] == [
        one["score"] for one in found["competition"]
    ]
    assert (out / "answers.jsonl").stat().st_mtime_ns == before


def test_a_killed_run_goes_on_to_the_same_score(micro_model: Path, scored, tmp_path: Path) -> None:
    out, found = scored
    words = [sys.executable, "-m", "scoring", str(micro_model), "--suite", "sample", "--max-out-len", "4"]
    words += ["--max-seq-len", "48", "--speed", "false", "--out", str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    answers = tmp_path / "answers.jsonl"
    while not (answers.exists() and answers.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = answers.read_bytes().count(b"\n")
    assert 5 <= kept < 48
    quick_score(micro_model, tmp_path)
    again = json.loads((tmp_path / "score.json").read_text())
    assert again["competition"] == found["competition"]

    def lines(path: Path) -> list[str]:
        return sorted(path.read_text().splitlines())

    assert lines(answers) == lines(out / "answers.jsonl")


def test_rescore_gives_the_command_s_scores(scored, tmp_path: Path) -> None:
    out, found = scored
    done = run_command(
        "-m", "scoring", "rescore", out / "answers.jsonl", "--suite", "sample", "--out", tmp_path / "lines.jsonl"
    )
    assert done.returncode == 0, done.stderr
    assert "sample, no benchmark" in done.stdout
    groups = json.loads((tmp_path / "lines.json").read_text())["groups"]
    assert groups == {result["name"]: result["score"] for result in found["competition"]}


@pytest.mark.parametrize(("answers", "out"), [("a.jsonl", "r.json"), ("a.json", "a.jsonl"), ("a.json", "a.json")])
def test_a_summary_is_written_over_no_answers(answers: str, out: str, tmp_path: Path, monkeypatch, capsys) -> None:
    line = '{"task": "gsm8k", "row": 0, "output": "1"}\n'
    (tmp_path / answers).write_text(line)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scoring", "rescore", answers, "--suite", "sample", "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.match(r"error: the summary of --out .* would be written over .*\.json; choose", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [answers]
    assert (tmp_path / answers).read_text() == line


def test_quick_tasks_perplexity_and_speed(micro_model: Path, corpus: Path, shared: Path, tmp_path: Path) -> None:
    settings = ScoreSettings(
        suite="quick,c4",
        data=str(shared / "datasets" / "eval"),
        limit=4,
        text=str(corpus),
        text_tokens=500,
        out=str(tmp_path),
    )
    found = score(micro_model, settings)
    assert [result.name for result in found.quick][:2] == ["hellaswag", "piqa"]
    assert all(result.items == 4 and result.interval is not None for result in found.quick)
    assert found.c4["packed_perplexity"] == pytest.approx(512, rel=0.1)  # random weights, 512 tokens
    assert found.speed["throughput"] > 0
    shown = found.rows()
    assert "(limit)" in shown["piqa"]
    assert {"C4, packed", "C4, GaLore's protocol", "decode", "peak memory"} <= set(shown)


def test_form_follows_the_training(micro_model: Path, tmp_path: Path) -> None:
    plain = narrowed(micro_model, tmp_path / "m")
    for stages, form in ((["pretrain"], "base"), (["pretrain", "sft"], "chat"), (["unknown"], "chat")):
        (plain / "palmtop.json").write_text(json.dumps({"data": [{"stage": stage} for stage in stages]}))
        assert choose_form(plain, "auto") == form
    assert choose_form(plain, "base") == "base"
    config = json.loads((plain / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no chat template.*--form base"):
        choose_form(plain, "chat")


@pytest.mark.parametrize(
    ("suite", "tasks", "mark"),
    [
        ("quick", None, "limit: 3 rows a task, drawn by seed 5"),
        (None, "arc_easy", "limit: the first 3 rows of each of --tasks"),
        ("quick", "arc_easy", "limit: 3 rows a task, drawn by seed 5; the first 3 rows of each of --tasks"),
    ],
)
def test_a_limit_s_mark_says_which_rows_were_taken(
    suite: str | None, tasks: str | None, mark: str, micro_model: Path
) -> None:
    settings = ScoreSettings(suite=suite, tasks=tasks, limit=3, seed=5)
    assert empty_score(micro_model, settings, "base").marks == [mark]


def test_results_lie_beside_the_model_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").touch()
    settings = ScoreSettings(suite="competition,quick", limit=50, form="base")
    assert out_folder(tmp_path / "model", settings) == tmp_path / "scores" / "competition-quick-base-limit50"
    assert out_folder(tmp_path, ScoreSettings()) == Path("scores") / tmp_path.name / "competition"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which model"),
        (["/no/folder"], "there is no model folder"),
        (["MODEL", "--suite", "mmlu"], "no suite"),
        (["MODEL", "--suite", "sample", "--limit", "0"], "at least 1"),
        (["MODEL", "--suite", "sample", "--only", "mmlu"], "none of the tasks"),
        (["MODEL", "--data", "/no/data"], "--data /no/data is no folder"),
        (["MODEL", "--engine", "opencompass"], "belong together"),
        (["MODEL", "--suite", "sample,competition"], "one of them at a time"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, micro_model: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    words = [str(micro_model) if word == "MODEL" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["scoring", *words, *(["--out", str(tmp_path / "out")] if words else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert message in told
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_named_and_kept(micro_model: Path, scored, tmp_path: Path) -> None:
    out, _ = scored
    for name in ("answers.jsonl", "answers.plan.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    answers = tmp_path / "answers.jsonl"
    broken = answers.read_bytes().replace(b'"row"', b'"r0w"', 1)
    answers.write_bytes(broken)
    with pytest.raises(UserError, match=r"line 1 of .*answers.jsonl is damaged"):
        quick_score(micro_model, tmp_path)
    assert answers.read_bytes() == broken


def test_help_answers_at_once() -> None:
    code = "import sys, runpy; sys.argv = ['x', '--help']; runpy.run_module('scoring', run_name='__main__')"
    start = time.process_time()
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "example" in done.stdout
    assert not any(heavy in done.stderr for heavy in ("| torch\n", "| transformers\n", "| lm_eval\n", "| datasets\n"))
    assert time.process_time() - start < 5
