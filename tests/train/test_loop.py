"""The loop on the CPU: golden losses, accumulation, what a run leaves."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from common import signals
from tests.conftest import ROOT
from train.__main__ import main

GOLDEN = ROOT / "tests" / "golden" / "losses.json"


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the training command in this process; returns the run folder."""

    def run(*words: str | Path, name: str = "run") -> Path:
        quiet = ["--log.every", "1", "--log.tensorboard", "false", "--device", "cpu", "--precision", "32"]
        argv = ["train.py", "--run", str(tmp_path / name), *quiet, *map(str, words)]
        monkeypatch.setattr("sys.argv", argv)
        try:
            main()
        finally:
            signals.clear()
            torch.use_deterministic_algorithms(False)
        return tmp_path / name

    return run


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_golden_losses(train, corpus, tokenizer) -> None:
    """20 steps of a tiny model; a change of these numbers is a change of what training computes."""
    run = train(
        *("--size", "tiny", "--model.vocab", "512", "--data", corpus, "--tokenizer", tokenizer.folder),
        *("--tokens", 20 * 512, "--batch-tokens", 512, "--seq-len", 64, "--optimizer.lr", "1e-3"),
        *("--optimizer.beta2", "0.95"),
        *("--schedule.warmup", "2560", "--schedule.decay", "2048", "--eval.every", "0", "--loader.streams", "8"),
    )
    assert losses(run) == pytest.approx(json.loads(GOLDEN.read_text()), abs=1e-5)


def test_accumulation_changes_nothing_but_rounding(train, corpus, micro_model) -> None:
    words = ("--init", micro_model, "--data", corpus, "--tokens", 10 * 512, "--batch-tokens", 512, "--seq-len", 32)
    words += ("--eval.every", "0", "--loader.streams", "8")
    whole = losses(train(*words, "--micro-batch", 16, name="whole"))
    parts = losses(train(*words, "--micro-batch", 2, name="parts"))
    assert parts == pytest.approx(whole, abs=2e-6)


def test_z_loss_is_in_the_gradient_but_not_in_the_reported_loss(train, corpus, micro_model) -> None:
    words = ("--init", micro_model, "--data", corpus, "--tokens", 5 * 512, "--batch-tokens", 512, "--seq-len", 32)
    words += ("--eval.every", "0", "--loader.streams", "8")
    plain = losses(train(*words, name="plain"))
    penalised = losses(train(*words, "--model.z-loss", "0.01", name="penalised"))
    assert penalised[0] == plain[0]
    assert penalised[-1] != plain[-1]


