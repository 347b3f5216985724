"""The training loop: every stage that trains calls :func:`fit`.

One step takes the next rows, accumulates gradients over micro-batches, clips, and lets the optimiser
move. The loss is the mean over the targets of the whole global batch, on all ranks: each micro-batch adds its
sum divided by that count, so neither accumulation nor the number of ranks changes anything but rounding.

On a GPU the host runs one step ahead: what a step came to (loss, norm, whether it was skipped, who asks
to stop) is read while the next one is computed. All ranks read the same figures of the same step, and so
decide alike.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common import signals
from common.console import Console
from common.errors import UserError
from common.run_folder import RunFolder
from data.packing import Batch
from train.engine import Engine
from train.meter import Meter, Outcome, Stopwatch


class Batches(Protocol):
    """Where a loop's data comes from."""

    def take(self, rows: int) -> Batch:
        """This rank's share of the next ``rows`` rows of the run."""

    def state(self) -> dict[str, Any]:
        """The rows taken so far, as plain values from which the source can go on."""

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of the run from those of all its ranks; an empty one from none, on ranks other than 0."""

    def warnings(self, state: dict[str, Any]) -> list[str]:
        """What the user should know of the rows so far, given their merged state."""

    def close(self) -> None:
        """End what the source has started."""


Objective = Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, Tensor]]
"""Model and a micro-batch to (summed loss, summed negative log-likelihood without gradient)."""


Evaluate = Callable[[int], dict[str, float]]
"""Step to figures to log."""


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0


@dataclass
class Training:
    """All that the loop works with."""

    engine: Engine
    batches: Batches
    objective: Objective
    rate: Callable[[int, int], float]
    """Learning rate of a step: (tokens before it, tokens in it) to rate."""
    run: RunFolder
    console: Console
    tokens: int
    """The budget."""
    rows: int
    """Rows in a global batch, over all ranks."""
    micro_rows: int
    """Rows in one forward pass of one device."""
    seq_len: int
    clip: float
    """Largest global gradient norm; 0 does not clip."""
    log_every: int
    """Steps."""
    evaluate: Evaluate
    evaluate_every: int
    """Steps; 0 never."""
    save: Callable[[Progress, bool], Any]
    """Called with how far the run is and whether to wait until the checkpoint is written."""
    save_every: int
    """Steps."""
    save_seconds: float = math.inf
    """A checkpoint is made after so long in any case."""
    save_at: Callable[[int], bool] = lambda step: False
    """Whether a step's checkpoint is made whatever ``save_every`` says."""
    evaluate_first: bool = False
    """Evaluate before the first step, too."""
    patience: int = 20
    """Skipped steps in a row that end the run."""
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

    Raises:
        UserError: too many steps in a row were skipped.
    """
    t, progress = training, training.progress
    meter = Meter(t.run, t.console, t.engine.job, t.batch_tokens, t.tokens, t.flops_per_token, t.peak_flops)
    steps = _Steps(training, meter)
    t.console.start(t.tokens, progress.tokens)
    first, last_save = progress.step + 1, time.monotonic()
    stopped = steps.asked_already()
    t.engine.model.train()
    try:
        evaluated = t.engine.job.broadcast(t.run.evaluated(progress.step))
        due = _evaluation_due(training) if progress.step else t.evaluate_first
        if stopped is None and due and not evaluated:
            _evaluate(training, meter)  # of the first weights, or the stop came first
        while progress.tokens < t.tokens and stopped is None:
            steps.take(save_due=time.monotonic() - last_save > t.save_seconds)
            steps.settle()
            finished = progress.tokens >= t.tokens
            if progress.step % t.log_every == 0 or progress.step == first or finished:
                steps.settle_all()
                meter.flush()
            stopped = None if finished else steps.asked
            if _evaluation_due(training) and stopped is None:
                steps.settle_all()
                _evaluate(training, meter)
            planned = progress.step % t.save_every == 0 or t.save_at(progress.step)
            if planned or steps.save_due or finished or stopped:
                steps.settle_all()
                meter.flush()
                with meter.paused():
                    t.save(progress, finished or stopped is not None)
                last_save, steps.save_due = time.monotonic(), False
    finally:
        t.console.stop()
    return stopped


class _Steps:
    """The steps under way: those launched and those whose outcome is known."""

    def __init__(self, training: Training, meter: Meter) -> None:
        self._t, self._meter = training, meter
        self._under_way: deque[Outcome] = deque()
        self._ahead = 1 if training.engine.device.type == "cuda" else 0
        self._skipped = 0
        self._asked: signal.Signals | None = None
        self.save_due = False
        """Whether rank 0 finds a checkpoint due, agreed on by all."""

    def take(self, *, save_due: bool) -> None:
        """Launch a step."""
        t, progress = self._t, self._t.progress
        rate = t.rate(progress.tokens, t.batch_tokens)
        watch = Stopwatch(t.engine.device)
        save_due = save_due and t.engine.job.rank == 0  # clocks differ
        figures = training_step(t, rate, asks=[*self._asks(), float(save_due)], watch=watch)
        progress.step += 1
        progress.tokens += t.batch_tokens
        self._under_way.append(Outcome(progress.step, progress.tokens, rate, figures, watch))

    def settle(self) -> None:
        """Read the steps that have had time to be computed."""
        while len(self._under_way) > self._ahead:
            self._read(self._under_way.popleft())

    def settle_all(self) -> None:
        """Wait for every step."""
        while self._under_way:
            self._read(self._under_way.popleft())

    @property
    def asked(self) -> signal.Signals | None:
        """The signal that asks to stop, the same on all ranks: what any of them had before a step that was read."""
        return self._asked if self._t.engine.job.world_size > 1 else self._t.stop_requested()

    def asked_already(self) -> signal.Signals | None:
        """The same before the first step."""
        job, device = self._t.engine.job, self._t.engine.device
        return _asked(job.sum(torch.tensor(self._asks(), device=device)).tolist())

    def _asks(self) -> list[float]:
        received = self._t.stop_requested()
        return [float(received == number) for number in signals.STOPPING]

    def _read(self, outcome: Outcome) -> None:
        _, _, norm, skipped, *asks, save_due = outcome.figures
        self._meter.add(outcome)
        self._asked, self.save_due = _asked(asks), save_due > 0
        self._skipped = self._skipped + 1 if skipped else 0
        if skipped:
            self._t.console.warn(f"step {outcome.step:,} skipped: loss {outcome.loss:.4g}, gradient norm {norm:.4g}")
        if self._skipped >= self._t.patience:
            self._meter.flush()
            or_here = "; or go on here with a larger --health.spike" if math.isfinite(norm) else ""
            last = _last_checkpoint(self._t.run)
            raise UserError(
                f"{self._skipped} steps in a row were skipped, the last with loss {outcome.loss:.4g} and gradient norm "
                f"{norm:.4g}: training has diverged. The last checkpoint from before is {last}; make a model folder of "
                f"it (python train.py consolidate) and begin a new run from that with a lower --optimizer.lr{or_here}"
            )


def _asked(asks: list[float]) -> signal.Signals | None:
    """The first of the stopping signals that any rank has had."""
    return next((number for number, ask in zip(signals.STOPPING, asks, strict=True) if ask > 0), None)


def training_step(training: Training, rate: float, asks: list[float], watch: Stopwatch) -> Tensor:
    """Take the next global batch and move the weights once.

    Args:
        training: the run.
        rate: learning rate.
        asks: what this rank has to say to the others; they get the sum over the ranks.
        watch: takes this rank's own time, without the waiting for others.

    Returns:
        Number of targets, summed negative log-likelihood, gradient norm, 1.0 if the step was skipped, and
        ``asks``, all over all ranks, fp64 on the device.
    """
    t, engine = training, training.engine
    with watch.data():
        batch = t.batches.take(t.rows)
    # From pinned memory: an ordinary copy to a GPU would wait for the step before.
    told = torch.tensor([batch.target_count, *asks], dtype=torch.float64, pin_memory=engine.device.type == "cuda")
    told = told.to(engine.device, non_blocking=True)
    engine.job.sum(told)
    # Ranks' gradients are averaged, so each takes its loss times their number.
    scale = (engine.job.world_size / told[0].clamp(min=1)).float()
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    micro_batches = list(_micro_batches(batch, t.micro_rows, engine.device))
    for number, micro_batch in enumerate(micro_batches, 1):
        with engine.micro_step(last=number == len(micro_batches)):
            with watch.compute():
                loss, nll = t.objective(engine.model, micro_batch)
            engine.backward(loss * scale)
        total += nll
    engine.job.sum(total)
    norm, skipped = engine.update(rate, t.clip, total)
    return torch.cat([told[:1], total[None], norm.double()[None], skipped.double()[None], told[1:]])


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


def _evaluate(training: Training, meter: Meter) -> None:
    t = training
    meter.flush()
    with meter.paused():
        t.engine.model.eval()
        figures = t.evaluate(t.progress.step)
        t.engine.model.train()
    t.run.log({"step": t.progress.step, "tokens": t.progress.tokens, **figures})
    t.run.flush()
    shown = ", ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in figures.items())
    t.console.say(f"step {t.progress.step:,}  validation: {shown}")


def _last_checkpoint(run: RunFolder) -> str:
    """The newest checkpoint, for a message."""
    newest = max(run.checkpoints.glob("step-*"), default=None)
    return str(newest) if newest is not None else "none yet"
