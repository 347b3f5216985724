"""Pre-training: build the parts, then fit."""

import math
import os
import shutil
import signal
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from common.console import Console
from common.distributed import Job
from common.errors import UserError
from common.files import cache_folder, gigabytes, new_folder, require_space
from common.run_folder import RunFolder
from common.settings import to_dict, to_yaml
from data.loader import Loader, Order, merge_states
from data.packing import Batch, make_batch
from data.prepared import PreparedSource
from data.sources import Corpus
from data.tokenizer import Tokenizer, bytes_per_token, find_tokenizer, sample_texts, train_tokenizer
from models import budget
from models.hf import read_state
from models.hf_config import to_config
from models.sizes import ModelConfig
from models.transformer import Transformer, initial_weight
from train import checkpoint
from train.checkpoint import Checkpoints
from train.device import (
    choose_device,
    choose_fit,
    choose_precision,
    compiles,
    device_name,
    make_fabric,
)
from train.engine import Engine, Values, engine_for
from train.evaluate import Evaluator
from train.launch import Place, cores_here
from train.loop import Progress, Training, fit
from train.model_folder import data_seen, write_model_folder
from train.optimizer import make_optimizers
from train.plan import Fit, warn_if_too_big
from train.resume import Origin, adopt_stored, find_origin, stored_shape
from train.schedule import Schedule
from train.settings import TrainSettings, model_config, resolve, run_path

TOKENIZER_SAMPLE = 50_000_000
"""Bytes of text that the run's own tokenizer is trained on."""

Known = TypeVar("Known")


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


def pretrain(settings: TrainSettings, place: Place) -> signal.Signals | None:
    """Train a model from text; returns the signal that stopped it, or None when it is finished.

    Args:
        settings: as given; resolved here.
        place: of this process in its job. Every rank calls this with the same settings.

    Raises:
        UserError: anything that the user can put right.
    """
    run = RunFolder(run_path(settings), writes=place.rank == 0)
    # Read by all ranks before any of them writes.
    settings = adopt_stored(settings, run)
    config = stored_shape(settings, run) or model_config(settings)
    settings = replace(resolve(settings, config, place.world_size), precision=choose_precision(settings, place))
    device = choose_device(settings, place)
    fit_plan = choose_fit(settings, config, place, device)
    fabric = make_fabric(settings, place, fit_plan.strategy)
    job = Job.of_all()
    settings, config, fit_plan = job.broadcast((settings, config, fit_plan))
    with run.claimed():
        new = run.writes and {path.name for path in run.path.iterdir()} == {".lock"}  # nothing of anybody's is in it
        try:
            return _pretrain(settings, config, fit_plan, fabric, job, run, Console(rank=place.rank))
        except UserError:
            if new and not run.has_steps():
                shutil.rmtree(run.path)  # training never began
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is used up with --micro-batch {fit_plan.micro_rows}; give a smaller one, or "
                f"--activation-checkpointing full ({error})"
            ) from error


