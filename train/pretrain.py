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
from common.files import cache_folder, new_folder, require_space
from common.run_folder import RunFolder
from data.loader import Loader, Order, merge_states
from data.packing import Batch, make_batch
from data.prepared import PreparedSource
from data.sources import Corpus
from data.tokenizer import Tokenizer, bytes_per_token, find_tokenizer, sample_texts, train_tokenizer
from models import budget
from models.hf import our_values
from models.hf_config import to_config
from models.sizes import ModelConfig
from models.transformer import Transformer, initial_weight
from train.device import choose_precision, compiles
from train.engine import Values
from train.evaluate import Evaluator
from train.launch import Place, cores_here
from train.model_folder import data_seen, generation_config, own_data
from train.optimizer import make_optimizers
from train.resume import Origin, adopt_stored, stored_shape
from train.scores import LoopScores
from train.settings import TrainSettings, model_config, resolve, run_name, run_path
from train.stage import Stage, known, open_stage

TOKENIZER_SAMPLE = 50_000_000
"""Bytes of text that the run's own tokenizer is trained on."""


@dataclass
class PackedRows:
    """The loader's rows as the loop takes them."""

    loader: Loader
    end: int

    def take(self, rows: int) -> Batch:
        """This rank's share of the next rows."""
        return make_batch(self.loader.take(rows), self.end)

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
    config = stored_shape(settings, run) or model_config(settings)
    settings = replace(resolve(settings, config, place.world_size), precision=choose_precision(settings, place))
    with open_stage(settings, config, place, run, init=settings.init) as stage:
        return _pretrain(stage)


def _pretrain(stage: Stage) -> signal.Signals | None:
    settings, config, run, job, console = stage.settings, stage.shape, stage.run, stage.job, stage.console
    assert isinstance(settings, TrainSettings)
    if job.rank == 0:
        _check_room(config, run)

    # Data: rank 0 first, for it fills the caches and trains the tokenizer
    with job.rank_zero_first():
        corpus = Corpus.open(settings.data)
        fingerprints = {source.name: source.fingerprint for source in corpus.sources}
        stage.check_data(fingerprints)
        if run.writes:
            _place_tokenizer(settings, config, corpus, run, stage.origin, console)
        tokenizer = Tokenizer(run.tokenizer)

    # Model
    engine = stage.engine(
        build=lambda: _build(config, stage),
        values=_first_values(stage.origin, config, settings.seed),
        make_optimizers=lambda raw: make_optimizers(raw, settings.optimizer, settings.precision),
    )

    # What the loop calls
    seq_len = known(settings.seq_len)
    workers = _workers(settings, corpus, stage.device, job.world_size)
    order = Order(corpus, tokenizer.folder, seq_len, settings.loader.streams, settings.seed, settings.skip_bad_shards)
    evaluate = Evaluator(stage, settings, corpus, tokenizer, engine.model, *_scores(stage, tokenizer, engine.raw))
    state = stage.state.get("loader")
    loader = Loader(order, workers=workers, rank=job.rank, world_size=job.world_size, state=state)

    def objective(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, nll = module(batch["inputs"], batch["positions"], batch["targets"], settings.model.z_loss)
        return loss, nll

    shares = zip(corpus.sources, corpus.weights, strict=True)
    return stage.train(
        engine,
        PackedRows(loader, tokenizer.end),
        objective,
        evaluate,
        evaluate_every=settings.eval.every,
        config=to_config(config, bos=tokenizer.begin, eos=tokenizer.end, pad=tokenizer.pad),
        fingerprints=fingerprints,
        generation=generation_config(tokenizer.begin, [tokenizer.end], tokenizer.pad),
        record={"stage": "pretrain", "parent": settings.init, "data": _data_seen(stage, corpus)},
        header={
            "parameters": f"{budget.parameters(config).total:,}",
            "data": ", ".join(f"{source.name} ({len(source.train)} shards, {share:.0%})" for source, share in shares)
            + f"; {workers} workers a device",
        },
        flops_per_token=budget.flops_per_token(config, seq_len),
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


def _data_seen(stage: Stage, corpus: Corpus) -> list[dict[str, Any]]:
    """What the weights had seen before this run, and its own data."""
    assert isinstance(stage.settings, TrainSettings)
    init = stage.settings.init
    before = stage.state["record"]["data"][:-1] if stage.state else data_seen(Path(init)) if init else []
    return [*before, own_data("pretrain", [source.origin for source in corpus.sources], corpus.weights)]


def _check_room(config: ModelConfig, run: RunFolder) -> None:
    """The checkpoints kept at one time and the model folder must fit, beside what is there already."""
    count = budget.parameters(config).total
    there = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    needed = 5 * 12 * count + 4 * count - there  # weights and two moments in fp32: three, one kept for good, one new
    require_space(run.path, max(needed, 16 * count), "this run (five checkpoints and the model)")


def _place_tokenizer(
    settings: TrainSettings, config: ModelConfig, corpus: Corpus, run: RunFolder, origin: Origin, console: Console
) -> None:
    """Put the run's tokenizer in its place: its own from before, the prepared data's, the given one, or a new one."""
    if run.config.exists() and (run.tokenizer / "tokenizer.json").exists():
        return
    given = find_tokenizer(settings.tokenizer, cache_folder()) if settings.tokenizer else origin.tokenizer
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


def _build(config: ModelConfig, stage: Stage) -> Transformer:
    """The model without weights."""
    raw = Transformer(config, seed=None)
    raw.checkpointing = stage.fit.checkpointing
    if compiles(stage.settings, stage.device):
        raw.compile_parts()
    return raw


def _first_values(origin: Origin, config: ModelConfig, seed: int) -> Values:
    """The weights that a run starts from: drawn by the seed, or those of a model folder.

    Those of a checkpoint are read later, each rank its part.
    """
    if origin.init is None or (origin.init / "state.json").exists():
        return lambda name, shape: initial_weight(name, shape, config, seed)
    return our_values(origin.init, config)


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
