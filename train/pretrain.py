"""Pre-training: build the parts, then fit."""

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.console import Console
from common.errors import UserError
from common.files import cache_folder, new_folder
from common.run_folder import RunFolder
from data.loader import Loader, Order, merge_states
from data.packing import Batch, Layout, make_batch
from data.prepared import PreparedSource
from data.sources import Corpus
from data.tokenizer import Tokenizer, bytes_per_token, find_tokenizer, sample_texts, train_tokenizer
from models import budget
from models.foreign import Architecture
from models.hf_config import to_config, with_rope_at_top
from models.sizes import ModelConfig
from models.transformer import initial_weight
from train.device import choose_precision
from train.engine import Values
from train.evaluate import Evaluator
from train.launch import Place, cores_here
from train.loop import Objective
from train.optimizer import make_optimizers
from train.records import generation_config, own_data, read_state, seen_before, stored_generation
from train.resume import Origin, adopt_stored, stored_model
from train.scores import LoopScores
from train.settings import TrainSettings, model_config, resolve, run_name, run_path
from train.stage import Stage, known, open_stage
from train.student import Student
from train.teacher import Teacher

TOKENIZER_SAMPLE = 50_000_000
"""Bytes of text that the run's own tokenizer is trained on."""


@dataclass
class PackedRows:
    """The loader's rows as the loop takes them."""

    loader: Loader
    end: int
    layout: Layout = "packed"

    def take(self, rows: int) -> Batch:
        """This rank's share of the next rows."""
        return make_batch(self.loader.take(rows), self.end, self.layout)

    def state(self) -> dict[str, Any]:
        """The loader's state."""
        return self.loader.state()

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of the run from those of its ranks."""
        return merge_states(states)

    def warnings(self, state: dict[str, Any]) -> list[str]:
        """The shards that the run has passed over."""
        bad = state["bad_shards"]
        return [f"{len(bad)} damaged shards passed over so far: {', '.join(bad)}"] if bad else []

    def close(self) -> None:
        """End the loader's processes."""
        self.loader.close()


def pretrain(settings: TrainSettings, place: Place) -> signal.Signals | None:
    """Train a model from text; returns the signal that stopped it, or None when it is finished.

    Args:
        settings: as given; resolved here.
        place: of this process in its job. Every rank calls this with the same settings.

    Raises:
        UserError: anything that the user can put right.
    """
    run = RunFolder(run_path(run_name(settings)), writes=place.rank == 0)
    # Read by all ranks before any of them writes.
    settings = adopt_stored(settings, run)
    architecture = _architecture(settings, stored_model(settings, run))
    settings = resolve(settings, architecture.shape, place.world_size, own=architecture.own is not None)
    settings = replace(settings, precision=choose_precision(settings, place))
    student = Student(architecture, settings.lora)
    teacher = None if settings.teacher is None else Teacher.of(Path(settings.teacher))
    taken = 0 if teacher is None else teacher.bytes(settings.precision)
    with open_stage(
        settings, architecture.shape, place, run, init=settings.init, trainable=student.trainable, taken=taken
    ) as stage:
        return _pretrain(stage, student, teacher)


