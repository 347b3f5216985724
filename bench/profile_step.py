"""Where the time of a training step goes, against the least that its arithmetic and its bytes could take.

    python bench/profile_step.py                                  # c4-130m on one GPU, as bench/train_gpu.py has it
    python bench/profile_step.py --size c4-1b --micro-rows 8 --top 30 --optimizer muon
    python bench/profile_step.py --size 15m --seq-len 512 --micro-rows 2 --device cpu --steps 3

First by parts, each waited for: the batch (rows made ready and sent to the device), forward, backward, clipping, the
optimiser, whose cost a step thus stands alone. The forward pass holds the gradients of head and loss. Then by
what is computed: on CUDA the kernels, by their names, and the gaps in which the GPU had nothing to do; on a CPU the
operators' shares in the step, those of the loss and of the optimiser told by where they are called. Floors:
bench/floor.py.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from bench.floor import copy_rate, least
from bench.train_gpu import Setting, Trainee, make_batch, make_ours, make_setting, prepare_torch, wait_for
from bench.train_step import Clock, machine, matmul_rate
from common.command import run_command
from data.packing import make_batch as pack
from models import sizes
from models.transformer import Transformer

WARM_UP = 3
"""Steps before the first that counts."""

KINDS = {
    "attention": r"flash|fmha|sdpa|flex|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|triton_.*_mm_|mkldnn|aten::(mm|addmm|bmm|linear|baddbmm)_?$",
    "loss": r"logsumexp|log_softmax|scatter|gather|nll",
    "optimiser and clipping": r"adam|multi_tensor_apply|foreach|lpnorm|linalg_vector_norm",
    "copies": r"memcpy|memset|aten::(copy_|to|_to_copy|fill_|zero_)$|direct_copy|CatArray",
    "norms, rotary, activations": r"triton_|cpp_fused|rms_norm|silu|elementwise|aten::",
}
"""What a kernel's or an operator's name says of it; the first that fits counts."""

CALLERS = {"loss": r"ChunkedCrossEntropy|chunk_loss", "optimiser and clipping": r"^Optimizer\."}
"""Operators within which all is of a kind but, in the loss, the matrix products of the head."""


@dataclass(frozen=True)
class Span:
    """A kernel's or operator's name and its time, in seconds."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """The line of the table that a kernel or operator belongs to."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "other")


def busy(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of them ran."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def kind_within(name: str, callers: Iterable[str]) -> str:
    """The same of an operator on a CPU, which is called by others."""
    kind, outside = kind_of(name), list(callers)
    for within, words in CALLERS.items():
        if any(re.search(words, caller) for caller in [name, *outside]):
            return kind if within == "loss" and kind == "matrix products" else within
    return kind


def callers(event: Any) -> Iterator[str]:
    """Names of the operators that an operator was called within."""
    while (event := event.cpu_parent) is not None:
        yield event.name


@dataclass
class Profile:
    """Seconds a step."""

    wall: float
    """Without the profiler, which slows the host."""
    parts: dict[str, float]
    kinds: dict[str, float]
    names: dict[str, float]
    """By kernel or operator, with its kind before it."""
    at_work: float
    """In which the device had something to do."""


def profile_steps(setting: Setting, steps: int, clock: Clock) -> Profile:
    """Train for some steps, and measure them as a whole, by parts and by what is computed."""
    trainee = make_ours(setting, Transformer(setting.config).state_dict())
    batch = make_batch(setting, setting.fit.micro_rows, packed=False)
    autocast = setting.precision == "bf16"
    step = partial(trainee.step, batch, autocast)
    trainee.enter()
    for _ in range(WARM_UP):
        step()
    wait_for(setting.device)
    start = clock()
    for _ in range(steps):
        step()
    wait_for(setting.device)
    wall = (clock() - start) / steps
    parts = time_parts(trainee, setting, steps, clock)
    cuda = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        wait_for(setting.device)
    if cuda:
        return Profile(wall, parts, *by_kernel(profiler, steps))
    kinds, names, inside = by_operator(profiler, steps)
    # There are no gaps on a CPU, and the profiler, or another program, must not make operators longer than the step.
    kinds, names = ({key: seconds * wall / inside for key, seconds in times.items()} for times in (kinds, names))
    return Profile(wall, parts, kinds, names, wall)


def time_parts(trainee: Trainee, setting: Setting, steps: int, clock: Clock) -> dict[str, float]:
    """Seconds a step by parts, each waited for; with gaps on CUDA, that a step as a whole has not."""
    parts: dict[str, float] = defaultdict(float)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = clock()
        result = work()
        wait_for(setting.device)
        parts[name] += (clock() - start) / steps
        return result

    shape = (setting.fit.micro_rows, setting.seq_len + 1)
    rows = np.random.default_rng(0).integers(setting.config.vocab, size=shape, dtype=np.uint16)
    for _ in range(steps):
        timed("batch", lambda: send(rows, setting.device))
        batch = make_batch(setting, setting.fit.micro_rows, packed=False)
        loss = timed("forward", lambda: trainee.loss(batch, setting.precision == "bf16"))  # noqa: B023 - called at once
        timed("backward", loss.backward)
        timed("clipping", trainee.clip)
        timed("optimiser", trainee.move)
    return parts


def send(rows: Any, device: torch.device) -> list[torch.Tensor]:
    """Make rows of token ids ready as the loop does, and send them to the device."""
    packed = pack(rows, end=0)
    found = [torch.from_numpy(part) for part in (packed.inputs, packed.targets, packed.positions)]
    return [part.pin_memory().to(device, non_blocking=True) for part in found] if device.type == "cuda" else found


Found = tuple[dict[str, float], dict[str, float], float]
"""Seconds a step by kind, by name, and in which the device had something to do."""


def by_operator(profiler: Any, steps: int) -> Found:
    """The time inside operators of a CPU."""
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        seconds, kind = event.self_cpu_time_total / 1e6 / steps, kind_within(event.name, callers(event))
        kinds[kind] += seconds
        names[f"{kind}: {event.name}"] += seconds
    return kinds, names, sum(kinds.values())


def by_kernel(profiler: Any, steps: int) -> Found:
    """The kernels on CUDA."""
    spans = [
        Span(event.name(), event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9)
        for event in profiler.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type())
    ]
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for span in spans:
        kinds[kind_of(span.name)] += (span.end - span.start) / steps
        names[f"{kind_of(span.name)}: {span.name}"] += (span.end - span.start) / steps
    return kinds, names, busy(spans) / steps


