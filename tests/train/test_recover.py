"""Pre-training that recovers a model: with a teacher, of models from elsewhere, through adapters."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from common import signals
from common.errors import UserError
from common.settings import parse
from data.tokenizer import Tokenizer, save_tokenizer
from models import budget
from models.hf import WeightFiles
from models.hf_config import taken_shape
from tests.conftest import kill_and_resume
from tests.models.test_foreign import SCALED, write_folder
from train.__main__ import main
from train.learning import DistillSettings, LoraSettings
from train.plan import Machine, gb
from train.plan_table import describe, machine_of
from train.settings import TrainCommand, model_config, resolve, trains_ours
from train.student import Student
from train.teacher import Teacher

BRIEF = """--batch-tokens 512 --seq-len 32 --log.every 1 --log.tensorboard false --device cpu --precision 32
--loader.streams 4 --eval.tokens 1000 --eval.continuation 2 --optimizer.lr 3e-3""".split()


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Run the training command in this process; returns the run folder."""

    def run(*words: str | Path | int, name: str = "run") -> Path:
        monkeypatch.setattr("sys.argv", ["train.py", "--run", str(tmp_path / name), *BRIEF, *map(str, words)])
        try:
            main()
        finally:
            signals.clear()
        return tmp_path / name

    return run


@pytest.fixture(scope="session")
def foreign(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    """Model folders of other architectures with the tests' tokenizer."""
    base = tmp_path_factory.mktemp("foreign")

    def folder(kind: str) -> Path:
        if not (base / kind).exists():
            write_folder(kind, base / kind, vocab_size=512)
            tokenizer.copy_to(base / kind)
        return base / kind

    return folder


def losses(run: Path) -> list[float]:
    """Validation losses."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["val/loss"] for record in records if "val/loss" in record]


def test_a_teacher_is_learned_from(train, corpus: Path, micro_model: Path) -> None:
    teacher = train("--init", micro_model, "--data", corpus, "--tokens", 40 * 512, "--eval.every", 0, name="teacher")
    words = ("--init", micro_model, "--data", corpus, "--teacher", teacher / "model", "--distill.weight", 1)
    run = train(*words, "--tokens", 20 * 512, "--eval.every", 10 * 512)
    start, middle, end = losses(run)  # of what it started from, too
    print(f"validation loss {start:.3f} → {middle:.3f} → {end:.3f}")
    assert end < middle < start - 0.3
    record = json.loads((run / "model" / "palmtop.json").read_text())
    assert (record["parent"], record["teacher"]) == (str(micro_model), str(teacher / "model"))
    seen = {"stage": "pretrain", "sources": [{"source": str(corpus), "weight": 1.0}]}
    assert record["data"] == [{"stage": "unknown", "from": str(micro_model)}, seen, seen]


def test_a_model_that_starts_from_nothing_takes_its_teachers_tokenizer(train, corpus, micro_model, tokenizer) -> None:
    words = ("--size", "tiny", "--model.vocab", 512, "--teacher", micro_model, "--data", corpus, "--eval.every", 0)
    run = train(*words, "--tokens", 512)
    assert Tokenizer(run / "model").digest == tokenizer.digest


@pytest.mark.parametrize("kind", ["qwen2", "phi", "llama"])
def test_a_foreign_model_goes_on(kind: str, train, foreign, corpus: Path) -> None:
    folder = foreign(kind)
    generation = {"eos_token_id": [2, 3], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    words = ("--data", corpus, "--teacher", folder, "--tokens", 10 * 512, "--eval.every", 10 * 512)
    run = train("--init", folder, *words)
    assert losses(run)[1] < losses(run)[0] - 0.3
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, run / "model"))
    assert before.items() <= after.items()
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"]
    assert kind != "llama" or after["rope_scaling"].items() <= SCALED.items()
    assert json.loads((run / "model" / "generation_config.json").read_text()) == generation
    _, found = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not any(found.values())


def test_adapters_are_merged_into_the_model_that_was_validated(train, foreign, corpus: Path, micro_model) -> None:
    for name, folder in (("ours", micro_model), ("foreign", foreign("phi"))):
        words = ("--data", corpus, "--teacher", folder, "--distill.weight", 0.1, "--eval.every", 10 * 512)
        run = train("--init", folder, *words, "--lora.rank", 4, "--tokens", 10 * 512, name=name)
        again = train("--init", run / "model", *words, "--tokens", 512, name=f"{name}-again")
        print(f"{name}: {losses(run)[0]:.4f} → {losses(run)[-1]:.6f}, as a model folder {losses(again)[0]:.6f}")
        assert losses(run)[-1] < losses(run)[0]
        assert losses(again)[0] == pytest.approx(losses(run)[-1], rel=1e-5)
        saved = next((run / "checkpoints").glob("step-*"))
        weights = sum(path.stat().st_size for path in (folder).glob("*.safetensors"))
        assert sum(path.stat().st_size for path in saved.glob("*.distcp")) < 3 * weights  # else weights and moments


def test_a_bf16_model_stays_one(train, foreign, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    model = AutoModelForCausalLM.from_pretrained(foreign("qwen2"), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    Tokenizer(foreign("qwen2")).copy_to(folder)
    run = train("--init", folder, "--data", corpus, "--tokens", 512, "--eval.every", 0)
    files = WeightFiles(run / "model")
    assert {files.read(name).dtype for name in files.names} == {torch.bfloat16}
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_killed_recovery_goes_on_exactly(foreign, corpus: Path, micro_model: Path, tmp_path: Path) -> None:
    words = ["--init", foreign("phi"), "--data", corpus, "--teacher", micro_model, "--lora.rank", 4]
    argv = [*BRIEF, *map(str, words), "--tokens", str(16 * 512), "--eval.every", str(8 * 512)]
    killed = {"run": str(tmp_path / "killed"), "argv": []}
    attempts = [{"run": str(tmp_path / "whole"), "argv": []}, {**killed, "step": 5, "signal": "SIGKILL"}, killed]
    ends = kill_and_resume({"argv": [*argv, "--checkpoint.every", "2"], "attempts": attempts})
    assert [end["codes"] for end in ends] == [[0], [-9], [0]], ends[-1]["log"][-3000:]
    whole, resumed = tmp_path / "whole", tmp_path / "killed"
    assert losses(resumed) == losses(whole)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]


def renumbered(tokenizer: Tokenizer, folder: Path, size: int) -> list[int]:
    """Write a tokenizer with the first ``size`` tokens of another, in the opposite order; returns their old ids."""
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token: size - 1 - number for token, number in content["model"]["vocab"].items() if number < size}
    merges = [pair for pair in content["model"]["merges"] if "".join(pair) in vocab]
    content["model"] |= {"vocab": vocab, "merges": merges}
    content["added_tokens"] = [one | {"id": size - 1 - one["id"]} for one in content["added_tokens"]]
    folder.mkdir()
    save_tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), folder)
    return list(range(size))[::-1]


def with_rows(folder: Path, rows: list[int], tokenizer: Path, out: Path) -> None:
    """A model folder with some rows of the embedding of another."""
    shutil.copytree(folder, out)
    model = AutoModelForCausalLM.from_pretrained(folder)
    matrix = model.model.embed_tokens.weight.data[rows].clone()
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    model.model.embed_tokens.weight.data.copy_(matrix)
    model.save_pretrained(out)
    Tokenizer(tokenizer).copy_to(out)


def test_a_teacher_speaks_the_tokens_of_a_cut_vocabulary(micro_model: Path, tokenizer, tmp_path: Path) -> None:
    rows = renumbered(tokenizer, tmp_path / "small", 450)
    with_rows(micro_model, rows, tmp_path / "small", tmp_path / "student")
    student, small, cpu = Teacher.of(tmp_path / "student"), Tokenizer(tmp_path / "small"), torch.device("cpu")
    teacher = Teacher.of(micro_model)
    teacher.check(small, 64)
    assert teacher.ids_of(small).tolist() == rows
    assert teacher.ids_of(Tokenizer(micro_model)) is None
    tokens = torch.randint(450, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"inputs": tokens, "positions": torch.arange(12).expand(2, 12), "targets": tokens.roll(-1, 1)}
    distillation = teacher.distillation(small, DistillSettings(), cpu, "32")
    nll, divergence = distillation.figures(student.load(cpu, "32"), batch)
    # The teacher's distribution over the student's tokens is the student's own: the same weights in other rows.
    assert divergence.item() == pytest.approx(0, abs=1e-4)
    assert nll.item() > 24
    with pytest.raises(
        UserError, match="has another tokenizer than the model in .*, whose token '.*' it does not know"
    ):
        student.check(Tokenizer(micro_model), 64)
    with pytest.raises(UserError, match="rows of 65 tokens are longer than the teacher's context of 64"):
        teacher.check(small, 65)


def test_a_cut_vocabulary_trains(train, corpus, micro_model: Path, tokenizer, tmp_path: Path) -> None:
    rows = renumbered(tokenizer, tmp_path / "small", 450)
    with_rows(micro_model, rows, tmp_path / "small", tmp_path / "student")
    words = ("--data", corpus, "--teacher", micro_model, "--tokens", 10 * 512, "--eval.every", 10 * 512)
    run = train("--init", tmp_path / "student", *words, "--distill.weight", 0.2)
    assert losses(run)[1] < losses(run)[0] - 0.3
    assert taken_shape(run / "model").vocab == 450


def test_the_plan_counts_teacher_and_adapters(foreign, micro_model: Path) -> None:
    words = ["--init", str(foreign("phi")), "--teacher", str(micro_model), "--lora.rank", "4", "--gpu", "h100-80g"]
    command = parse(TrainCommand, [*words, "--plan"], prog="", description="")
    config = model_config(command)
    settings = resolve(command, config, own=trains_ours(command))
    machine, why = machine_of(command)
    assert isinstance(machine, Machine)
    rows = {row.name: row.value for section in describe(settings, config, machine, why=why) for row in section.rows}
    assert rows["the teacher"] == gb(2 * budget.parameters(taken_shape(micro_model)).total)
    assert rows["a checkpoint"] == gb(12 * budget.adapter_parameters(config, 4))
    whole = parse(TrainCommand, ["--init", str(micro_model), "--plan"], prog="", description="")
    names = {row.name for section in describe(resolve(whole, config), config, machine) for row in section.rows}
    assert "the teacher" not in names


def test_adapters_are_counted_as_they_are(micro_model: Path) -> None:
    teacher = Teacher.of(micro_model)
    student = Student(teacher.architecture, LoraSettings(rank=4, alpha=8))
    assert student.trainable == budget.adapter_parameters(taken_shape(micro_model), 4)
    assert student.parameters == student.trainable + budget.parameters(taken_shape(micro_model)).total


def test_a_recovery_has_defaults_of_its_own(micro_model: Path) -> None:
    words = ["--init", str(micro_model), "--teacher", str(micro_model), "--tokens", "48k"]
    settings = parse(TrainCommand, words, prog="", description="")
    config = model_config(settings)
    resolved = resolve(settings, config)
    assert resolved.batch_tokens == 384
    assert resolve(parse(TrainCommand, [*words[:-1], "50M"], prog="", description=""), config).batch_tokens == 2**15
    assert resolved.optimizer.lr == pytest.approx(2e-5 * 4096 / 32)


@pytest.fixture
def fails(train, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail with exit code 2, one message and nothing left; returns the message."""

    def run(*words: str | Path | int) -> str:
        with pytest.raises(SystemExit) as caught:
            train(*words)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("error: ")
        assert not (tmp_path / "run").exists()
        return error

    return run


def test_bad_input_is_one_clear_message(fails, train, foreign, corpus: Path, micro_model, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(micro_model, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8").replace("<|reserved_0|>", "<|renamed|>")
    (other / "tokenizer.json").write_text(text, encoding="utf-8")
    phi, data = foreign("phi"), ("--data", corpus, "--tokens", 512)
    run = train("--init", micro_model, *data, "--eval.every", 0, "--lora.rank", 2, name="adapters")
    checkpoint = next((run / "checkpoints").glob("step-*"))
    for words, shown in (
        (["--init", other, "--teacher", micro_model], "has another tokenizer"),
        (["--init", micro_model, "--teacher", tmp_path / "none"], "is no model folder"),
        (["--init", micro_model, "--distill.weight", "0.9"], "belong to --teacher"),
        (["--lora.rank", 2], "trains adapters beside the weights of --init"),
        (["--init", phi, "--seq-len", 128], "longer than the context of --init, 64"),
        (["--init", phi, "--optimizer.name", "muon"], "muon trains whole matrices of our own models"),
        (
            ["--init", micro_model, "--lora.rank", 2, "--strategy", "deepspeed-2"],
            "without adapters; use --strategy fsdp",
        ),
        (["--init", phi, "--model.z-loss", "0.1"], "leave it out"),
        (["--init", micro_model, "--teacher", phi, "--model.z-loss", "0.1"], "without a teacher"),
        (["--init", checkpoint, "--lora.rank", 2], "adapters need a model folder"),
        (["--init", checkpoint], "holds adapters alone; make a model folder"),
    ):
        assert shown in fails(*data, *words), words