def _pretrain(stage: Stage, student: Student, teacher: Teacher | None) -> signal.Signals | None:
    settings, config, run, job, console = stage.settings, stage.shape, stage.run, stage.job, stage.console
    assert isinstance(settings, TrainSettings)
    if job.rank == 0:
        student.require_space(run, settings)

    # Data: rank 0 first, for it fills the caches and trains the tokenizer
    with job.rank_zero_first():
        corpus = Corpus.open(settings.data)
        fingerprints = {source.name: source.fingerprint for source in corpus.sources}
        stage.check_data(fingerprints)
        if run.writes:
            _place_tokenizer(settings, config, corpus, run, stage.origin, console)
        tokenizer = Tokenizer(run.tokenizer)
    seq_len = known(settings.seq_len)
    if teacher is not None:
        teacher.check(tokenizer, seq_len)

    # Model
    adapters = None if settings.init is None else student.adapters(stage, settings.init)
    engine = stage.engine(
        build=lambda: student.build(stage),
        values=student.first_values(_weights(stage, student), settings.seed),
        make_optimizers=lambda raw: make_optimizers(raw, settings.optimizer, settings.precision),
    )
    objective = _likelihood(settings.model.z_loss) if student.architecture.own is not None else _likelihood()
    if teacher is not None:
        objective = teacher.distillation(tokenizer, settings.distill, stage.device, settings.precision)

    # What the loop calls
    workers = _workers(settings, corpus, stage.device, job.world_size)
    streams, layout = settings.loader.streams, settings.loader.layout
    order = Order(corpus, tokenizer.folder, seq_len, streams, settings.seed, settings.skip_bad_shards, layout)
    evaluate = Evaluator(stage, settings, corpus, tokenizer, engine.model, *_scores(stage, tokenizer, engine.raw))
    state = stage.state.get("loader")
    loader = Loader(order, workers=workers, rank=job.rank, world_size=job.world_size, state=state)
    shares = zip(corpus.sources, corpus.weights, strict=True)
    return stage.train(
        engine,
        PackedRows(loader, tokenizer.end, layout),
        objective,
        evaluate,
        evaluate_every=settings.eval.every,
        evaluate_first=bool(settings.eval.every and teacher),
        config=_config_values(settings, student.architecture, tokenizer),
        fingerprints=fingerprints,
        generation=_generation(stage, tokenizer),
        record={
            "stage": "pretrain",
            "parent": settings.init,
            "teacher": settings.teacher,
            "data": _data_seen(stage, corpus),
        },
        lora=adapters,
        header={
            "parameters": student.described,
            "data": ", ".join(f"{source.name} ({len(source.train)} shards, {share:.0%})" for source, share in shares)
            + f"; {workers} workers a device"
            + ("" if teacher is None else f"; and the teacher {teacher.folder}"),
        },
        flops_per_token=None if adapters else budget.flops_per_token(config, seq_len),
    )


def _scores(stage: Stage, tokenizer: Tokenizer, model: nn.Module) -> list[LoopScores]:
    """What scores in the loop, where that is asked for."""
    settings = stage.settings
    assert isinstance(settings, TrainSettings)
    if settings.eval.scores is None:
        return []
    batch, every, tokens = known(settings.batch_tokens), known(settings.eval.every), known(settings.tokens)
    scores = LoopScores(
        settings.eval.scores, stage, tokenizer, model, batch_tokens=batch, evaluate_every=every, tokens=tokens
    )
    return [scores]


def _architecture(settings: TrainSettings, stored: Path | None) -> Architecture:
    """The model of the checkpoint that the run goes on from, else of ``--init``, else of the size."""
    if stored is not None:
        return Architecture.of(stored)
    config = model_config(settings)
    if settings.init is None:
        return Architecture({}, config, config)  # its config.json has to wait for the tokenizer's ids
    init = Path(settings.init)
    if (init / "state.json").exists():
        if settings.lora.rank is not None:
            raise UserError(f"adapters need a model folder; make one: python train.py consolidate {init}")
        if read_state(init).get("lora") is not None:
            raise UserError(f"{init} holds adapters alone; make a model folder: python train.py consolidate {init}")
    found = Architecture.of(init)
    return found if found.own is None else replace(found, own=config)


