"""The figures of a run as they come: read late from the device, written now and then."""

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from common.console import Console, duration
from common.distributed import Job
from common.run_folder import RunFolder


class Stopwatch:
    """This rank's own seconds in a step: waiting for data, and the forward passes.

    In the backward pass and the update a rank also waits for the others, so those say nothing about
    who is slow. (FSDP2 and ZeRO-3 gather weights in the forward pass too: there the difference is smaller.)
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def data(self) -> Iterator[None]:
        """A block of host time."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    @contextmanager
    def compute(self) -> Iterator[None]:
        """A block of device time, which is read when the device is done."""
        if not self._cuda:
            with self.data():
                yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def seconds(self) -> float:
        """The time taken; the device must be done."""
        return self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000


class Outcome:
    """What a step came to.

    Args:
        step: number of the step.
        tokens: of the run, with this step.
        rate: learning rate.
        figures: from :func:`train.loop.training_step`; on their way to the host from here on.
        watch: this rank's time.
    """

    def __init__(self, step: int, tokens: int, rate: float, figures: Tensor, watch: Stopwatch) -> None:
        self.step, self.tokens, self.rate, self._watch = step, tokens, rate, watch
        self.device = figures.device
        self._event: torch.cuda.Event | None = None
        self._host = figures
        if figures.device.type == "cuda":
            self._host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._host.copy_(figures, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def figures(self) -> list[float]:
        """Targets, summed negative log-likelihood, gradient norm, skipped, and what ranks ask; waits for the step."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._host.tolist()
        return values

    @property
    def loss(self) -> float:
        """Nats a target."""
        count, nll, *_ = self.figures
        return nll / max(count, 1)

    @property
    def seconds(self) -> float:
        """This rank's own time in the step."""
        return self._watch.seconds()


class Meter:
    """Collects outcomes and writes them to the run folder and the console."""

    def __init__(
        self,
        run: RunFolder,
        console: Console,
        job: Job,
        batch_tokens: int,
        budget: int,
        flops_per_token: float | None,
        peak_flops: float | None,
    ) -> None:
        self._run, self._console, self._job = run, console, job
        self._batch_tokens, self._budget = batch_tokens, budget
        self._flops, self._peak = flops_per_token, peak_flops
        self._steps: list[Outcome] = []
        self._since, self._paused = time.perf_counter(), 0.0

    def add(self, outcome: Outcome) -> None:
        """Remember a step that is computed."""
        self._steps.append(outcome)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time is no training time."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def flush(self) -> None:
        """Write the steps since the last time, with the speed over them. All ranks call it at the same steps."""
        if not self._steps:
            return
        elapsed = time.perf_counter() - self._since - self._paused
        speed = len(self._steps) * self._batch_tokens / elapsed
        mfu = None
        if self._flops and self._peak:
            mfu = speed * self._flops / (self._peak * self._job.world_size)
        for outcome in self._steps:
            _, _, norm, skipped, *_ = outcome.figures
            record = {"step": outcome.step, "tokens": outcome.tokens, "loss": outcome.loss, "lr": outcome.rate}
            record |= {"grad_norm": norm, "tokens_per_s": round(speed, 1)}
            record |= ({"skipped": 1} if skipped else {}) | ({} if mfu is None else {"mfu": round(mfu, 4)})
            self._run.log(record)
        self._run.log({"event": "ranks", "step": self._steps[-1].step, **self._ranks()})
        self._run.flush()
        newest = self._steps[-1]
        status = {
            "step": f"{newest.step:,}",
            "loss": f"{statistics.fmean(outcome.loss for outcome in self._steps):.3f}",
            "tok/s": f"{speed:,.0f}",
            "MFU": "n/a" if mfu is None else f"{mfu:.1%}",
            "lr": f"{newest.rate:.2e}",
            "left": duration(max(0, self._budget - newest.tokens) / speed),
        }
        self._console.progress(min(newest.tokens, self._budget), self._budget, status)
        self._steps.clear()
        self._since, self._paused = time.perf_counter(), 0.0

    def _ranks(self) -> dict[str, float]:
        """Peak memory of the fullest rank, and the own time a step of the median and the slowest rank."""
        own = statistics.fmean(outcome.seconds for outcome in self._steps)
        device = self._steps[-1].device
        mine = torch.tensor([own, peak_memory(device)], dtype=torch.float64, device=device)
        seconds, memory = self._job.every(mine).T.tolist()
        slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
        figures = {"peak_memory_bytes": max(memory), "rank_seconds": round(statistics.median(seconds), 6)}
        if len(seconds) > 1:
            figures |= {"slowest_rank": slowest, "slowest_rank_seconds": round(seconds[slowest], 6)}
        return figures


def peak_memory(device: torch.device) -> float:
    """The most bytes that this process has had on its device: of a GPU what torch allocated, else resident memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
