"""What every stage that trains does around the loop: meet, claim the run folder, go on where it stopped, save, end.

A stage brings its model, its rows, its objective and its evaluation; :mod:`train.pretrain` is one, fine-tuning
another.
"""

import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from common.console import Console
from common.distributed import Job
from common.errors import UserError
from common.files import gigabytes
from common.run_folder import RunFolder
from common.settings import to_dict, to_yaml
from data.tokenizer import Tokenizer
from models import budget
from models.sizes import ModelConfig
from train import checkpoint, float8
from train.allocator import freed_memory_kept
from train.checkpoint import Checkpoints
from train.device import choose_device, choose_fit, device_name, make_fabric
from train.engine import Engine, MakeOptimizers, Values, engine_for
from train.fabric import Fabric
from train.launch import Place
from train.loop import Batches, Evaluate, Objective, Progress, Training, fit
from train.model_folder import write_model_folder
from train.plan import Fit, warn_if_too_big
from train.records import read_state
from train.resume import Origin, find_origin
from train.schedule import Schedule, decay_start
from train.settings import RunSettings

Known = TypeVar("Known")


@dataclass
class Stage:
    """A run that is about to train."""

    settings: RunSettings
    """Resolved."""
    shape: ModelConfig
    """Of the model, for the arithmetic of memory and FLOPs."""
    fit: Fit
    """How the run is spread."""
    fabric: Fabric
    job: Job
    run: RunFolder
    console: Console
    origin: Origin
    """Where the weights come from."""
    state: dict[str, Any]
    """Of the checkpoint that the run goes on from; empty for a new run."""
    progress: Progress

    @property
    def device(self) -> torch.device:
        """This rank's."""
        return self.fabric.device

    @property
    def rows(self) -> int:
        """In a global batch."""
        return known(self.settings.batch_tokens) // known(self.settings.seq_len)

    @property
    def micro_rows(self) -> int:
        """In a forward pass: as asked for, else as before where the plan allows as many, else by the plan."""
        before: int = self.state.get("micro_rows", 0)
        share = self.rows // self.job.world_size
        goes_on = self.settings.micro_batch is None and 0 < before <= self.fit.micro_rows and share % before == 0
        return before if goes_on else self.fit.micro_rows

    def check_data(self, fingerprints: dict[str, str]) -> None:
        """UserError when the run goes on with other data than it began with."""
        if self.state and self.state["fingerprints"] != fingerprints:
            raise UserError("the data are not those the run began with; put them back, or start anew")

    def engine(self, build: Callable[[], nn.Module], values: Values, make_optimizers: MakeOptimizers) -> Engine:
        """The model on its devices, with the weights that the run goes on from; see :class:`train.engine.Engine`."""
        spike = self.settings.health.spike
        engine = engine_for(self.fabric)(self.fabric, self.job, build, values, make_optimizers, spike)
        group, origin = self.job.group, self.origin
        if origin.checkpoint is not None:
            checkpoint.load(origin.checkpoint, engine.tensors_to_load, verified=origin.verified, group=group)
            engine.loaded()
            self.console.say(f"going on from {origin.checkpoint}")
        elif origin.init is not None:
            if (origin.init / "state.json").exists():
                checkpoint.load(origin.init, lambda stored: engine.weights_to_load(), group=group)
                engine.loaded()
            self.console.say(f"starting from the weights of {origin.init}")
        return engine

    def train(
        self,
        engine: Engine,
        batches: Batches,
        objective: Objective,
        evaluate: Evaluate,
        *,
        evaluate_every: int | None,
        evaluate_first: bool = False,
        config: dict[str, Any],
        fingerprints: dict[str, str],
        generation: dict[str, Any],
        record: dict[str, Any],
        lora: dict[str, Any] | None = None,
        header: dict[str, str],
        flops_per_token: float | None,
    ) -> signal.Signals | None:
        """Train and leave a model folder; returns the signal that stopped the run, or None when it is finished.

        Args:
            engine: from :meth:`engine`.
            batches: the rows, closed at the end.
            objective: the loss.
            evaluate: called with the step.
            evaluate_every: tokens between evaluations; 0 never.
            evaluate_first: evaluate what the run starts from, too.
            config: the ``config.json`` of checkpoints and of the model folder.
            fingerprints: of the data, see :meth:`check_data`.
            generation: the ``generation_config.json`` of the model folder.
            record: what ``palmtop.json`` tells beside the state of the run: where the model is from, and all of its
                data under ``data``.
            lora: where only adapters are trained, their ``base`` folder with the ``digest`` of its weights, and their
                ``scale``.
            header: what is trained, first lines of the table that is shown.
            flops_per_token: for MFU; None leaves it out.
        """
        settings, job, run, console, progress = self.settings, self.job, self.run, self.console, self.progress
        schedule, batch_tokens = Schedule.of(settings), known(settings.batch_tokens)
        decay_step = schedule.decay_start // batch_tokens

        def keep_for_good(step: int) -> bool:
            return step == decay_step or (settings.keep_every is not None and step % settings.keep_every == 0)

        checkpoints = Checkpoints(run.checkpoints, settings.checkpoint.keep, keep_for_good, Job.of_all())

        def save(at: Progress, wait: bool) -> None:
            taken = batches.merge(job.gather(batches.state()))
            values = {
                "tokens": at.tokens,
                "loader": taken,
                "micro_rows": self.micro_rows,
                "settings": to_dict(settings),
                "fingerprints": fingerprints,
                "generation": generation,
                "record": record,
                "lora": lora,
            }
            wait = wait or not engine.asynchronous
            checkpoints.save(at.step, engine.tensors_to_save(), values, config, wait=wait)
            for warning in batches.warnings(taken):
                console.warn(warning)

        training = Training(
            engine=engine,
            batches=batches,
            objective=objective,
            rate=schedule.rate,
            run=run,
            console=console,
            tokens=known(settings.tokens),
            rows=self.rows,
            micro_rows=self.micro_rows,
            seq_len=known(settings.seq_len),
            clip=settings.optimizer.clip,
            log_every=settings.log.every,
            evaluate=evaluate,
            evaluate_every=max(1, round(evaluate_every / batch_tokens)) if evaluate_every else 0,
            evaluate_first=evaluate_first,
            save=save,
            save_every=known(settings.checkpoint.every),
            save_seconds=60 * settings.checkpoint.minutes,
            save_at=keep_for_good,
            patience=settings.health.patience,
            flops_per_token=flops_per_token,
            peak_flops=budget.peak_flops(device_name(self.device)) if self.device.type == "cuda" else None,
            progress=progress,
        )
        self._show_header(training, header)
        self._warn_of_decay()

        # Train. Only from here on is anything of an earlier attempt changed.
        if job.rank == 0:
            if self.origin.checkpoint is not None:
                checkpoints.set_aside_after(progress.step)
            run.rewind(progress.step if self.origin.checkpoint is not None else -1)
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
            batches.close()
            run.close()
        self._end(stopped)
        return stopped

    def _show_header(self, training: Training, header: dict[str, str]) -> None:
        """What is about to be trained, on what."""
        t, job = training, self.job
        rows = header | {
            "batch": f"{t.batch_tokens:,} tokens = {t.rows} rows of {t.seq_len}, {t.micro_rows} at a time",
            "steps": f"{math.ceil(t.tokens / t.batch_tokens):,}, starting after {t.progress.step:,}",
            "devices": f"{job.world_size} × {device_name(self.device)}, {self.settings.precision}",
            "strategy": f"{self.fit.strategy}, activation checkpointing {t.engine.raw.checkpointing}, "
            f"{gigabytes(self.fit.memory.total)} a device by the plan",
        }
        if t.flops_per_token is not None:
            peak = f"MFU against {t.peak_flops / 1e12:,.0f} TFLOP/s dense bf16" if t.peak_flops else None
            rows["FLOPs per token"] = (
                f"{t.flops_per_token / 1e6:,.0f} M = 6·(parameters without input embedding) + 12·L·H·N·T; "
                f"{peak or 'no peak is known, so no MFU'}"
            )
        self.console.table("", rows)
        gpus = torch.cuda.device_count()
        if self.device.type == "cuda" and job.world_size == 1 and gpus > 1:
            self.console.say(f"one of {gpus} GPUs is used; --devices {gpus} takes all")

    def _warn_of_decay(self) -> None:
        """Say so when a larger budget raises a learning rate that had begun to decay."""
        before, settings = self.state.get("settings"), self.settings
        if before is None or before["tokens"] == settings.tokens or before["schedule"]["name"] != "wsd":
            return
        batch = before["batch_tokens"]
        start = decay_start(before["tokens"], batch, before["schedule"]["decay"]) // batch
        if self.state["step"] <= start:
            return
        steps = checkpoint.steps_in(self.run.checkpoints)
        earlier = [self.run.checkpoints / f"step-{step:07d}" for step in steps if step <= start]
        kept = [path for path in earlier if checkpoint.kept_for_good(path)]
        way_out = f"; to go on from before the decay: --resume {kept[-1]}" if kept else ""
        self.console.warn(f"the learning rate had been decaying since step {start:,} and now rises again{way_out}")

    def _end(self, stopped: signal.Signals | None) -> None:
        progress, run, say = self.progress, self.run, self.console.say
        if stopped is not None:  # without a model folder: whoever sent the signal may not wait for it
            say(
                f"stopped by {stopped.name} after step {progress.step:,}; to go on: the same with --run "
                f"{self.settings.run}\na model folder of it: python train.py consolidate {run.path}"
            )
            return
        if self.job.rank == 0:
            write_model_folder(run.model, run.checkpoints / f"step-{progress.step:07d}", Tokenizer(run.tokenizer))
        self.job.barrier()
        say(f"trained on {progress.tokens:,} tokens in {progress.step:,} steps")
        say(f"model: {run.model}\nlook:  tensorboard --logdir {run.path}")


