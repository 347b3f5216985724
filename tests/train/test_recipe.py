"""Recipes of settings: what they hold, and that flags win."""

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import signals
from common.errors import UserError
from common.settings import RECIPES, parse
from scoring import perplexity
from tests.conftest import run_command
from train.__main__ import main
from train.settings import TrainCommand, model_config, resolve

STEPS = {"galore-60m": 10_000, "galore-130m": 20_000, "galore-350m": 60_000, "galore-1b": 100_000}


def read(*words: str) -> TrainCommand:
    return parse(TrainCommand, words, prog="train.py", description="")


@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPES / "train").iterdir()))
def test_a_shipped_recipe_is_galores_protocol(name: str) -> None:
    command = read("--recipe", name)
    config = model_config(command)
    settings = resolve(command, config)
    assert (settings.size, config.vocab, settings.seq_len) == (name.replace("galore", "c4"), 32_000, 256)
    assert (str(settings.data), settings.loader.layout, settings.eval.tokens) == ("c4", "padded", 10_000_000)
    assert settings.batch_tokens == 512 * 256
    assert settings.tokens == STEPS[name] * settings.batch_tokens
    assert (settings.schedule.name, settings.schedule.final) == ("cosine", 0.1)
    assert settings.schedule.warmup == settings.tokens // 10
    assert (settings.optimizer.name, settings.optimizer.weight_decay) == ("adamw", 0)


def test_flags_win_wherever_they_stand(tmp_path: Path) -> None:
    for words in ("--recipe galore-60m --optimizer.lr 2e-3", "--optimizer.lr 2e-3 --recipe=galore-60m"):
        command = read(*words.split())
        assert (command.optimizer.lr, command.optimizer.beta2, command.recipe) == (2e-3, 0.999, "galore-60m")
    assert read().recipe is None
    own = tmp_path / "own.yaml"
    own.write_text("size: tiny\nseq_len: 64\n")
    assert read("--recipe", "galore-1b", "--recipe", str(own)).seq_len == 64  # the last one counts
    config = tmp_path / "config.yaml"
    config.write_text("seq_len: 32\n")
    command = read("--config", str(config), "--recipe", str(own))
    assert (command.size, command.seq_len) == ("tiny", 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["galore-60"], "no recipe is called 'galore-60'; there are galore-60m, "),
        (["nowhere/own.yaml"], "the recipe nowhere/own.yaml is not there"),
        (["galore-60m", "--tokens", "1M", "--plan"], "the warm-up of 131,072,000 tokens and the decay of"),
    ],
)
def test_a_recipe_that_is_not_there_is_one_message(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command = read("--recipe", *words)
        resolve(command, model_config(command))


def test_a_plan_says_what_is_from_the_recipe() -> None:
    words = "train.py --recipe galore-60m --optimizer.name muon --plan --explain"
    lines = [" ".join(line.split()) for line in run_command(*words.split()).stdout.splitlines()]
    assert lines[0] == "Recipe galore-60m"
    assert "batch-tokens 131072 from the recipe" in lines
    assert "optimizer.name muon as given; the recipe has adamw" in lines
    assert "steps 10,000 tokens / batch, rounded up" in lines


def test_its_validation_is_the_perplexity_of_galores_protocol(
    corpus: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = f"""--recipe galore-60m --size tiny --model.vocab 512 --data {corpus} --tokenizer {tokenizer.folder}
        --seq-len 32 --batch-tokens 512 --tokens 2048 --schedule.warmup 512 --device cpu --precision 32 --run {run}
        --eval.continuation 0 --log.tensorboard false"""
    monkeypatch.setattr("sys.argv", ["train.py", *words.split()])
    main()
    signals.clear()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, evaluated = ([record for record in records if name in record] for name in ("loss", "val/perplexity"))
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert "val/bpb" not in evaluated[-1]
    monkeypatch.setattr(perplexity, "GALORE_LENGTH", 32)
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    report = perplexity.c4(model, AutoTokenizer.from_pretrained(run / "model"), corpus)
    assert report.galore.length == 32
    assert evaluated[-1]["val/perplexity"] == pytest.approx(report.galore.perplexity, rel=1e-5)
    assert evaluated[-1]["val/loss"] == pytest.approx(math.log(report.galore.perplexity), rel=1e-5)
