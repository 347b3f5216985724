"""Where the time of a training step goes, against the least that its arithmetic could take.

    python bench/profile_step.py                                  # c4-130m on one GPU, as bench/train_gpu.py has it
    python bench/profile_step.py --size c4-1b --micro-rows 8 --top 30
    python bench/profile_step.py --size tiny --seq-len 64 --micro-rows 2 --device cpu --no-compile

On CUDA the kernels of some steps, by what they do, and the gaps in which the GPU had nothing to do; on a CPU the
time inside operators. The floor is FLOPs a token (as in bench/train_gpu.py) over the rate of a large matrix product
measured here: what a step would take if it were nothing but such products.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from bench.train_gpu import Setting, Variant, make_batch, make_ours, make_setting, prepare_torch, wait_for
from bench.train_step import machine, matmul_rate
from models import budget, sizes
from models.transformer import Transformer

WARM_UP = 3
"""Steps before the first that counts."""

KINDS = {
    "attention": r"flash|fmha|sdpa|flex|attention",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|triton_.*_mm_|mkldnn|aten::(mm|addmm|bmm|linear)$",
    "loss": r"logsumexp|log_softmax|scatter|gather|nll",
    "optimiser and clipping": r"adam|multi_tensor_apply|foreach|lpnorm|linalg_vector_norm",
    "copies": r"memcpy|memset|aten::(copy_|to|_to_copy|fill_|zero_)$|direct_copy|CatArray",
    "norms, rotary, activations": r"triton_|rms_norm|silu|elementwise|aten::",
}
"""What a kernel's or an operator's name says of it; the first that fits counts."""


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


def profile_steps(setting: Setting, steps: int) -> tuple[float, dict[str, float], float]:
    """Wall seconds, seconds by kernel or operator and seconds in which the device was busy, a step each."""
    variant = Variant("ours", make_ours)
    trainee = make_ours(setting, Transformer(setting.config).state_dict())
    batch = make_batch(setting, setting.fit.micro_rows, variant.packed)
    step = partial(trainee.step, batch, setting.precision == "bf16")
    trainee.enter()
    for _ in range(WARM_UP):
        step()
    wait_for(setting.device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait_for(setting.device)
    wall = (time.perf_counter() - start) / steps  # without the profiler, which slows the host
    cuda = setting.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        wait_for(setting.device)
    if not cuda:
        operators = {event.key: event.self_cpu_time_total / 1e6 / steps for event in profiler.key_averages()}
        return wall, operators, sum(operators.values())
    spans = [
        Span(event.name(), event.start_ns() / 1e9, (event.start_ns() + event.duration_ns()) / 1e9)
        for event in profiler.profiler.kineto_results.events()
        if "CUDA" in str(event.device_type())
    ]
    kernels: dict[str, float] = defaultdict(float)
    for span in spans:
        kernels[span.name] += (span.end - span.start) / steps
    return wall, kernels, busy(spans) / steps


def longest(seconds: dict[str, float]) -> list[tuple[str, float]]:
    """Names and times, in falling order."""
    return sorted(seconds.items(), key=lambda pair: -pair[1])


def show(name: str, seconds: float, wall: float) -> None:
    """A line: milliseconds and share of the step."""
    print(f"{name[:90]:<90} {1e3 * seconds:>9.2f} ms {seconds / wall:>6.1%}")


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
    parser.add_argument("--top", type=int, default=12, help="kernels or operators to name")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    prepare_torch()
    setting = make_setting(args.size, args)
    tokens = setting.fit.micro_rows * setting.seq_len
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    rate = matmul_rate(args.device, dtype, 8192 if args.device == "cuda" else 1024)
    floor = budget.flops_per_token(setting.config, setting.seq_len) * tokens / rate
    print(machine(args.device))
    print(f"{args.size}, {setting.fit.micro_rows} rows of {setting.seq_len} tokens, {args.precision}, {args.optimizer}")
    wall, totals, at_work = profile_steps(setting, args.steps)
    kinds: dict[str, float] = defaultdict(float)
    for name, seconds in totals.items():
        kinds[kind_of(name)] += seconds
    print(
        f"\nstep {1e3 * wall:.2f} ms, {tokens / wall:,.0f} tokens/s; floor {1e3 * floor:.2f} ms ({floor / wall:.0%})\n"
    )
    for kind, seconds in longest(kinds):
        show(kind, seconds, wall)
    show("gaps", max(0.0, wall - at_work), wall)
    print()
    for name, seconds in longest(totals)[: args.top]:
        show(f"{kind_of(name)}: {name}", seconds, wall)


if __name__ == "__main__":
    main()
