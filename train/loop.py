"""The training loop: every stage that trains calls :func:`fit`.

One step takes the next rows, accumulates gradients over micro-batches, clips, and lets the optimiser
move. The loss is the mean over the targets of the whole global batch: each micro-batch adds its sum
divided by that count, so accumulation changes nothing but rounding. Losses are read from the device only
when they are logged, so the loop never waits for a step to finish.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from common import signals
from common.console import Console, duration
from common.errors import UserError
from common.run_folder import RunFolder
from data.packing import Batch


class Batches(Protocol):
    """Where a loop's data comes from."""

    def take(self, rows: int) -> Batch:
        """This rank's share of the next ``rows`` rows of the run."""

    def state(self) -> dict[str, Any]:
        """The rows taken so far, as plain values from which the source can go on."""


Objective = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]
"""Model and a micro-batch to (summed loss, summed negative log-likelihood without gradient)."""


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0


@dataclass
class Training:
    """All that the loop works with."""

    fabric: Fabric
    model: Any
    """A module, set up by Fabric."""
    optimizer: Any
    """Set up by Fabric."""
    batches: Batches
    objective: Objective
    rate: Callable[[int, int], float]
    """Learning rate of a step: (tokens before it, tokens in it) to rate."""
    run: RunFolder
    console: Console
    tokens: int
    """The budget."""
    rows: int
    """Rows in a global batch."""
    micro_rows: int
    """Rows in one forward pass of one device."""
    seq_len: int
    clip: float
    """Largest global gradient norm; 0 does not clip."""
    log_every: int
    """Steps."""
    evaluate: Callable[[int], dict[str, float]]
    """Called with the step; returns figures to log."""
    evaluate_every: int
    """Steps; 0 never."""
    save: Callable[[Progress], Any]
    save_every: int
    """Steps."""
    save_seconds: float = math.inf
    """A checkpoint is made after so long in any case."""
    save_at: Callable[[int], bool] = lambda step: False
    """Whether a step's checkpoint is made whatever ``save_every`` says."""
    flops_per_token: float | None = None
    peak_flops: float | None = None
    """Of one device; None leaves MFU out."""
    progress: Progress = field(default_factory=Progress)
    stop_requested: Callable[[], signal.Signals | None] = signals.received

    @property
    def batch_tokens(self) -> int:
        """Tokens in a global batch."""
        return self.rows * self.seq_len


def fit(training: Training) -> signal.Signals | None:
    """Train until the budget is used up or a signal asks to stop; the last state is saved either way.

    Returns:
        The signal that stopped the run, or None when it is finished.
    """
    t, progress = training, training.progress
    meter = _Meter(training)
    t.console.start(t.tokens, progress.tokens)
    first, last_save = progress.step + 1, time.monotonic()
    stopped = t.stop_requested()
    t.model.train()
    try:
        if stopped is None and progress.step and _evaluation_due(training) and not t.run.evaluated(progress.step):
            _evaluate(training, meter)  # the stop came first
        while progress.tokens < t.tokens and stopped is None:
            rate = t.rate(progress.tokens, t.batch_tokens)
            nll, count, norm = training_step(training, rate)
            progress.step += 1
            progress.tokens += t.batch_tokens
            meter.add(nll, count, norm, rate)

            finished = progress.tokens >= t.tokens
            stopped = None if finished else t.stop_requested()
            if progress.step % t.log_every == 0 or progress.step == first or finished:
                meter.flush()
            if _evaluation_due(training) and stopped is None:
                _evaluate(training, meter)
            late = time.monotonic() - last_save > t.save_seconds
            if progress.step % t.save_every == 0 or t.save_at(progress.step) or late or finished or stopped:
                meter.flush()
                with meter.paused():
                    t.save(progress)
                last_save = time.monotonic()
    finally:
        t.console.stop()
    return stopped


def training_step(training: Training, rate: float) -> tuple[Tensor, int, Tensor]:
    """Take the next global batch and move the weights once.

    Returns:
        Summed negative log-likelihood (on the device), number of targets, and gradient norm (on the device).
    """
    t = training
    batch = t.batches.take(t.rows)
    count = batch.target_count
    total = torch.zeros((), device=t.fabric.device)
    micro_batches = list(_micro_batches(batch, t.micro_rows, t.fabric.device))
    for group in t.optimizer.param_groups:
        group["lr"] = rate
    for number, micro_batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with t.fabric.no_backward_sync(t.model, enabled=not last):
            loss, nll = t.objective(t.model, micro_batch)
            t.fabric.backward(loss / max(count, 1))
        total += nll
    norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.clip if t.clip > 0 else float("inf"))
    t.optimizer.step()
    t.optimizer.zero_grad(set_to_none=True)
    return total, count, norm