def longest(seconds: dict[str, float]) -> list[tuple[str, float]]:
    """Names and times, in falling order."""
    return sorted(seconds.items(), key=lambda pair: -pair[1])


def show(name: str, seconds: float, wall: float, floor: float | None = None) -> None:
    """A line: milliseconds, share of the step, and the least that it could be."""
    least_ms = "" if floor is None else f"  floor {1e3 * floor:>8.2f} ms"
    print(f"{name[:90]:<90} {1e3 * seconds:>9.2f} ms {seconds / wall:>6.1%}{least_ms}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", default="c4-130m", choices=list(sizes.SIZES))
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-rows", type=int, help="rows in a forward pass; default: the plan's")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--cpu-time", action="store_true", help="as in bench/train_step.py")
    parser.add_argument("--top", type=int, default=12, help="kernels or operators to name")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    prepare_torch()
    torch._inductor.config.cpp.enable_kernel_profile = True  # else what is compiled for a CPU has no names
    clock = time.process_time if args.cpu_time else time.perf_counter
    setting = make_setting(args.size, args)
    tokens = setting.fit.micro_rows * setting.seq_len
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    found = profile_steps(setting, args.steps, clock)
    # In the same minutes as the steps: a processor's rate changes with what else runs.
    rate = matmul_rate(args.device, dtype, 8192 if args.device == "cuda" else 1024, clock)
    bandwidth = copy_rate(args.device, clock)
    parts = least(setting.config, tokens, setting.seq_len, dtype.itemsize, args.optimizer)
    floors = {kind: part.seconds(rate, bandwidth) for kind, part in parts.items()}
    floor, wall = sum(floors.values()), found.wall
    print(machine(args.device))
    print(f"{args.size}, {setting.fit.micro_rows} rows of {setting.seq_len} tokens, {args.precision}, {args.optimizer}")
    print(f"matrix products {rate / 1e9:,.0f} GFLOP/s, copies {bandwidth / 1e9:,.0f} GB/s")
    print(
        f"\nstep {1e3 * wall:.2f} ms, {tokens / wall:,.0f} tokens/s; floor {1e3 * floor:.2f} ms ({floor / wall:.0%})\n"
    )
    for part, seconds in found.parts.items():
        show(part, seconds, wall)
    print()
    for kind, seconds in longest(found.kinds):
        show(kind, seconds, wall, floors.get(kind))
    show("gaps", max(0.0, wall - found.at_work), wall)
    print()
    for name, seconds in longest(found.names)[: args.top]:
        show(name, seconds, wall)


if __name__ == "__main__":
    run_command(main)
