"""The command from its help to its last line."""

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

from data.tokenizer import Tokenizer
from pruning import __main__ as door
from pruning.shapes import Shape, parameters
from pruning.vocabulary import KEPT_FILE
from tests.conftest import Command, make_text, run_command, write_corpus
from tests.pruning.test_qwen1 import write_qwen
from tests.pruning.test_shapes import LLAMA_3, PHI_2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus large enough to calibrate on."""
    rng = random.Random(5)
    shards = [[make_text(rng, 60) for _ in range(80)] for _ in range(2)]
    return write_corpus(tmp_path_factory.mktemp("text"), shards, [make_text(rng, 60) for _ in range(6)])


@pytest.fixture(scope="module")
def curt_phi(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi that ends every answer at once, by the bias of its head: it is scored in seconds."""
    folder = tmp_path_factory.mktemp("curt") / "phi"
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
    model = PhiForCausalLM(config)
    model.lm_head.bias.data[tokenizer.end] = 100.0
    model.save_pretrained(folder)
    tokenizer.copy_to(folder)
    return folder


@pytest.fixture
def pruning(run_here: Command) -> Command:
    """The command in this process."""
    return partial(run_here, door.main)


def small(text: Path) -> list[str | Path]:
    return ["--calibration", text, "--tokens", "2k", "--seq-len", "64", "--measure", text, "--measure-tokens", "400"]


def test_help_is_quick_and_has_examples() -> None:
    done = run_command("-X", "importtime", "-m", "pruning", "--help")
    assert done.returncode == 0
    for line in (
        "--phone-memory PHONE_MEMORY",
        "--params 0.8 --calibration sample --score sample",
        "--recovery.tokens",
    ):
        assert line in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "tokenizers", "lightning", "datasets"}


def test_a_plan_needs_no_weights(tmp_path: Path, pruning: Command) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3))
    code, out, _ = pruning(tmp_path, "--phone-memory", "8GB", "--vocab", "keep", "--plan")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "tokens: 229376" in lines  # what 14,336 units ask for
    assert "shapes for 8 GB on the phone at 1,024 tokens, those to be tried numbered" in lines
    assert any(line.startswith("now 32 14,336 32 / 8 128,256 8,030,261,248 16.4 GB") for line in lines)
    assert any(line.startswith("try 1 25 5,632") and "(-52.3%)" in line for line in lines), out
    assert "more" in lines[-2]
    (tmp_path / "config.json").write_text(json.dumps(PHI_2))
    code, _, err = pruning(tmp_path, "--phone-memory", "8GB", "--plan")
    assert code == 2
    assert "error: the model fits as it is: 6.09 GB of the 8 GB" in err


def test_a_model_is_cut_by_a_shape(micro_model: Path, text: Path, tmp_path: Path, pruning: Command) -> None:
    code, out, _ = pruning(micro_model, "--ffn", "48", "--out", tmp_path / "out", *small(text))
    assert code == 0, out
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert Shape.of(values).ffn == 48
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    before, after = report["stages"]
    assert (before["name"], after["name"]) == ("before", "after")
    assert after["parameters"] == parameters(values, Shape.of(values))
    assert report["calibration"]["tokens"] == 2048
    assert report["calibration"]["outside_track_1"]
    assert f"model: {tmp_path / 'out'}" in out
    assert "feed-forward width" in out
    assert "calibrated on 2,048 tokens, seed 0: " in out
    assert "outside track 1's rules); cut in " in out
    assert f"last norm scaled by {report['sharpness']:.3f}" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == after["parameters"]