def _micro_batches(batch: Batch, rows: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The rows of a batch, some at a time, on their way to the device."""
    names = ("inputs", "targets", "positions")
    for start in range(0, len(batch.inputs), rows):
        parts = {name: torch.from_numpy(getattr(batch, name)[start : start + rows]) for name in names}
        if device.type == "cuda":
            parts = {name: part.pin_memory().to(device, non_blocking=True) for name, part in parts.items()}
        yield parts


def _evaluation_due(training: Training) -> bool:
    """Whether the step just taken is one to evaluate after: every so many, and the last."""
    t = training
    finished = t.progress.tokens >= t.tokens
    return t.evaluate_every > 0 and (t.progress.step % t.evaluate_every == 0 or finished)


def _evaluate(training: Training, meter: "_Meter") -> None:
    t = training
    meter.flush()
    with meter.paused():
        t.model.eval()
        figures = t.evaluate(t.progress.step)
        t.model.train()
    t.run.log({"step": t.progress.step, "tokens": t.progress.tokens, **figures})
    t.run.flush()
    shown = ", ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in figures.items())
    t.console.say(f"step {t.progress.step:,}  validation: {shown}")


class _Meter:
    """Collects the figures of steps and writes them out now and then."""

    def __init__(self, training: Training) -> None:
        self._t = training
        self._steps: list[tuple[int, int, float, Tensor, int, Tensor]] = []
        self._since = time.perf_counter()
        self._paused = 0.0

    def add(self, nll: Tensor, count: int, norm: Tensor, rate: float) -> None:
        """Remember a step; nothing is read from the device yet."""
        self._steps.append((self._t.progress.step, self._t.progress.tokens, rate, nll, count, norm))

    def paused(self) -> "_Pause":
        """A block whose time is no training time."""
        return _Pause(self)

    def flush(self) -> None:
        """Write the steps since the last time, with the speed over them."""
        if not self._steps:
            return
        t = self._t
        # The only place where the loop waits for the device.
        nlls = torch.stack([step[3].detach() for step in self._steps]).tolist()
        norms = torch.stack([step[5].detach().to(torch.float32) for step in self._steps]).tolist()
        for (step, *_), nll, norm in zip(self._steps, nlls, norms, strict=True):
            if not (math.isfinite(nll) and math.isfinite(norm)):
                raise UserError(
                    f"the loss of step {step} is {nll}, its gradient norm {norm}: training has diverged. The "
                    f"checkpoints in {t.run.checkpoints} are from before; try a lower --optimizer.lr"
                )
        elapsed = time.perf_counter() - self._since - self._paused
        speed = len(self._steps) * t.batch_tokens / elapsed
        mfu = None
        if t.flops_per_token and t.peak_flops:
            mfu = speed * t.flops_per_token / (t.peak_flops * t.fabric.world_size)
        for (step, tokens, rate, _, count, _), nll, norm in zip(self._steps, nlls, norms, strict=True):
            record = {"step": step, "tokens": tokens, "loss": nll / max(count, 1), "lr": rate, "grad_norm": norm}
            t.run.log({**record, "tokens_per_s": round(speed, 1), **({} if mfu is None else {"mfu": round(mfu, 4)})})
        t.run.flush()
        losses = [nll / max(step[4], 1) for step, nll in zip(self._steps, nlls, strict=True)]
        status = {
            "step": f"{t.progress.step:,}",
            "loss": f"{sum(losses) / len(losses):.3f}",
            "tok/s": f"{speed:,.0f}",
            "MFU": "n/a" if mfu is None else f"{mfu:.1%}",
            "lr": f"{self._steps[-1][2]:.2e}",
            "left": duration(max(0, t.tokens - t.progress.tokens) / speed),
        }
        t.console.progress(min(t.progress.tokens, t.tokens), t.tokens, status)
        self._steps.clear()
        self._since, self._paused = time.perf_counter(), 0.0


class _Pause:
    def __init__(self, meter: _Meter) -> None:
        self._meter = meter

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._meter._paused += time.perf_counter() - self._began
