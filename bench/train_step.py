"""Training tokens/s of our transformer against transformers' Llama and litgpt's GPT, alike in all but the code.

    python bench/train_step.py                            # 8.5M parameters, 16 rows of 256 tokens
    python bench/train_step.py --shape 15m --rows 4 --seq-len 512 --variants fp32
    python bench/train_step.py --shape 125m --device cuda --rows 32 --seq-len 2048

A step is zero_grad, forward, backward, gradient clipping and fused AdamW. The variants take turns, one
step each a round, and medians over the rounds are compared, so that a machine that is busy with other
things slows all of them alike; a large matrix product takes its turn, too. ``--packed`` gives ours and
transformers rows of several documents that do not see each other; without it every row is one document.
litgpt takes part where it is installed (see bench/peers.py). On a CPU the process keeps the memory that tensors give
back, as ``train.py`` does, for all sides; with ``--return-memory`` it does not, as the peers by themselves do not.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from bench import peers
from bench.peers import Batch
from common.command import run_command
from models import budget, hf, sizes
from models.sizes import ModelConfig
from models.transformer import Transformer
from train.allocator import freed_memory_kept

DEFAULT = ModelConfig(
    layers=6, width=256, heads=4, kv_heads=4, head_width=64, ffn=592, vocab=8192, context=256, tied=False, qk_norm=False
)
"""8.5M parameters."""

VARIANTS = tuple(
    f"{side} {mode} {precision}"
    for precision in ("fp32", "bf16")
    for mode in ("eager", "compiled")
    for side in ("transformers", "litgpt", "ours")
)
BASELINE = "transformers eager fp32"

BARS = {"to eager": 4.0, "to transformers": 1.25, "to litgpt": 1.25, "of peak": 0.70}
"""What ours is meant to reach compiled in bf16, on a processor that has instructions for it."""

Step = Callable[[], float]
"""Does one optimiser step; returns the mean loss a token, and reading that waits until the device is done."""

Clock = Callable[[], float]
"""Seconds, from anywhen."""


def make_step(config: ModelConfig, batch: Batch, variant: str) -> Step:
    """The training step of a variant (one of :data:`VARIANTS`) on weights drawn from seed 0."""
    side, mode, precision = variant.split()
    device = batch.tokens.device
    model, loss = make_side(side, config, batch)
    model.to(device)
    if mode == "compiled":
        model.compile_parts() if isinstance(model, Transformer) else model.compile(dynamic=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return value.item()

    return step


def make_side(side: str, config: ModelConfig, batch: Batch) -> tuple[Any, Callable[[], Tensor]]:
    """A side's model with the weights of ours, and its mean loss of the batch."""
    ours = Transformer(config)
    if side == "ours":
        return ours, lambda: ours(batch.tokens, batch.positions, batch.targets)[0] / batch.targets.numel()
    if side == "litgpt":
        model = peers.litgpt(config)
        model.load_state_dict(peers.to_litgpt(ours.state_dict(), config))
        return model, lambda: peers.litgpt_loss(model, batch)
    model = peers.llama(config)
    model.load_state_dict(hf.to_hugging_face(ours.state_dict(), config), strict=not config.tied)
    return model, lambda: peers.llama_loss(model, batch)


def why_not(variant: str, packed: bool) -> str | None:
    """Why a variant takes no part; None when it does."""
    if not variant.startswith("litgpt"):
        return None
    return "knows no documents within a row" if packed else peers.why_no_litgpt()


def measure_step(step: Step, clock: Clock = time.perf_counter) -> float:
    """Seconds that a step takes."""
    start = clock()
    step()
    return clock() - start


def matmul_rate(device: str, dtype: torch.dtype, size: int, clock: Clock = time.perf_counter) -> float:
    """FLOP/s of a square matrix product: the best of several."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()

    def product() -> float:
        return (a @ b)[0, 0].item()

    product()
    return 2 * size**3 / min(measure_step(product, clock) for _ in range(5))


def machine(device: str) -> str:
    """What the numbers depend on: processor, its matrix instructions, threads, torch."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = {key.strip(): value for key, _, value in (line.partition(":") for line in info.splitlines())}
    name = fields.get("model name", "").strip() or platform.processor()
    flags = fields.get("flags", "").split()
    present = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    lines = [
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {' '.join(present) or 'flags unknown'}",
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    ]
    if device == "cuda":
        lines.insert(0, torch.cuda.get_device_name())
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="default", help="default, or a size of models/sizes.py (without QK-norm)")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--packed", action="store_true", help="four documents a row")
    parser.add_argument("--return-memory", action="store_true", help="leave the C library's settings alone")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the processor's time, not the clock's: for one thread on a core that other programs use too",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[""],
        metavar="WORDS",
        help="only those that contain one of these: 'ours', 'eager fp32'",
    )
    return parser.parse_args()