def _likelihood(*z_loss: float) -> Objective:
    """The negative log-likelihood of the text; a weight of z-loss only for a model that has one."""

    def objective(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, nll = module(batch["inputs"], batch["positions"], batch["targets"], *z_loss)
        return loss, nll

    return objective


def _config_values(settings: TrainSettings, architecture: Architecture, tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``config.json`` of the model: that of ``--init``, whose special tokens stay those of its tokenizer."""
    if settings.init is None:
        return to_config(architecture.shape, bos=tokenizer.begin, eos=tokenizer.end, pad=tokenizer.pad)
    values = with_rope_at_top(architecture.values) | {"max_position_embeddings": architecture.shape.context}
    if settings.tokenizer is None:
        return values
    return values | {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}


def _generation(stage: Stage, tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``generation_config.json``, by the same rule."""
    if stage.state:
        return dict(stage.state["generation"])
    settings = stage.settings
    assert isinstance(settings, TrainSettings)
    before = {} if settings.init is None else stored_generation(Path(settings.init))
    if before and settings.tokenizer is None:
        return before
    return before | generation_config(tokenizer.begin, [tokenizer.end], tokenizer.pad)


def _data_seen(stage: Stage, corpus: Corpus) -> list[dict[str, Any]]:
    """What the weights had seen before this run, and its own data."""
    assert isinstance(stage.settings, TrainSettings)
    parents = [Path(folder) for folder in (stage.settings.init, stage.settings.teacher) if folder is not None]
    before = stage.state["record"]["data"][:-1] if stage.state else seen_before(parents)
    return [*before, own_data("pretrain", [source.origin for source in corpus.sources], corpus.weights)]


def _place_tokenizer(
    settings: TrainSettings, config: ModelConfig, corpus: Corpus, run: RunFolder, origin: Origin, console: Console
) -> None:
    """Put the run's tokenizer in its place: its own from before, the prepared data's, the given one, or a new one."""
    if run.config.exists() and (run.tokenizer / "tokenizer.json").exists():
        return
    named = settings.tokenizer or (settings.teacher if settings.init is None else None)
    given = find_tokenizer(named, cache_folder()) if named else origin.tokenizer
    for source in corpus.sources:
        if isinstance(source, PreparedSource):
            prepared = Tokenizer(source.tokenizer)
            if given is not None and prepared.digest != given.digest:
                raise UserError(
                    f"{source.name} was prepared with another tokenizer than {given.folder}; "
                    "leave --tokenizer out, or prepare the data with it"
                )
            given = prepared
    if given is None:
        console.say(f"training a tokenizer of {config.vocab:,} tokens on {TOKENIZER_SAMPLE / 1e6:.0f} MB of the corpus")
        texts = list(sample_texts(corpus, TOKENIZER_SAMPLE))
        given = train_tokenizer(texts, config.vocab, run.tokenizer)
        for language, (rate, on) in bytes_per_token(given, texts[:: len(texts) // 1000 + 1]).items():
            console.say(f"{rate:.2f} bytes a token in {language} ({on})")
    if given.vocab_size > config.vocab:
        raise UserError(
            f"the tokenizer in {given.folder} has {given.vocab_size:,} tokens, more than the {config.vocab:,} rows "
            f"of the model's embedding; "
            + (
                "these weights need their own"
                if settings.init
                else f"use --model.vocab {-(-given.vocab_size // 64) * 64}"
            )
        )
    _ = given.end  # says so now when the tokenizer has no end token
    if given.folder != run.tokenizer:
        with new_folder(run.tokenizer) as folder:
            given.copy_to(folder)


def _weights(stage: Stage, student: Student) -> Values:
    """The weights that a run starts from: drawn by the seed, or those of a model folder.

    Those of a checkpoint are read later, each rank its part; a checkpoint of adapters lacks those beside them.
    """
    settings, architecture = stage.settings, student.architecture
    assert isinstance(settings, TrainSettings)
    folder = stage.origin.init
    if student.lora.rank is not None:
        folder = Path(known(settings.init))
    if folder is None or (folder / "state.json").exists():
        return lambda name, shape: initial_weight(name, shape, architecture.shape, settings.seed)
    return architecture.read(folder)


def _workers(settings: TrainSettings, corpus: Corpus, device: torch.device, world: int) -> int:
    """As asked for; by default none on a CPU, whose cores the model needs, and none for prepared data."""
    if settings.loader.workers is not None:
        return settings.loader.workers
    if device.type == "cpu" or all(isinstance(source, PreparedSource) for source in corpus.sources):
        return 0
    ours = os.environ.get("SLURM_CPUS_PER_TASK")
    cores = int(ours) if ours else cores_here() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wanted = min(8, max(1, cores - 1))
    return max((count for count in range(1, wanted + 1) if settings.loader.streams % (world * count) == 0), default=0)