@contextmanager
def open_stage(
    settings: RunSettings,
    shape: ModelConfig,
    place: Place,
    run: RunFolder,
    *,
    init: str | None,
    trainable: int | None = None,
    taken: int = 0,
) -> Iterator[Stage]:
    """Let the ranks meet and claim the run; a block in which it is this job's alone.

    Args:
        settings: resolved, precision too; every rank has the same.
        shape: of the model.
        place: of this process in its job.
        run: its folder.
        init: model folder or checkpoint whose weights a new run starts from.
        trainable: parameters that are trained, where it is not all of them.
        taken: bytes of each device that the stage needs for something else.

    Raises:
        UserError: the run cannot be gone on with, or not in float8 here; or the GPU's memory is used up in the block.
    """
    device = choose_device(settings, place)
    if settings.fp8:
        float8.require(device)
    plan = choose_fit(settings, shape, place, device, trainable=trainable, taken=taken)
    fabric = make_fabric(settings, place, plan.strategy)
    job = Job.of_all()
    settings, shape, plan = job.broadcast((settings, shape, plan))
    console = Console(rank=place.rank)
    with run.claimed(), freed_memory_kept() if device.type == "cpu" else nullcontext():
        new = run.writes and {path.name for path in run.path.iterdir()} == {".lock"}  # nothing of anybody's is in it
        try:
            origin = job.broadcast(find_origin(settings, run, console.warn, init) if job.rank == 0 else Origin())
            state = {} if origin.checkpoint is None else read_state(origin.checkpoint)
            progress = Progress(state.get("step", 0), state.get("tokens", 0))
            console.settings(f"run {run.path}", to_dict(settings))
            too_big = warn_if_too_big(plan)
            if too_big is not None:
                console.warn(too_big)
            yield Stage(settings, shape, plan, fabric, job, run, console, origin, state, progress)
        except UserError:
            if new and not run.has_steps():
                shutil.rmtree(run.path)  # training never began
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory is used up with --micro-batch {plan.micro_rows}; give a smaller one, or "
                f"--activation-checkpointing full ({error})"
            ) from error


def known(value: Known | None) -> Known:
    """A setting that resolving has filled in."""
    assert value is not None
    return value
