"""Recovery as pruning hands it over: what comes back, what is recorded, when a run goes on."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from common import signals
from common.settings import Count
from data.prepare import prepare
from data.settings import Mix
from data.sources import is_c4, open_source
from data.tokenizer import Tokenizer
from models.hf_config import taken_shape
from pruning.frequency import count_tokens
from pruning.recover import adapters, recover, run_of, train_settings
from pruning.recover_settings import RecoverSettings
from pruning.vocabulary import choose_tokens, write_tokenizer
from tests.conftest import make_text
from train.launch import Place
from train.learning import LoraSettings
from train.pretrain import pretrain
from train.settings import EvalSettings, LogSettings, OptimizerSettings, TrainSettings
from train.teacher import Teacher

TOKENS = 48 * 512


@pytest.fixture(scope="module")
def dense(micro_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro model after some training."""
    run = tmp_path_factory.mktemp("dense") / "run"
    settings = TrainSettings(
        init=str(micro_model),
        data=Mix.parse(str(corpus)),
        tokens=Count(64 * 512),
        seq_len=Count(64),
        batch_tokens=Count(512),
        run=str(run),
        device="cpu",
        precision="32",
        optimizer=OptimizerSettings(lr=1e-2),
        eval=EvalSettings(every=Count(0)),
        log=LogSettings(tensorboard=False),
    )
    assert pretrain(settings, Place("alone", 0, 0, 1, 1)) is None
    return run / "model"


@pytest.fixture
def pruned(dense: Path, tmp_path: Path) -> Path:
    """The same with half of its feed-forward units."""
    return cut(dense, tmp_path / "pruned", 32)


def cut(folder: Path, out: Path, ffn: int) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj"):
            matrix = getattr(layer.mlp, name)
            matrix.weight.data = matrix.weight.data[:ffn].clone()
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, :ffn].clone()
    model.config.intermediate_size = ffn
    model.save_pretrained(out)
    Tokenizer(folder).copy_to(out)
    return out


def settings_of(data: Path, **changes: object) -> RecoverSettings:
    values = {"tokens": Count(TOKENS), "batch_tokens": Count(512), "lr": 3e-3, "train": "all"} | changes
    return RecoverSettings(data=Mix.parse(str(data)), **values)


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["val/loss"] for record in records if "val/loss" in record]


def starts(run: Path) -> list[int]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if record.get("event") == "start"]