def _pretrain(
    settings: TrainSettings,
    config: ModelConfig,
    fit_plan: Fit,
    fabric: Fabric,
    job: Job,
    run: RunFolder,
    console: Console,
) -> signal.Signals | None:
    # Where the weights come from
    origin = job.broadcast(find_origin(settings, run, console.warn) if job.rank == 0 else Origin())
    state = {} if origin.checkpoint is None else checkpoint.read_state(origin.checkpoint)
    progress = Progress(state.get("step", 0), state.get("tokens", 0))
    if job.rank == 0:
        _check_room(config, run)
    console.settings(f"run {run.path}", to_dict(settings))
    too_big = warn_if_too_big(fit_plan)
    if too_big is not None:
        console.warn(too_big)

    # Data: rank 0 first, for it fills the caches and trains the tokenizer
    with job.rank_zero_first():
        corpus = Corpus.open(settings.data)
        fingerprints = {source.name: source.fingerprint for source in corpus.sources}
        if state and state["fingerprints"] != fingerprints:
            raise UserError(
                f"the shards of {settings.data} are not those the run began with; put them back, or start anew"
            )
        if run.writes:
            _place_tokenizer(settings, config, corpus, run, origin, console)
        tokenizer = Tokenizer(run.tokenizer)

    # Model
    device = fabric.device
    engine = engine_for(fabric)(
        fabric,
        job,
        build=lambda: _build(config, settings, fit_plan, device),
        values=_first_values(origin, config, settings.seed),
        make_optimizers=lambda raw: make_optimizers(raw, settings.optimizer, settings.precision),
        spike=settings.health.spike,
    )
    _load_weights(origin, engine, console)

    # What the loop calls
    batch_tokens, seq_len, tokens = known(settings.batch_tokens), known(settings.seq_len), known(settings.tokens)
    rows = batch_tokens // seq_len
    micro_rows = _micro_rows(settings, state, fit_plan, rows // job.world_size)
    workers = _workers(settings, corpus, device, job.world_size)
    order = Order(corpus, tokenizer.folder, seq_len, settings.loader.streams, settings.seed, settings.skip_bad_shards)
    evaluate = Evaluator(settings, corpus, tokenizer, engine.model, run, console, micro_rows, device, job)
    loader = Loader(order, workers=workers, rank=job.rank, world_size=job.world_size, state=state.get("loader"))
    schedule = Schedule.of(settings)
    decay_step = schedule.decay_start // batch_tokens
    data = data_seen(settings, corpus, state)

    def keep_for_good(step: int) -> bool:
        return step == decay_step or (settings.keep_every is not None and step % settings.keep_every == 0)

    checkpoints = Checkpoints(run.checkpoints, settings.checkpoint.keep, keep_for_good, Job.of_all())

    def objective(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, nll = module(batch["inputs"], batch["positions"], batch["targets"], settings.model.z_loss)
        return loss, nll

    def save(at: Progress, wait: bool) -> None:
        taken = merge_states(job.gather(loader.state()))
        values = {
            "tokens": at.tokens,
            "loader": taken,
            "micro_rows": micro_rows,
            "fingerprints": fingerprints,
            "data": data,
            "settings": to_dict(settings),
        }
        shape = to_config(config, bos=tokenizer.begin, eos=tokenizer.end, pad=tokenizer.pad)
        wait = wait or not engine.asynchronous
        checkpoints.save(at.step, engine.tensors_to_save(), values, shape, wait=wait)
        if taken["bad_shards"]:
            names = ", ".join(taken["bad_shards"])
            console.warn(f"{len(taken['bad_shards'])} damaged shards passed over so far: {names}")

    peak = budget.peak_flops(device_name(device)) if device.type == "cuda" else None
    flops = budget.flops_per_token(config, seq_len)
    training = Training(
        engine=engine,
        batches=PackedRows(loader, tokenizer.end),
        objective=objective,
        rate=schedule.rate,
        run=run,
        console=console,
        tokens=tokens,
        rows=rows,
        micro_rows=micro_rows,
        seq_len=seq_len,
        clip=settings.optimizer.clip,
        log_every=settings.log.every,
        evaluate=evaluate,
        evaluate_every=max(1, round(settings.eval.every / batch_tokens)) if settings.eval.every else 0,
        save=save,
        save_every=known(settings.checkpoint.every),
        save_seconds=60 * settings.checkpoint.minutes,
        save_at=keep_for_good,
        patience=settings.health.patience,
        flops_per_token=flops,
        peak_flops=peak,
        progress=progress,
    )
    parameters = budget.parameters(config).total
    _show_header(training, parameters, corpus, fit_plan, settings.precision, workers, console)
    _warn_of_decay(state, settings, run, console)

    # Train. Only from here on is anything of an earlier attempt changed.
    if job.rank == 0:
        if origin.checkpoint is not None:
            checkpoints.set_aside_after(progress.step)
        run.rewind(progress.step if origin.checkpoint is not None else -1)
        run.begin(to_yaml(settings))
    run.start_metrics(progress.step, progress.tokens, tensorboard=settings.log.tensorboard)
    job.barrier()
    try:
        stopped = fit(training)
        checkpoints.wait()
    except UserError:
        checkpoints.finish()
        raise
    finally:
        loader.close()
        run.close()
    if stopped is None:
        if job.rank == 0:
            write_model_folder(run.model, run.checkpoints / f"step-{progress.step:07d}", tokenizer)
        job.barrier()
        console.say(f"trained on {progress.tokens:,} tokens in {progress.step:,} steps")
        console.say(f"model: {run.model}\nlook:  tensorboard --logdir {run.path}")
    else:  # without a model folder: whoever sent the signal may not wait for it
        console.say(
            f"stopped by {stopped.name} after step {progress.step:,}; to go on: the same with --run {settings.run}\n"
            f"a model folder of it: python train.py consolidate {run.path}"
        )
    return stopped


def known(value: Known | None) -> Known:
    """A setting that resolving has filled in."""
    assert value is not None
    return value


def _show_header(
    training: Training,
    parameters: int,
    corpus: Corpus,
    fit_plan: Fit,
    precision: str,
    workers: int,
    console: Console,
) -> None:
    """What is about to be trained, on what."""
    t, job, device = training, training.engine.job, training.engine.device
    sources = zip(corpus.sources, corpus.weights, strict=True)
    peak, flops = t.peak_flops, known(t.flops_per_token)
    console.table(
        "",
        {
            "parameters": f"{parameters:,}",
            "data": ", ".join(f"{source.name} ({len(source.train)} shards, {share:.0%})" for source, share in sources),
            "batch": f"{t.batch_tokens:,} tokens = {t.rows} rows of {t.seq_len}, {t.micro_rows} at a time",
            "steps": f"{math.ceil(t.tokens / t.batch_tokens):,}, starting after {t.progress.step:,}",
            "devices": f"{job.world_size} × {device_name(device)}, {precision}, {workers} data workers each",
            "strategy": f"{fit_plan.strategy}, activation checkpointing {fit_plan.checkpointing}, "
            f"{gigabytes(fit_plan.memory.total)} a device by the plan",
            "FLOPs per token": f"{flops / 1e6:,.0f} M = 6·(parameters without input embedding) + 12·L·H·N·T; "
            + (f"MFU against {peak / 1e12:,.0f} TFLOP/s dense bf16" if peak else "no peak is known, so no MFU"),
        },
    )
    if device.type == "cuda" and job.world_size == 1 and torch.cuda.device_count() > 1:
        console.say(f"one of {torch.cuda.device_count()} GPUs is used; --devices {torch.cuda.device_count()} takes all")


def _check_room(config: ModelConfig, run: RunFolder) -> None:
    """The checkpoints kept at one time and the model folder must fit, beside what is there already."""
    count = budget.parameters(config).total
    there = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    needed = 5 * 12 * count + 4 * count - there  # weights and two moments in fp32: three, one kept for good, one new
    require_space(run.path, max(needed, 16 * count), "this run (five checkpoints and the model)")


def _warn_of_decay(state: dict[str, Any], settings: TrainSettings, run: RunFolder, console: Console) -> None:
    """Say so when a larger budget raises a learning rate that had begun to decay."""
    before = state.get("settings")
    if before is None or before["tokens"] == settings.tokens or before["schedule"]["name"] != "wsd":
        return
    start = (before["tokens"] - before["schedule"]["decay"]) // before["batch_tokens"]
    if state["step"] > start:
        kept = run.checkpoints / f"step-{start:07d}"
        console.warn(
            f"the learning rate had been decaying since step {start:,} and now rises again; to go on from before "
            f"the decay: --resume {kept}"
        )


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


def _build(config: ModelConfig, settings: TrainSettings, fit_plan: Fit, device: torch.device) -> Transformer:
    """The model without weights."""
    raw = Transformer(config, seed=None)
    raw.checkpointing = fit_plan.checkpointing
    if compiles(settings, device):
        raw.compile_parts()
    return raw


def _first_values(origin: Origin, config: ModelConfig, seed: int) -> Values:
    """The weights that a run starts from: drawn by the seed, or those of a model folder.

    Those of a checkpoint are read later, each rank its part.
    """
    if origin.init is None or (origin.init / "state.json").exists():
        return lambda name, shape: initial_weight(name, shape, config, seed)
    weights, folder = read_state(origin.init, config), origin.init

    def value(name: str, shape: torch.Size) -> Tensor:
        if weights[name].shape != shape:
            raise UserError(
                f"the weights of {folder} do not have the shapes of its config.json: {name} is "
                f"{tuple(weights[name].shape)}, expected {tuple(shape)}"
            )
        return weights[name]

    return value


def _load_weights(origin: Origin, engine: Engine, console: Console) -> None:
    """Read what the run goes on from; nothing for a new one."""
    group = engine.job.group
    if origin.checkpoint is not None:
        checkpoint.load(origin.checkpoint, engine.tensors_to_load, verified=origin.verified, group=group)
        engine.loaded()
        console.say(f"going on from {origin.checkpoint}")
    elif origin.init is not None:
        if (origin.init / "state.json").exists():
            checkpoint.load(origin.init, lambda stored: engine.weights_to_load(), group=group)
            engine.loaded()
        console.say(f"starting from the weights of {origin.init}")


def _micro_rows(settings: TrainSettings, state: dict[str, Any], fit_plan: Fit, share: int) -> int:
    """Rows in a forward pass: as asked for, else as before where the plan allows as many, else by the plan."""
    before = state.get("micro_rows")
    if settings.micro_batch is None and before is not None and before <= fit_plan.micro_rows and share % before == 0:
        return int(before)
    return fit_plan.micro_rows


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