def test_the_best_of_several_shapes_is_kept(micro_model: Path, text: Path, tmp_path: Path, pruning: Command) -> None:
    words = ["--params", "0.8", "--rank", "2", "--out", tmp_path / "out", *small(text)]
    code, out, err = pruning(micro_model, *words)
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    bits = [trial["bits_per_byte"] for trial in report["trials"]]
    best = report["trials"][bits.index(min(bits))]
    assert len({trial["shape"]["vocab"] for trial in report["trials"]}) == 2
    assert best["shape"] == report["stages"][1]["shape"]
    assert {trial["tokens"] for trial in report["trials"]} == {512}  # of 2,048
    assert report["calibration"]["tokens"] == 2048
    assert "kept" in out
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_cut_vocabulary_gives_a_working_folder(
    micro_model: Path, text: Path, tmp_path: Path, pruning: Command
) -> None:
    words = ["--vocab", "320", "--repair", "false", "--out", tmp_path / "out", *small(text)]
    code, _, err = pruning(micro_model, *words)
    assert code == 0, err
    kept = json.loads((tmp_path / "out" / KEPT_FILE).read_text())
    whole, small_one = (AutoModelForCausalLM.from_pretrained(folder) for folder in (micro_model, tmp_path / "out"))
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (micro_model, tmp_path / "out"))
    words_kept = [token for token in range(320) if kept[token] != before.unk_token_id][20:50]
    with torch.no_grad():
        full = whole(torch.tensor([[kept[one] for one in words_kept]])).logits
        torch.testing.assert_close(small_one(torch.tensor([words_kept])).logits, full[..., kept])
    assert kept[after.eos_token_id] == before.eos_token_id
    assert small_one.config.eos_token_id == after.eos_token_id == small_one.generation_config.eos_token_id