def test_a_run_explains_itself(train, corpus, micro_model, capsys) -> None:
    run = train(
        *("--init", micro_model, "--data", corpus, "--tokens", 40 * 256, "--batch-tokens", 256, "--seq-len", 32),
        *("--log.tensorboard", "true", "--checkpoint.every", 7, "--keep-every", 10, "--checkpoint.keep", 2),
        *("--eval.every", 20 * 256, "--eval.tokens", 1000, "--loader.streams", "8"),
    )
    said = capsys.readouterr().out
    assert "parameters" in said
    assert said.rstrip().endswith(f"model: {run / 'model'}\nlook:  tensorboard --logdir {run}")
    names = {path.name.split(".")[0] if "tfevents" in path.name else path.name for path in run.iterdir()}
    files = ".lock config.yaml env.json metrics.jsonl samples.jsonl events checkpoints model tokenizer"
    assert names == set(files.split())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:07d}"
        for step in (10, 16, 20, 30, 35, 40)  # 16: where the decay begins
    ]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["event"] == "start"
    assert [record["step"] for record in records if "val/bpb" in record] == [20, 40]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"} <= records[1].keys()
    prompts = [json.loads(line)["prompt"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len(prompts) == 2 * 4
    model = run / "model"
    files = "config.json generation_config.json model.safetensors palmtop.json tokenizer.json tokenizer_config.json"
    assert {path.name for path in model.iterdir()} == set(files.split())
    record = json.loads((model / "palmtop.json").read_text())
    assert record["tokens"] == 40 * 256
    assert record["parent"] == str(micro_model)
    assert record["data"][-1]["sources"] == [{"source": str(corpus), "weight": 1.0}]


def test_transformers_loads_what_was_trained_and_agrees(train, corpus, micro_model) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.hf import load_model

    run = train(
        *("--init", micro_model, "--data", corpus, "--tokens", 5 * 256, "--batch-tokens", 256, "--seq-len", 32),
        *("--eval.every", "0", "--loader.streams", "8"),
    )
    theirs = AutoModelForCausalLM.from_pretrained(run / "model")
    ids = AutoTokenizer.from_pretrained(run / "model")("know the water", return_tensors="pt").input_ids
    ours = load_model(run / "model")
    assert (theirs(ids).logits - ours(ids)).abs().max() < 2e-5


def test_larger_budgets_go_on_and_other_settings_are_refused(train, corpus, micro_model, capsys) -> None:
    words = ("--init", micro_model, "--data", corpus, "--batch-tokens", 256, "--seq-len", 32, "--eval.every", "0")
    words += ("--loader.streams", "8", "--schedule.decay", "0", "--schedule.warmup", "512")
    run = train(*words, "--tokens", 10 * 256)
    train(*words, "--tokens", 15 * 256, "--micro-batch", "2", "--loader.workers", "2")
    whole = train(*words, "--tokens", 15 * 256, "--micro-batch", "2", name="whole")
    assert len(losses(run)) == 15
    assert losses(run)[10:] == pytest.approx(losses(whole)[10:], abs=2e-6)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for change, shown in (
        (("--seed", "1", "--tokens", 15 * 256), "seed was 0, now 1"),
        (("--optimizer.lr", "0.5", "--tokens", 15 * 256), "optimizer.lr was 0.004, now 0.5"),
        (("--tokens", 5 * 256), "tokens was 3840, now 1280"),
        (("--resume", "never", "--tokens", 15 * 256), "exists; leave --resume out"),
    ):
        with pytest.raises(SystemExit) as caught:
            train(*words, *change)
        assert caught.value.code == 2
        assert shown in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_resume_from_a_path_goes_back_or_forks(train, corpus, micro_model, capsys) -> None:
    words = ("--init", micro_model, "--data", corpus, "--batch-tokens", 256, "--seq-len", 32, "--eval.every", "0")
    words += ("--loader.streams", "8", "--tokens", 12 * 256, "--checkpoint.every", 4)
    run = train(*words)
    first = losses(run)
    fork = train(*words, "--resume", run / "checkpoints" / "step-0000008", name="fork")
    assert losses(fork) == first[8:]
    back = ("--resume", run / "checkpoints" / "step-0000008")
    train(*words, *back)
    assert losses(run) == first
    assert (run / "checkpoints" / "superseded-step-0000012").exists()
    train(*words, *back)  # given again, the same command does not go back again
    starts = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "start" in line]
    assert json.loads(starts[-1])["step"] == 12
    shutil.rmtree(run / "checkpoints" / "step-0000008")  # as a longer run does with old ones
    train(*words, *back)
    with pytest.raises(SystemExit):
        train(*words, "--resume", fork / "checkpoints" / "step-0000012")
    assert "has checkpoints of its own" in capsys.readouterr().err


def test_the_model_of_a_run_stays_what_it_is(train, corpus, tokenizer, capsys) -> None:
    words = (
        "--size",
        "tiny",
        "--data",
        corpus,
        "--tokenizer",
        tokenizer.folder,
        "--tokens",
        512,
        "--batch-tokens",
        256,
    )
    words += ("--seq-len", 32, "--eval.every", "0", "--loader.streams", "8")
    train(*words, "--model.vocab", 512)
    for change in (("--model.vocab", 576), ("--model.vocab", 512, "--model.qk-norm", "false")):
        with pytest.raises(SystemExit):
            train(*words, *change, "--tokens", 1024)
        assert "cannot change the model of the run" in capsys.readouterr().err


def test_a_model_that_is_no_runs_is_not_replaced(train, tmp_path: Path, corpus, micro_model, capsys) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    with pytest.raises(SystemExit):
        train(
            "--init",
            micro_model,
            "--data",
            corpus,
            "--tokens",
            512,
            "--batch-tokens",
            256,
            "--seq-len",
            32,
            name="mine",
        )
    assert "is no run; choose another --run" in capsys.readouterr().err
    assert (tmp_path / "mine" / "model").exists()


def test_a_changed_corpus_is_refused(train, tmp_path: Path, corpus: Path, micro_model, capsys) -> None:
    shutil.copytree(corpus, tmp_path / "data")
    words = ("--init", micro_model, "--data", tmp_path / "data", "--batch-tokens", 256, "--seq-len", 32)
    words += ("--eval.every", "0", "--loader.streams", "8")
    train(*words, "--tokens", 512)
    extra = next((tmp_path / "data" / "en").glob("c4-train*"))
    shutil.copy(extra, extra.with_name("c4-train.00003-of-00003.json.gz"))
    with pytest.raises(SystemExit):
        train(*words, "--tokens", 1024)
    assert "are not those the run began with" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(train, corpus, micro_model, capsys) -> None:
    words = ("--init", micro_model, "--data", corpus, "--batch-tokens", 256, "--seq-len", 32, "--eval.every", "0")
    words += ("--loader.streams", "8", "--tokens", 40 * 256, "--checkpoint.every", 1, "--schedule.warmup", 256)
    with pytest.raises(SystemExit):
        train(*words, "--optimizer.lr", "1e30")
    error = capsys.readouterr().err
    assert "training has diverged" in error


def test_a_larger_budget_after_the_decay_is_warned_of(train, corpus, micro_model, capsys) -> None:
    words = ("--init", micro_model, "--data", corpus, "--batch-tokens", 256, "--seq-len", 32, "--eval.every", "0")
    words += ("--loader.streams", "8", "--schedule.decay", 2 * 256 - 20)
    run = train(*words, "--tokens", 10 * 256 - 100)  # whose last batch is filled up
    for tokens in (20 * 256, 40 * 256):
        train(*words, "--tokens", tokens, "--checkpoint.keep", 1)
    kept = run / "checkpoints" / "step-0000008"
    assert (
        f"since step 8 and now rises again; to go on from before the decay: --resume {kept}" in capsys.readouterr().out
    )
    assert kept.exists()
    train(*words, "--tokens", 12 * 256, "--resume", kept, name="branch")


def test_weights_of_a_checkpoint_start_a_new_run(train, corpus, micro_model) -> None:
    words = ("--data", corpus, "--batch-tokens", 256, "--seq-len", 32, "--eval.every", "0", "--loader.streams", "8")
    run = train("--init", micro_model, *words, "--tokens", 20 * 256)
    branch = train("--init", run / "checkpoints" / "step-0000020", *words, "--tokens", 256, name="branch")
    assert losses(branch)[0] < losses(run)[0]


def test_damaged_checkpoints_are_passed_over_by_a_run(train, corpus, micro_model, capsys) -> None:
    words = ("--init", micro_model, "--data", corpus, "--batch-tokens", 256, "--seq-len", 32, "--eval.every", "0")
    words += ("--loader.streams", "8", "--tokens", 12 * 256, "--checkpoint.every", 4)
    run = train(*words)
    first = losses(run)
    (run / "checkpoints" / "step-0000012" / ".metadata").unlink()
    train(*words)
    assert "passing over the checkpoint" in capsys.readouterr().out
    assert losses(run) == first


def test_real_c4_trains(train, shared: Path) -> None:
    run = train(
        *("--size", "tiny", "--data", shared / "datasets" / "c4", "--tokens", 10 * 1024, "--batch-tokens", 1024),
        *("--seq-len", 128, "--eval.tokens", 3000, "--eval.every", 10 * 1024, "--eval.continuation", 4),
    )
    assert losses(run)[-1] < losses(run)[0] - 0.5
