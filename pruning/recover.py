"""Recovery: a pruned model learns from the model that it was cut from, on text, by train's own loop."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from common.files import write_json
from common.run_folder import RunFolder
from common.settings import Count
from data.sources import is_c4
from models.hf_config import taken_shape
from pruning.prune import outside_already
from pruning.recover_settings import RecoverSettings
from train.launch import Place
from train.learning import LoraSettings
from train.lora import digest_of
from train.pretrain import pretrain
from train.settings import (
    SEQ_LEN,
    CheckpointSettings,
    EvalSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
    run_path,
)

TOKENS = {"cpu": 81_920, "cuda": 50_000_000}
"""Of the default budget: minutes on a CPU, on a GPU hours for a few billion parameters."""

ROW = {"cpu": 512, "cuda": SEQ_LEN}
"""The longest default row: C4's documents have some 400 tokens, and a CPU pays for long rows in attention."""


ADAPTED = 100_000
"""Tokens below which adapters are trained by default. Of SmolLM2 without a third of its feed-forward units, 12 k tokens
and adapters of rank 16 brought a fifth of the lost log-perplexity back; 82 k of them a third, as all weights did in the
same time with 57 k."""

RANK = 16
"""Of adapters by default."""


def recover(
    pruned: Path, dense: Path, settings: RecoverSettings, say: Callable[[str], None], *, device: str = "auto"
) -> Path:
    """Train a pruned model folder with the whole one as teacher; returns the folder of the recovered model.

    The run is one of ``python train.py``, in one process; the same call again goes on with it where it stopped. Its
    model's ``palmtop.json`` says under ``outside_track_1`` whether any data of the cut or the recovery was not C4.

    Args:
        pruned: the student.
        dense: the teacher. It has the student's tokens, or more of them.
        settings: of the recovery.
        say: hears what is about to be done.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        UserError: anything that the user can put right.
        SystemExit: a signal stopped the training; with 128 + its number.
    """
    run = RunFolder(run_path(settings.run) if settings.run is not None else run_of(pruned))
    resolved = train_settings(pruned, dense, settings, run.path, device)
    say(f"recovering {pruned} with the teacher {dense} on {resolved.tokens:,} tokens of {resolved.data}")
    say(f"on more devices: python train.py --init {pruned} --teacher {dense} --data {resolved.data} --devices 8")
    stopped = pretrain(resolved, Place("alone", 0, 0, 1, 1))
    if stopped is not None:
        raise SystemExit(128 + stopped)
    _mark(run.model, pruned)
    return run.model


def run_of(pruned: Path) -> Path:
    """The default run folder. Other weights under the same name get another one: a run goes on with its own."""
    return pruned.absolute().with_name(f"{pruned.absolute().name}-recovery-{digest_of(pruned)[:8]}")


def train_settings(pruned: Path, dense: Path, settings: RecoverSettings, run: Path, device: str) -> TrainSettings:
    """The settings of the training run, with defaults for a budget that is small beside pre-training's.

    The learning rate falls over the second half. Validation on a fiftieth of the budget, at the start, in the middle
    and at the end; one checkpoint is kept.
    """
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    shape = taken_shape(pruned)
    tokens = settings.tokens or Count(TOKENS[kind])
    seq_len = settings.seq_len or Count(min(shape.context, ROW[kind]))
    return TrainSettings(
        init=str(pruned),
        teacher=str(dense),
        data=settings.data,
        tokens=tokens,
        seq_len=seq_len,
        batch_tokens=settings.batch_tokens,
        distill=settings.distill,
        lora=adapters(settings, tokens),
        run=str(run.absolute()),
        device=device,
        optimizer=OptimizerSettings(lr=settings.lr),
        schedule=ScheduleSettings(warmup=Count(tokens // 20), decay=Count(tokens // 2)),
        eval=EvalSettings(
            every=Count(max(1, tokens // 2)), tokens=Count(max(4 * seq_len, tokens // 50)), continuation=0
        ),
        checkpoint=CheckpointSettings(keep=1),
    )


def adapters(settings: RecoverSettings, tokens: int) -> LoraSettings:
    """The adapters of a recovery on so many tokens; without a rank, none."""
    few = settings.train == "auto" and tokens < ADAPTED
    if settings.lora.rank is None and (few or settings.train == "adapters"):
        return replace(settings.lora, rank=RANK)
    return settings.lora


def _mark(model: Path, pruned: Path) -> None:
    """Say in ``palmtop.json`` whether all data of the cut and of the recovery was C4, as track 1 asks."""
    record = json.loads((model / "palmtop.json").read_text(encoding="utf-8"))
    own = [source["source"] for source in record["data"][-1]["sources"]]
    outside = outside_already(pruned) or not all(map(is_c4, own))
    write_json(model / "palmtop.json", {**record, "outside_track_1": outside})
