"""Recipes are read as they stand; every mistake is named before anything runs."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from pipeline.plan import plan
from pipeline.recipe import read_recipe, to_yaml
from pipeline.settings import Recipe, Stage
from pipeline.stages import inputs, tasks
from tests.conftest import ROOT
from train.slurm import Request

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

MINE = """
name: mine
slurm: account=lab,time=1:00:00
stages:
  pretrain:
    command: train
    settings:
      size: tiny
      tokens: 2e9
      eval: {every: 80k, prompts: ["The", "A"]}
      compile: off
      deterministic: true
    slurm: gpus=8,time=24:00:00
  sft:
    command: sft
    settings: {model: "${pretrain}", data: "alpaca=1,alpaca_zh=1"}
  report:
    command: submit report
    settings: {run: "${sft.run}"}
    after: [pretrain]
"""

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
"""Its ``config.json``, as far as it decides a plan."""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, MINE.replace("compile: off", 'compile: "off"')))
    assert (recipe.name, recipe.folder) == ("mine", Path("runs/mine"))
    pretrain, sft, report = recipe.stages
    assert pretrain.settings == {
        "size": "tiny",
        "tokens": "2e9",
        "eval.every": "80k",
        "eval.prompts": '["The", "A"]',
        "compile": "off",
        "deterministic": "true",
    }
    assert str(pretrain.slurm) == "account=lab,time=24:00:00,gpus=8"
    assert str(sft.slurm) == "account=lab,time=1:00:00"
    assert report.after == ("pretrain",)


def test_stages_become_commands_that_a_user_could_type(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, MINE.replace("compile: off", 'compile: "off"')))
    pretrain, sft, report = tasks(recipe)
    assert pretrain.shown == (
        'python train.py --size tiny --tokens 2e9 --eval.every 80k --eval.prompts \'["The", "A"]\' --compile off '
        "--deterministic true --run runs/mine/pretrain"
    )
    assert sft.shown == ("python -m sft runs/mine/pretrain/model --data alpaca=1,alpaca_zh=1 --run runs/mine/sft")
    assert report.shown == "python -m submit report runs/mine/sft"
    assert report.place.result == Path("runs/mine/sft/report.html")
    assert [one.name for one in report.waits_for] == ["sft", "pretrain"]


def test_values_can_be_others_for_once(tmp_path: Path) -> None:
    path = write(tmp_path, MINE.replace("compile: off", 'compile: "off"'))
    recipe = read_recipe(path, ["pretrain.tokens=20k", "sft.data=a=1,b=2", "folder=elsewhere", "slurm=account=x,qos=y"])
    assert recipe.stages[0].settings["tokens"] == "20k"
    assert recipe.stages[1].settings["data"] == "a=1,b=2"
    assert recipe.folder == Path("elsewhere")
    assert str(recipe.stages[0].slurm) == "account=x,time=24:00:00,gpus=8,qos=y"


def test_a_recipe_survives_being_written(tmp_path: Path) -> None:
    stages = (
        Stage("one", "train", {"size": "tiny", "compile": "off"}, (), Request({"gpus": "2"})),
        Stage("two", "sft", {"model": "${one}"}, ("one",)),
    )
    recipe = Recipe("some", tmp_path / "runs", stages, "h200", 2.5)
    again = read_recipe(write(tmp_path, to_yaml(recipe)))
    assert to_yaml(again) == to_yaml(recipe)
    assert [stage.settings for stage in again.stages] == [stage.settings for stage in stages]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("command: train", "command: trian", "stage pretrain: 'trian' is none of .*; did you mean train?"),
        ("size: tiny", "sise: tiny", "stage pretrain: .*--sise"),
        ("tokens: 2e9", "tokens: many", "stage pretrain: --tokens: 'many' is not a count"),
        ("tokens: 2e9", "tokens:", "tokens in the settings of stage pretrain has no value"),
        ("${pretrain}", "${pretraining}", "stage sft refers to 'pretraining'; before it stand pretrain"),
        ("[pretrain]", "[later]", "stage report refers to 'later'; before it stand pretrain, sft"),
        ("after: [pretrain]", "afer: [pretrain]", "'afer' is unknown: .*did you mean after?"),
        ("  sft:\n", "  pretrain:\n", "'pretrain' stands twice"),
        ("gpus=8", "gpu=8", "slurm of stage pretrain: 'gpu=8' is none of"),
        ("${sft.run}", "${sft.rum}", "run of stage report: .* is like neither"),
        ("name: mine", "name: a/b", "'a/b' is part of paths"),
        ("stages:", "stagse:", "'stagse' is unknown: .*did you mean stages?"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = MINE.replace("compile: off", 'compile: "off"')
    assert old in text
    with pytest.raises(UserError, match=said):
        tasks(read_recipe(write(tmp_path, text.replace(old, new))))


def test_yaml_s_own_false_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage pretrain: --compile: .*false"):
        tasks(read_recipe(write(tmp_path, MINE)))


@pytest.mark.parametrize("change", ["tokens=1", "other.tokens=1", "pretrain", "=1"])
def test_changes_that_change_nothing_are_refused(tmp_path: Path, change: str) -> None:
    with pytest.raises(UserError, match="change"):
        read_recipe(write(tmp_path, MINE), [change])


def test_what_makes_no_run_has_none(tmp_path: Path) -> None:
    text = (
        "stages:\n  words:\n    command: data tokenizer\n    settings: {data: sample}\n"
        '  report:\n    command: submit report\n    settings: {run: "${words.run}"}\n'
    )
    with pytest.raises(UserError, match="stage report: .*stage words makes no run, only runs/recipe/words"):
        tasks(read_recipe(write(tmp_path, text)))


def test_two_stages_cannot_make_the_same(tmp_path: Path) -> None:
    text = MINE.replace("compile: off", 'compile: "off"').replace(
        'alpaca_zh=1"', 'alpaca_zh=1", run: runs/mine/pretrain'
    )
    with pytest.raises(UserError, match="another stage makes runs/mine/pretrain/model too"):
        tasks(read_recipe(write(tmp_path, text)))


def test_a_setting_that_is_too_long_for_a_path_is_none(tmp_path: Path) -> None:
    prompts = ["A name of a file has 255 bytes at most. " * 7, "1/2 and 1/2 are"]
    text = MINE.replace("compile: off", 'compile: "off"').replace('["The", "A"]', json.dumps(prompts))
    every = tasks(read_recipe(write(tmp_path, text)))
    assert inputs(every[0], every) == {}


@pytest.mark.parametrize("word", ["true", "True"])
def test_recovery_s_run_lies_in_the_recipe_s_folder(tmp_path: Path, word: str) -> None:
    text = "stages:\n  prune:\n    command: pruning\n    settings: {model: m, ffn: 48}\n"
    (prune,) = tasks(read_recipe(write(tmp_path, text), [f"prune.recover={word}"]))
    assert prune.place.result == Path("runs/recipe/prune/recovered/model")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_can_be_run(path: Path) -> None:
    recipe = read_recipe(path)
    every = tasks(recipe)
    assert recipe.name == path.stem
    assert len(every) == len(recipe.stages)


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem != "demo"], ids=lambda path: path.stem)
def test_the_plan_in_a_recipe_is_what_the_arithmetic_says(path: Path, tmp_path: Path, monkeypatch) -> None:
    model = tmp_path / "Llama-3-8B"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA_3_8B))
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    written = [line.removeprefix("#   ") for line in lines if "GPU-hours" in line]
    assert written == plan(recipe, tasks(recipe))


def test_a_plan_needs_a_budget_that_is_known(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, MINE.replace("compile: off", 'compile: "off"')))
    with pytest.raises(UserError, match="stage sft: .*give it tokens"):
        plan(recipe, tasks(recipe))
