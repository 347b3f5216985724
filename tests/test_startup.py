"""Commands that only answer import nothing that takes seconds, and training imports nothing that it does not need."""

import json
import re
from pathlib import Path

import pytest

from pipeline.recipe import read_recipe
from pipeline.stages import tasks
from tests.conftest import ROOT, run_command
from tests.pruning.test_shapes import LLAMA_3

HELP = """train.py, -m train, -m train consolidate, -m data, -m data tokenizer, -m data prepare, -m sft, -m sft chat,
-m sft formats, -m scoring, -m scoring prompts, -m scoring rescore, -m pruning, -m pruning import, -m export,
-m export bench, -m export phone, -m submit, -m submit report, -m submit leaderboard, -m submit bundle, -m pipeline"""
HELPS = [f"{command.strip()} --help" for command in HELP.split(",")]
PLANS = [
    "train.py --size 1b --devices 8 --nodes 4 --gpu h100-80g --plan --explain",
    "-m pruning {model} --phone-memory 8GB --vocab keep --plan",
    "-m pipeline recipes/1b.yaml --plan",
    "-m pipeline recipes/demo.yaml --show",
]

HEAVY = "torch lightning transformers datasets tvm scipy pandas peft lm_eval deepspeed tensorboard".split()

RUN = f"""
import json, os, runpy, sys
import jsonargparse, rich.console, yaml
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = words[words[0] == "-m":]
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, words
        sys.stdout.flush()
        print("imported:", *(name for name in {HEAVY} if name in sys.modules), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, words
"""
"""Runs commands one after the other, each in a fork of a process that has imported nothing but the parser."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    """What each command prints, and the heavy packages that it has imported when it ends."""
    model = tmp_path_factory.mktemp("llama")
    (model / "config.json").write_text(json.dumps(LLAMA_3))
    commands = [*HELPS, *PLANS]
    done = run_command("-c", RUN, json.dumps([command.format(model=model).split() for command in commands]))
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(.*?)^imported:(.*?)\n", done.stdout, re.S | re.M)
    return {command: (said, names.split()) for command, (said, names) in zip(commands, found, strict=True)}


@pytest.mark.parametrize("command", [*HELPS, *PLANS])
def test_a_command_that_only_answers_imports_nothing_heavy(
    command: str, answers: dict[str, tuple[str, list[str]]]
) -> None:
    assert answers[command][1] == []


def test_examples_name_what_the_demo_writes(answers: dict[str, tuple[str, list[str]]]) -> None:
    places = [task.place for task in tasks(read_recipe(ROOT / "recipes" / "demo.yaml"))]
    written = {path for place in places for path in (place.result, place.run)}
    named = {Path(path) for command in HELPS for path in re.findall(r"runs/demo[\w./-]*", answers[command][0])}
    assert named
    assert named <= written


def test_training_imports_only_what_it_needs() -> None:
    """Lightning's Trainer would bring torchmetrics, scipy and transformers; see train/fabric.py."""
    unneeded = "lightning.pytorch torchmetrics scipy transformers datasets tensorboard deepspeed peft lm_eval".split()
    modules = "train.rank, train.pretrain, sft.finetune, pruning.prune"
    code = f"import sys, {modules}; print(*(name for name in {unneeded} if name in sys.modules))"
    done = run_command("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
