"""Fine-tuning runs, whole: what they leave, stops and ranks that change nothing, adapters, teachers, bad input."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import signals
from common.errors import UserError
from data.packing import IGNORE
from sft.__main__ import main
from sft.rendering import Renderer
from tests.conftest import kill_and_resume
from tests.models.test_foreign import write_folder
from tests.sft.conftest import ROWS, conversation, write_rows
from train.consolidate import consolidate

QUICK = """--device cpu --precision 32 --log.every 1 --log.tensorboard false --batch-tokens 1024 --seq-len 256
--optimizer.lr 5e-3 --eval.answer 4 --eval.tokens 2000""".split()


@pytest.fixture
def sft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the command in this process; returns the run folder."""

    def run(*words: str | Path, name: str = "run") -> Path:
        model, more = words[:1], words[1:]
        argv = ["sft", *model, "--run", tmp_path / name, *QUICK, *more]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        try:
            main()
        finally:
            signals.clear()
        return tmp_path / name

    return run


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["formats"], "sft.formats_command.formats_command"),
        (["chat"], "sft.chat.chat_command"),
        (["model", "--show", "1"], "sft.finetune.show_data"),
    ],
)
def test_ctrl_c_ends_at_once_what_trains_nothing(
    words: list[str], place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, lambda _: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("sys.argv", ["sft", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def evaluations(run: Path) -> list[dict]:
    return [record for record in records(run) if "val/loss" in record]


def test_a_run_learns_and_explains_itself(sft, chat_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sft(chat_model, "--data", "sample", "--tokens", 60 * 1024, "--eval.every", 30 * 1024)
    said = capsys.readouterr().out
    assert "sample: 147 trained on, 3 held out\n" in said
    assert "not compared with evaluation data: --keep-out DIR" in said
    assert said.rstrip().endswith(f"look:  tensorboard --logdir {run}\ntalk:  python -m sft chat {run / 'model'}")
    first, *_, last = evaluations(run)
    assert [one["step"] for one in evaluations(run)] == [0, 30, 60]
    for language in ("en", "zh"):
        assert last[f"val/loss/{language}"] < first[f"val/loss/{language}"] - 0.5
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 3 * 8
    assert {"step", "prompt", "text", "stopped"} == samples[0].keys()

    model = run / "model"
    files = "config.json generation_config.json model.safetensors palmtop.json tokenizer.json tokenizer_config.json"
    assert {path.name for path in model.iterdir()} == set(files.split())
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|turn_end|>", "<|end|>")}
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == list(ids.values())
    assert AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id == list(ids.values())
    record = json.loads((model / "palmtop.json").read_text(encoding="utf-8"))
    assert record["stage"] == "sft"
    assert record["parent"] == str(chat_model)
    assert record["data"] == [
        {"stage": "unknown", "from": str(chat_model)},
        {"stage": "sft", "sources": [{"source": "palmtop's sample", "weight": 1.0}]},
    ]
    assert record["conversations"]["sample"] == {"trained on": 147, "held out": 3}


def test_answers_of_the_model_folder_end(sft, chat_model: Path, tmp_path: Path) -> None:
    """A model that has learned its few rows by heart stops by itself in transformers."""
    run = sft(chat_model, "--data", write_rows(tmp_path / "rows.json", ROWS[:1]), "--tokens", 60 * 1024)
    model, renderer = AutoModelForCausalLM.from_pretrained(run / "model"), Renderer(run / "model")
    prompt = renderer.prompt([{"role": "user", "content": ROWS[0]["instruction"]}])
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    assert renderer.tokenizer.decode(answer, special=True) == "Red.<|turn_end|>"


def test_the_model_folder_has_the_loss_of_the_run(sft, chat_model: Path) -> None:
    """Of full fine-tuning, and of adapters once they are merged."""
    words = ("--data", "sample", "--eval.answer", "0")
    for name, more in (("full", ()), ("adapters", ("--lora.rank", 4))):
        run = sft(chat_model, *words, *more, "--tokens", 4 * 1024, name=name)
        again = sft(run / "model", *words, "--tokens", 1024, name=f"{name}-again")
        before, after = evaluations(run)[-1]["val/loss"], evaluations(again)[0]["val/loss"]
        print(f"{name}: {evaluations(run)[0]['val/loss']:.4f} → {before:.6f}, as a model folder {after:.6f}")
        assert after == pytest.approx(before, rel=1e-5)
        assert before < evaluations(run)[0]["val/loss"]
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    assert consolidate(run) == run / "model"
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    saved = next((run / "checkpoints").glob("step-*"))
    assert sum(path.stat().st_size for path in saved.glob("*.distcp")) < 200_000  # the adapters alone


def test_adapters_are_not_merged_into_other_weights(sft, chat_model: Path, tmp_path: Path, capsys) -> None:
    base = tmp_path / "base"
    shutil.copytree(chat_model, base)
    words = (base, "--data", "sample", "--eval.every", "0", "--lora.rank", 2)
    run = sft(*words, "--tokens", 1024)
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match="were trained beside other weights"):
        consolidate(run)
    with pytest.raises(SystemExit):
        sft(*words, "--tokens", 2048)
    assert "were trained beside other weights" in capsys.readouterr().err


def test_a_foreign_model_is_fine_tuned(sft, tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "qwen2"
    write_folder("qwen2", folder, vocab_size=512, max_position_embeddings=256)
    tokenizer.copy_to(folder)
    run = sft(folder, "--data", "sample", "--tokens", 4 * 1024, "--eval.answer", "0")
    assert evaluations(run)[-1]["val/loss"] < evaluations(run)[0]["val/loss"]
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, run / "model"))
    assert before.items() <= after.items()
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"]
    _, found = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(found.values())


def test_a_teacher_is_learned_from(sft, chat_model: Path, tmp_path: Path) -> None:
    teacher = sft(chat_model, "--data", "sample", "--tokens", 20 * 1024, "--eval.answer", "0", name="teacher")
    words = ("--data", "sample", "--teacher", teacher / "model", "--distill.weight", 0.9, "--eval.answer", "0")
    run = sft(chat_model, *words, "--tokens", 10 * 1024, name="student")
    for language in ("en", "zh"):
        figures = [one[f"val/kl/{language}"] for one in evaluations(run)]
        assert figures[-1] < figures[0] / 2
    record = json.loads((run / "model" / "palmtop.json").read_text(encoding="utf-8"))
    assert record["teacher"] == str(teacher / "model")
    assert {"stage": "sft", "sources": [{"source": "palmtop's sample", "weight": 1.0}]} in record["data"][:-1]


BASE = [*QUICK, "--data", "sample", "--eval.every", "0", "--micro-batch", "1", "--optimizer.lr", "1e-3"]


def run_plan(model: Path, attempts: list[dict], *more: str) -> None:
    for one in attempts:
        one.setdefault("argv", [])
    ends = kill_and_resume({"stage": "sft", "argv": ["--model", str(model), *BASE, *more], "attempts": attempts})
    for end, one in zip(ends, attempts, strict=True):
        assert end["codes"] == [-9 if "step" in one else 0] * one.get("world", 1), end["log"][-3000:]


@pytest.mark.parametrize("more", ["", "--lora.rank 4 --teacher MODEL"], ids=["full", "adapters and teacher"])
def test_a_killed_run_goes_on_exactly(more: str, chat_model: Path, tmp_path: Path) -> None:
    """Past the end of an epoch, too: the sample fills 63 rows of this length, and 96 are taken."""
    argv = more.replace("MODEL", str(chat_model)).split()
    killed = {"run": str(tmp_path / "killed"), "argv": argv}
    attempts = [
        {"run": str(tmp_path / "whole"), "argv": argv},
        {**killed, "step": 5, "signal": "SIGKILL"},
        {**killed, "step": 13, "signal": "SIGKILL"},
        killed,
    ]
    run_plan(chat_model, attempts, "--tokens", str(24 * 1024), "--checkpoint.every", "2", "--eval.every", "6144")
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    assert len(losses(whole)) == 24
    assert losses(resumed) == losses(whole)
    assert [(e["step"], e["val/loss"]) for e in evaluations(resumed)] == [
        (e["step"], e["val/loss"]) for e in evaluations(whole)
    ]
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


STRATEGIES = [
    ("full", "ddp", 2),
    ("full", "fsdp", 2),
    ("lora", "fsdp", 2),
    ("foreign", "fsdp", 2),
    ("teacher", "ddp", 2),
]


@pytest.fixture(scope="module")
def by_strategy(chat_model: Path, tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of every kind of run, by one process and by two."""
    base = tmp_path_factory.mktemp("strategies")
    write_folder("phi", base / "phi", vocab_size=512, max_position_embeddings=256)
    tokenizer.copy_to(base / "phi")
    kinds = {
        "full": [],
        "lora": ["--lora.rank", "4"],
        "foreign": ["--model", str(base / "phi"), "--activation-checkpointing", "full"],
        "teacher": ["--teacher", str(base / "phi")],
    }
    attempts = [{"run": str(base / kind), "argv": more} for kind, more in kinds.items()]
    for kind, strategy, world in STRATEGIES:
        argv = [*kinds[kind], "--strategy", strategy]
        attempts.append({"run": str(base / f"{kind}-{strategy}"), "argv": argv, "world": world})
    run_plan(chat_model, attempts, "--tokens", str(8 * 1024), "--checkpoint.every", "100")
    return {Path(one["run"]).name: losses(Path(one["run"])) for one in attempts}


@pytest.mark.parametrize(("kind", "strategy", "world"), STRATEGIES)
def test_two_processes_are_as_one(kind: str, strategy: str, world: int, by_strategy) -> None:
    one, two = by_strategy[kind], by_strategy[f"{kind}-{strategy}"]
    assert len(one) == len(two) == 8
    worst = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
    print(f"{kind} {strategy}: {worst:.1e}")
    assert worst < 1e-5


@pytest.fixture
def fails(sft, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail with exit code 2, one message and nothing left; returns the message."""

    def run(*words: str | Path) -> str:
        with pytest.raises(SystemExit) as caught:
            sft(*words)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert not (tmp_path / "run").exists()
        return error

    return run


def test_bad_input_is_one_clear_message(fails, chat_model: Path, tokenizer, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json", ROWS)
    other = tmp_path / "other"
    shutil.copytree(chat_model, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8").replace("<|reserved_0|>", "<|renamed|>")
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    small, damaged = tmp_path / "small", tmp_path / "damaged"
    for folder in (small, damaged):
        shutil.copytree(chat_model, folder)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    (damaged / "generation_config.json").write_text("{")
    for words, shown in (
        ([], "give the model folder to start from: python -m sft MODEL"),
        ([tmp_path / "nowhere"], "there is no model folder"),
        ([rows], "is a file; give a model folder"),
        ([chat_model, "--teacher", tmp_path], "it has no config.json"),
        ([chat_model, "--data", "alpacca"], "alpacca is no file"),
        ([chat_model, "--data", rows, "--seq-len", "300"], "longer than the model's context of 256"),
        ([chat_model, "--data", rows, "--teacher", other], "has another tokenizer"),
        ([chat_model, "--data", rows, "--epochs", "2", "--tokens", "1M"], "leave one out"),
        ([chat_model, "--data", rows, "--lora.alpha", "2"], "belongs to --lora.rank"),
        ([chat_model, "--data", rows, "--lora.rank", "2", "--optimizer.name", "muon"], "muon trains whole matrices"),
        ([chat_model, "--data", rows, "--lora.rank", "2", "--strategy", "deepspeed-2"], "use --strategy fsdp"),
        ([chat_model, "--data", rows, "--keep-out", tmp_path / "none"], "there is no folder"),
        ([chat_model, "--data", rows, "--distill.weight", "2"], "must be above 0 and at most 1"),
        ([chat_model, "--data", rows, "--distill.weight", "0.9"], "belong to --teacher"),
        ([chat_model, "--data", rows, "--eval.answer", "-1"], "must not be negative"),
        ([small, "--data", rows], "has 512 tokens, more than the 500 rows of the model's embedding"),
        ([damaged, "--data", rows], "generation_config.json cannot be read"),
    ):
        assert shown in fails(*words), words


def test_what_shares_words_with_evaluation_data_is_left_out(sft, chat_model: Path, tmp_path: Path, capsys) -> None:
    question = "How many of the seven small grey geese that left the pond came back home today?"
    rows = [*ROWS, {"instruction": f"Tell me: {question}", "input": "", "output": "Six."}]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "test.jsonl").write_text(json.dumps({"question": question, "answer": "6"}))
    path = write_rows(tmp_path / "rows.json", rows)
    words = ("--data", path, "--keep-out", tmp_path / "eval", "--eval.every", "0", "--tokens", "1024")
    run = sft(chat_model, *words)
    said = capsys.readouterr().out
    assert "1 overlap with evaluation data" in said
    assert f"test.jsonl: “{question.rstrip('?')}”" in said
    record = json.loads((run / "model" / "palmtop.json").read_text(encoding="utf-8"))["conversations"]
    assert record[str(path)]["overlap with evaluation data"] == 1
    assert record["overlap"][0]["file"] == "test.jsonl"


def test_show_prints_what_is_learned_and_makes_nothing(sft, chat_model: Path, tmp_path: Path, capsys) -> None:
    run = sft(chat_model, "--data", write_rows(tmp_path / "rows.json", ROWS), "--show", "2")
    said = capsys.readouterr().out
    assert said.count("\n+ ") == said.count("\n- ") == 2
    assert "|<|turn_end|>\n" in said
    assert not run.exists()


def test_epochs_decide_the_budget_and_may_grow(sft, chat_model: Path, tmp_path: Path) -> None:
    words = (chat_model, "--data", "sample", "--eval.every", "0", "--schedule.warmup", "0", "--schedule.decay", "0")
    run = sft(*words, "--epochs", 0.5)
    steps = len(losses(run))
    sft(*words, "--epochs", 1)
    assert 2 * steps - 1 <= len(losses(run)) <= 2 * steps
    sft(*words)  # goes on with the budget that is stored, and is finished
    assert len(losses(run)) <= 2 * steps


def test_the_targets_are_the_answers(chat_model: Path, renderer: Renderer) -> None:
    from sft.packing import make_batch

    batch = make_batch([renderer.render([conversation("Name a colour.", "Red.")])], 64)
    chosen = batch.targets[batch.targets != IGNORE].tolist()
    assert renderer.tokenizer.decode(chosen, special=True) == "Red.<|turn_end|>"