def test_recovery_and_scores_follow(
    curt_phi: Path, text: Path, tmp_path: Path, pruning: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recovery = ["--recover", "--recovery.data", text, "--recovery.tokens", "2k", "--recovery.seq-len", "64"]
    scores = ["--score", "sample", "--score-limit", "1"]
    words = ["--ffn", "48", "--out", "out", *small(text), *recovery, *scores]
    code, out, err = pruning(curt_phi, *words)
    assert code == 0, err
    (recovered,) = tmp_path.glob("out-recovery-*/model")
    for folder in (tmp_path / "out", recovered):
        stages = json.loads((folder / "pruning.json").read_text())["stages"]
        assert [stage["name"] for stage in stages] == ["before", "after", "recovered"]
        assert all("gsm8k (sample, limit)" in stage["scores"] for stage in stages)
    assert Path(stages[2]["folder"]).absolute() == recovered
    assert "throughput, passes/s" in out
    assert f"next: python -m scoring {stages[2]['folder']}" in out


def test_other_weights_under_the_same_name_are_scored(
    curt_phi: Path, text: Path, tmp_path: Path, pruning: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ffn in ("48", "40"):
        words = ["--ffn", ffn, "--out", "out", *small(text), "--score", "sample", "--score-limit", "1"]
        code, _, err = pruning(curt_phi, *words)
        assert code == 0, err
    folders = sorted(path.relative_to("scores").parts[0] for path in Path("scores").glob("*/sample-limit1-*"))
    assert folders == ["out", "out", "phi"]


def test_scoring_that_fails_loses_nothing(
    micro_model: Path, text: Path, tmp_path: Path, pruning: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recovery = ["--recover", "--recovery.data", text, "--recovery.tokens", "2k", "--recovery.seq-len", "64"]
    scores = ["--score", "competition", "--score-data", text]  # holds no data of the competition
    code, out, err = pruning(micro_model, "--ffn", "48", "--out", "out", *small(text), *recovery, *scores)
    assert code == 2, err
    (recovered,) = tmp_path.glob("out-recovery-*/model")
    for folder in (tmp_path / "out", recovered):
        stages = json.loads((folder / "pruning.json").read_text())["stages"]
        assert [stage["name"] for stage in stages] == ["before", "after", "recovered"]
    assert "before after recovered" in [" ".join(line.split()) for line in out.splitlines()]


def test_bad_input_is_one_message_and_leaves_nothing(
    micro_model: Path, text: Path, tmp_path: Path, pruning: Command
) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(micro_model, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    qwen = write_qwen(tmp_path / "Qwen")
    others = tmp_path / "mine"
    others.mkdir()
    (others / "diary.txt").write_text("dear diary")
    trained = tmp_path / "trained"
    shutil.copytree(micro_model, trained)
    (trained / "palmtop.json").write_text('{"stage": "train"}')
    (trained / "pruning.json").write_text("{}")  # as recovery leaves it
    words = small(text)
    late: list[list[str | Path]] = [  # told once text is read or a Qwen is converted, and so after the settings
        [micro_model, "--ffn", "48", *words, "--tokens", "9M"],
        [micro_model, "--ffn", "48", *words, "--calibration", "nowhere"],
        ["import", micro_model, "--out", tmp_path / "q"],
    ]
    for asked, message in [
        ([micro_model], "give a target: --params 0.8"),
        (["--params", "0.8"], "give the model folder to cut"),
        ([micro_model, "--params", "1.2"], "--params: '1.2' is not a whole number"),
        ([micro_model, "--phone-memory", "much"], "--phone-memory: 'much' is no amount of memory"),
        ([micro_model, "--params", "0.8", "--phone-memory", "1GB"], "are two targets; give one"),
        ([tmp_path, "--params", "0.8"], "is no model folder: it has no config.json"),
        ([others / "diary.txt", "--params", "0.8"], "diary.txt is a file; give a model folder"),
        ([micro_model, "--params", "0.8", "--context", "100k"], "--context 100,000 is longer than the model's context"),
        ([micro_model, "--params", "0.8", "--context", "0"], "--context must be at least 1"),
        ([micro_model, "--params", "0.8", "--seq-len", "100k"], "--seq-len 100,000 is longer than the model's context"),
        ([micro_model, "--params", "0.01"], "no legal shape of this model meets 1.0% of the parameters; the nearest"),
        ([pickled, "--ffn", "48", *words], "has its weights only as pickle (pytorch_model.bin), which can run"),
        ([micro_model, "--ffn", "48", *words, "--tokens", "9M"], "too few"),
        ([micro_model, "--ffn", "48", *words, "--calibration", "nowhere"], "there is no source 'nowhere'"),
        ([micro_model, "--ffn", "48", *words, "--out", others], "was not made by this command; choose another --out"),
        ([micro_model, "--ffn", "48", *words, "--out", trained], "was not made by this command"),
        ([micro_model, "--ffn", "48", *words, "--out", micro_model], "is the model's own folder"),
        ([qwen, "--params", "0.8"], "first-generation Qwen, which runs code of its own; make it an equal Qwen2 first"),
        ([micro_model, "--params", "0.8", "--recovery.tokens", "5k"], "--recovery.* belongs to --recover"),
        ([micro_model, "--params", "0.8", "--score", "mmlu"], "--score mmlu is no suite"),
        ([micro_model, "--params", "0.8", "--score-data", text], "--score-data belongs to --score"),
        ([micro_model, "--params", "0.8", "--score-limit", "5"], "--score-limit belongs to --score"),
        ([micro_model, "--params", "0.8", "--score", "quick", "--score-data", "nowhere"], "nowhere is no folder"),
        ([micro_model, "--params", "0.8", "--score", "competition,sample"], "score one of them at a time"),
        (["import"], "give the folder of a first-generation Qwen"),
        (["import", micro_model, "--out", tmp_path / "q"], "is a Qwen3ForCausalLM, not a first-generation Qwen"),
        (["import", qwen, "--out", trained], "was not made by this command; choose another --out"),
    ]:  # fmt: skip
        out = [] if "--out" in asked or asked[0] == "import" else ["--out", tmp_path / "out"]
        code, said, err = pruning(*asked, *out)
        assert (code, err.count("\n")) == (2, 1), (asked, err)
        assert not said or asked in late, (asked, said)
        assert message in err, (message, err)
    assert {one.name for one in tmp_path.iterdir()} == {"pickled", "Qwen", "mine", "trained"}
    assert (others / "diary.txt").exists()


def test_a_qwen_is_imported_and_then_cut(text: Path, tmp_path: Path, pruning: Command) -> None:
    qwen = write_qwen(tmp_path / "Qwen")
    code, out, err = pruning("import", qwen)
    assert code == 0, err
    assert f"next: python -m pruning {tmp_path / 'Qwen-qwen2'}" in out
    assert pruning("import", qwen)[0] == 0  # its own folder it replaces
    words = ["--ffn", "40", *small(text), "--seq-len", "24", "--tokens", "1k"]
    code, out, err = pruning(tmp_path / "Qwen-qwen2", *words)
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "Qwen-qwen2-pruned").config.intermediate_size == 40