def test_what_was_lost_comes_back(dense: Path, pruned: Path, corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recovered = recover(pruned, dense, settings_of(corpus), said.append, device="cpu")
    run = recovered.parent
    assert run == run_of(pruned)
    assert len(said) == 2
    assert f"--init {pruned} --teacher {dense}" in said[1]
    before, _, after = losses(run)
    whole = recover(dense, dense, settings_of(corpus, tokens=Count(512), lr=1e-9), said.append, device="cpu").parent
    print(f"dense {losses(whole)[0]:.3f}, pruned {before:.3f}, recovered {after:.3f}")
    assert before - after > 0.5 * (before - losses(whole)[0])
    assert taken_shape(recovered) == taken_shape(pruned)
    record = json.loads((recovered / "palmtop.json").read_text())
    assert (record["parent"], record["teacher"]) == (str(pruned), str(dense))
    assert record["outside_track_1"] is True  # a folder's text may be anything

    assert recover(pruned, dense, settings_of(corpus), said.append, device="cpu") == recovered
    assert starts(run) == [0, TOKENS // 512]  # it was finished
    cut(dense, pruned, 40)
    assert run_of(pruned) != run  # other weights under the same name are no run to go on with


def test_data_within_the_rules_is_told_from_others(pruned, dense, corpus: Path, tokenizer, tmp_path: Path) -> None:
    list(prepare(open_source(str(corpus)), tokenizer, tmp_path / "prepared", workers=0))
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    told = json.dumps(manifest).replace(json.dumps(str(corpus)), '"c4"')
    (tmp_path / "prepared" / "manifest.json").write_text(told)
    brief = settings_of(tmp_path / "prepared", tokens=Count(512))
    for calibrated, outside in ((False, False), (True, True)):
        (pruned / "palmtop.json").write_text(json.dumps({"outside_track_1": calibrated, "data": [{"stage": "prune"}]}))
        brief.run = str(tmp_path / f"run-{calibrated}")
        model = recover(pruned, dense, brief, lambda text: None, device="cpu")
        record = json.loads((model / "palmtop.json").read_text())
        assert record["outside_track_1"] is outside
        assert record["data"][0] == {"stage": "prune"}
    assert [is_c4(origin) for origin in ("c4", "c4:en", "/data/c4", "sample")] == [True, True, False, False]


def test_a_signal_ends_it_without_a_model(pruned: Path, dense: Path, corpus: Path) -> None:
    signals.install()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            recover(pruned, dense, settings_of(corpus), lambda text: None, device="cpu")
    finally:
        signals.clear()
    assert caught.value.code == 128 + signal.SIGTERM
    assert not (run_of(pruned) / "model").exists()


def test_a_cut_vocabulary_recovers(dense: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [make_text(random.Random(0), 500)]
    kept = choose_tokens(dense, 480, count_tokens(tokenizer, texts), rows=512)
    student = cut(dense, tmp_path / "student", 32)
    write_tokenizer(dense, kept, student, texts)
    model = AutoModelForCausalLM.from_pretrained(student)
    rows = model.model.embed_tokens.weight.data[kept].clone()
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    model.model.embed_tokens.weight.data.copy_(rows)
    model.save_pretrained(student)
    ids = Teacher.of(dense).ids_of(Tokenizer(student))
    assert ids.tolist() == json.loads((student / "kept_tokens.json").read_text())
    recovered = recover(student, dense, settings_of(corpus), lambda text: None, device="cpu")
    assert losses(recovered.parent)[-1] < losses(recovered.parent)[0]
    assert (recovered / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("changes", "tokens", "rank"),
    [
        ({}, 99_999, 16),
        ({}, 100_000, None),
        ({"train": "adapters"}, 1_000_000, 16),
        ({"train": "all"}, 1_000, None),
        ({"lora": LoraSettings(rank=4)}, 1_000, 4),
        ({"lora": LoraSettings(rank=4)}, 1_000_000, 4),
    ],
)
def test_few_tokens_train_adapters(changes: dict[str, Any], tokens: int, rank: int | None) -> None:
    assert adapters(RecoverSettings(**changes), tokens).rank == rank


def test_adapters_bring_back_half_of_it(pruned: Path, dense: Path, corpus: Path) -> None:
    def say(text: str) -> None:
        pass

    recovered = recover(pruned, dense, settings_of(corpus, train="adapters", lr=1e-2), say, device="cpu")
    before, _, after = losses(recovered.parent)
    whole = recover(dense, dense, settings_of(corpus, tokens=Count(512), lr=1e-9), say, device="cpu").parent
    print(f"dense {losses(whole)[0]:.3f}, pruned {before:.3f}, recovered {after:.3f}")
    assert before - after > 0.5 * (before - losses(whole)[0])
    assert taken_shape(recovered) == taken_shape(pruned)


def test_the_defaults_are_for_a_small_budget(pruned: Path, dense: Path, tmp_path: Path) -> None:
    settings = train_settings(pruned, dense, RecoverSettings(), tmp_path / "run", "cpu")
    assert str(settings.data) == "c4"
    assert settings.tokens == 81_920
    assert settings.lora.rank == 16  # few tokens, so adapters
    assert settings.seq_len == 64  # the model's context
    assert settings.schedule.decay == settings.tokens // 2
    with pytest.raises(ValueError, match="must be positive"):
        RecoverSettings(lr=0.0)
    with pytest.raises(ValueError, match="which train=all has none of"):
        RecoverSettings(train="all", lora=LoraSettings(rank=8))
    with pytest.raises(ValueError, match="at least 1"):
        RecoverSettings(tokens=Count(0))