@dataclass
class Measured:
    """Seconds of every step by variant, and the matrix rate of every round by precision."""

    seconds: dict[str, list[float]]
    rates: dict[str, list[float]]


def measure(steps: dict[str, Step], device: str, rounds: int, clock: Clock) -> Measured:
    """Let the variants take turns."""
    size = 8192 if device == "cuda" else 1024
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = Measured({name: [] for name in steps}, {name.split()[-1]: [] for name in steps})
    for _ in range(rounds):
        for name, step in steps.items():
            found.seconds[name].append(measure_step(step, clock))
        for precision, rates in found.rates.items():
            rates.append(matmul_rate(device, dtypes[precision], size, clock))
    return found


def ratios(found: Measured, tokens: int, flops_per_token: float) -> dict[str, dict[str, float | None]]:
    """By variant: tokens/s, and what :data:`BARS` names; None where the other side was not measured."""
    speed = {name: tokens / statistics.median(times) for name, times in found.seconds.items()}
    rates = {precision: statistics.median(rates) for precision, rates in found.rates.items()}

    def over(name: str, other: str) -> float | None:
        return speed[name] / speed[other] if other in speed and other != name else None

    lines: dict[str, dict[str, float | None]] = {}
    for name, rate in speed.items():
        side, setting = name.split(maxsplit=1)
        lines[name] = {
            "tokens/s": rate,
            "to eager": rate / speed[BASELINE] if BASELINE in speed else None,
            "to transformers": over(name, f"transformers {setting}") if side == "ours" else None,
            "to litgpt": over(name, f"litgpt {setting}") if side == "ours" else None,
            "of peak": rate * flops_per_token / rates[name.split()[-1]],
        }
    return lines


def print_table(lines: dict[str, dict[str, float | None]]) -> None:
    """Print the variants and what the columns mean."""
    forms = {"tokens/s": ",.0f", "of peak": ".1%"}
    heads = ["tokens/s", *BARS]
    print(f"\n{'':<32}" + "".join(f"{head:>16}" for head in heads))
    for name, line in lines.items():
        shown = ["-" if (value := line[head]) is None else format(value, forms.get(head, ".2f")) for head in heads]
        print(f"{name:<32}" + "".join(f"{text:>16}" for text in shown))
    bars = ", ".join(f"{head} {format(bar, forms.get(head, '.2f'))}" for head, bar in BARS.items())
    print("\nto eager: against transformers eager fp32; to transformers, to litgpt: against them at the same setting;")
    print("of peak: FLOPs (models/budget.py) a second over the matrix rate, which is measured in every round.")
    print(f"Aimed at for ours compiled in bf16, on a processor with bf16 instructions: {bars}")


def make_steps(args: argparse.Namespace, config: ModelConfig, batch: Batch) -> dict[str, Step]:
    """The steps of the variants that were asked for, warm."""
    steps: dict[str, Step] = {}
    for name in (name for name in VARIANTS if any(words in name for words in args.variants)):
        if reason := why_not(name, args.packed):
            print(f"{name:<32} not measured: litgpt {reason}")
            continue
        steps[name] = make_step(config, batch, name)
        start = time.perf_counter()
        losses = [steps[name]() for _ in range(2)]
        ready = time.perf_counter() - start
        print(f"{name:<32} ready in {ready:5.1f} s, losses {losses[0]:.4f} {losses[1]:.4f}", flush=True)
    return steps


def main() -> None:
    """Measure and print the table."""
    args = parse()
    clock = time.process_time if args.cpu_time else time.perf_counter
    config = DEFAULT if args.shape == "default" else replace(sizes.size(args.shape).config, qk_norm=False)
    config = replace(config, context=max(config.context, args.seq_len))
    print(machine(args.device))
    print(f"{budget.parameters(config).total:,} parameters, {args.rows} rows of {args.seq_len} tokens\n")
    batch = Batch.random(config, args.rows, args.seq_len, args.device, args.packed)
    with nullcontext() if args.device == "cuda" or args.return_memory else freed_memory_kept():
        found = measure(make_steps(args, config, batch), args.device, args.rounds, clock)
    rates = ", ".join(f"{name} {statistics.median(rates) / 1e9:,.0f} GFLOP/s" for name, rates in found.rates.items())
    print(f"\nlarge matrix products, in {'processor' if args.cpu_time else 'wall'} time: {rates}")
    print_table(ratios(found, args.rows * args.seq_len, budget.flops_per_token(config, args.seq_len)))


if __name__ == "__main__":
    run_command(main)
