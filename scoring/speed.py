"""How fast a model is here, how much memory it takes, and how large it is.

The competition's figure is one forward pass over 2,000 tokens, batch 1. Its own script read the clock before the device
had finished, so what it printed was the time to launch kernels; here the device is synchronised before the clock is
read. Nothing is padded: all 2,000 positions hold text.

What is timed is transformers on this machine, to compare models with each other. The phone is another matter.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.run_folder import processor

FORWARD_TOKENS = 2_000
"""Tokens of the competition's forward pass."""

WARM_UP = {"cpu": 1, "cuda": 3}
"""Calls before the first that counts: they allocate memory and choose kernels."""

FEWEST = 3
"""Repeats that are made however long they take: quartiles of fewer say nothing."""

_TEXT = (
    "A ferry crosses the river every hour. In the morning it carries schoolchildren and bicycles, at noon the post, "
    "and in the evening people who have missed the bridge and are glad of a slower way home. "
)


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one quantity."""

    median: float
    lower: float
    """A quarter of the measurements are below."""
    upper: float
    """A quarter of the measurements are above."""
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The median and quartiles of at least two measurements."""
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has."""

    total: int
    """A tied head counted as a matrix of its own."""
    non_duplicate: int
    """Parameters that are stored: a tied head is the embedding, and counts once."""
    without_embeddings: int
    """Parameters that are neither in the token embedding nor in the head, whether they are tied or not."""


@dataclass(frozen=True)
class SpeedReport:
    """What :func:`measure` found."""

    device: str
    dtype: str
    forward_tokens: int
    """Tokens of the forward pass."""
    forward_seconds: Spread
    """The competition's forward pass: batch 1, logits of every position."""
    prompt_tokens: int
    new_tokens: int
    prefill: Spread
    """Tokens of the prompt a second, the cache filled and logits of the last position alone computed."""
    decode: Spread
    """New tokens a second, one at a time after the prompt, greedy."""
    peak_memory: int
    """Bytes at most in use during the forward passes, weights included."""
    peak_memory_of: str
    """What :attr:`peak_memory` counts."""
    notes: tuple[str, ...]
    """Where this is not what the competition measured."""

    @property
    def throughput(self) -> float:
        """Forward passes a second: the competition's throughput."""
        return 1 / self.forward_seconds.median


@torch.inference_mode()
def measure(
    model: Any,
    tokenizer: Any,
    device: torch.device,
    *,
    forward_tokens: int = FORWARD_TOKENS,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeats: int = 20,
    seconds: float = 60.0,
) -> SpeedReport:
    """Time a model: the competition's forward pass, then prefill and decoding.

    Args:
        model: one of transformers' causal language models, on ``device``, in evaluation mode.
        tokenizer: its tokenizer.
        device: where it is.
        forward_tokens: of the forward pass; capped to the model's context.
        prompt_tokens: before the new ones; capped so that both fit into the context.
        new_tokens: to decode; at most a quarter of the context.
        repeats: timed calls of each kind.
        seconds: after which no further call of a kind is begun, but for :data:`FEWEST`.

    Raises:
        UserError: the device's memory does not hold the forward pass.
    """
    context = getattr(model.config, "max_position_embeddings", None) or forward_tokens
    forward_tokens, asked = min(forward_tokens, context), forward_tokens
    new_tokens = max(1, min(new_tokens, context // 4))
    prompt_tokens = max(1, min(prompt_tokens, context - new_tokens))
    ids = _ids(tokenizer, max(forward_tokens, prompt_tokens)).to(device)
    try:
        peak = _Peak(device)
        forward = _repeat(lambda: (_forward(model, ids[:, :forward_tokens], device),), device, repeats, seconds)
        peak_memory = peak.bytes()
        generation = _repeat(
            lambda: _generate(model, ids[:, :prompt_tokens], new_tokens, device), device, repeats, seconds
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{device_name(device)} has no memory for a forward pass over {forward_tokens:,} tokens; "
            "use a smaller dtype or another device"
        ) from error
    notes = [] if forward_tokens == asked else [f"{forward_tokens:,} tokens, not {asked:,}: the model's whole context"]
    return SpeedReport(
        device=device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        forward_tokens=forward_tokens,
        forward_seconds=Spread.of([time for (time,) in forward]),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill=Spread.of([prompt_tokens / prefill for prefill, _ in generation]),
        decode=Spread.of([new_tokens / decode for _, decode in generation]),
        peak_memory=peak_memory,
        peak_memory_of=peak.what,
        notes=tuple(notes),
    )


def parameters(model: nn.Module) -> ParameterCount:
    """Count the parameters of one of transformers' models."""
    every = sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    stored = sum(parameter.numel() for parameter in model.parameters())
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    embeddings = {parameter for end in ends if end is not None for parameter in end.parameters()}
    return ParameterCount(every, stored, stored - sum(parameter.numel() for parameter in embeddings))


def device_name(device: torch.device) -> str:
    """What reports call a device: the GPU's model, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def _ids(tokenizer: Any, count: int) -> Tensor:
    """Token ids (1, count) of English text."""
    once = tokenizer.encode(_TEXT, add_special_tokens=False)
    return torch.tensor([(once * -(-count // len(once)))[:count]])


def _repeat(
    once: Callable[[], tuple[float, ...]], device: torch.device, repeats: int, seconds: float
) -> list[tuple[float, ...]]:
    """What ``once`` returns each time, after calls to warm up."""
    for _ in range(WARM_UP[device.type]):
        once()
    end = time.perf_counter() + seconds
    found: list[tuple[float, ...]] = []
    while len(found) < FEWEST or (len(found) < repeats and time.perf_counter() < end):
        found.append(once())
    return found


def _forward(model: Any, ids: Tensor, device: torch.device) -> float:
    """Seconds of a forward pass."""
    start = _now(device)
    model(input_ids=ids, use_cache=True)
    return _now(device) - start


def _generate(model: Any, prompt: Tensor, new_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds to read a prompt, and seconds to decode ``new_tokens`` after it; end tokens do not stop it."""
    start = _now(device)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    read = _now(device)
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return read - start, _now(device) - read


def _now(device: torch.device) -> float:
    """The clock, in seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Peak:
    """The most memory in use since this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.what = "allocated by torch on the GPU"
        elif _reset_resident_peak():
            self.what = "resident in the process, torch itself included"
        else:
            self.what = "resident in the process since its start, loading and torch itself included"

    def bytes(self) -> int:
        """How much it is."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_peak()


def _reset_resident_peak() -> bool:
    """Make the process's present size its peak; False where the system cannot (see proc_pid_clear_refs(5))."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    """Bytes of the process that were resident at most."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
