"""Training tokens/s of our transformer against transformers' Llama: same shape, weights, data and optimiser.

    python bench/train_step.py                            # 8.5M parameters, 16 rows of 256 tokens
    python bench/train_step.py --shape 125m --device cuda --rows 32 --seq-len 2048

A step is zero_grad, forward, backward, gradient clipping and fused AdamW. The variants take turns, one
step each a round, and medians over the rounds are compared, so that a machine that is busy with other
things slows all of them alike. ``--packed`` gives both sides rows of several documents that do not see
each other; without it every row is one document.
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

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from models import budget, hf, sizes
from models.hf_config import to_config
from models.sizes import ModelConfig
from models.transformer import Transformer

DEFAULT = ModelConfig(
    layers=6, width=256, heads=4, kv_heads=4, head_width=64, ffn=592, vocab=8192, context=256, tied=False, qk_norm=False
)
"""8.5M parameters."""

VARIANTS = tuple(
    f"{side} {mode} {precision}"
    for precision in ("fp32", "bf16")
    for mode in ("eager", "compiled")
    for side in ("transformers", "ours")
)
BASELINE = "transformers eager fp32"

Step = Callable[[], float]
"""Does one optimiser step; returns the mean loss a token, and reading that waits until the device is done."""


@dataclass(frozen=True)
class Batch:
    """The rows of a step (B, T); every token has a target."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None
    """Each token's place in its document; None where every row is one document."""

    @classmethod
    def random(cls, config: ModelConfig, rows: int, seq_len: int, device: str, packed: bool = False) -> "Batch":
        """Random tokens; packed rows hold four documents of about equal length."""
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(config.vocab, (rows, seq_len + 1), generator=generator).to(device)
        positions = torch.arange(seq_len, device=device).remainder(-(-seq_len // 4)).repeat(rows, 1) if packed else None
        return cls(text[:, :-1].contiguous(), text[:, 1:].contiguous(), positions)


def make_step(config: ModelConfig, batch: Batch, variant: str) -> Step:
    """The training step of a variant (one of :data:`VARIANTS`) on weights drawn from seed 0."""
    side, mode, precision = variant.split()
    device = batch.tokens.device
    ours = Transformer(config).to(device)
    model: nn.Module = ours
    if side == "transformers":
        model = transformers_model(ours)
    if mode == "compiled":
        ours.compile_parts() if model is ours else model.compile(dynamic=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True)

    def loss() -> Tensor:
        if model is ours:
            total, _ = ours(batch.tokens, batch.positions, batch.targets)
            return total / batch.targets.numel()
        output = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            labels=batch.targets,  # only makes it compute a loss; the targets are already shifted
            shift_labels=batch.targets,
            use_cache=False,
        )
        return output.loss

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return value.item()

    return step


def transformers_model(ours: Transformer) -> nn.Module:
    """transformers' Llama with the shape and the weights of our model."""
    values = to_config(ours.config, bos=None, eos=0, pad=None)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    model.load_state_dict(hf.to_hugging_face(ours.state_dict(), ours.config), strict=not ours.config.tied)
    return model.to(ours.embedding.weight.device).train()


def measure_step(step: Step) -> float:
    """Seconds that a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square matrix product: the best of several."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype).unbind()

    def product() -> float:
        return (a @ b)[0, 0].item()

    product()
    return 2 * size**3 / min(measure_step(product) for _ in range(5))


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
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[""],
        metavar="WORDS",
        help="only those that contain one of these: 'ours', 'eager fp32'",
    )
    return parser.parse_args()


def main() -> None:
    """Measure and print the table."""
    args = parse()
    config = DEFAULT if args.shape == "default" else replace(sizes.size(args.shape).config, qk_norm=False)
    config = replace(config, context=max(config.context, args.seq_len))
    variants = [name for name in VARIANTS if any(words in name for words in args.variants)]
    batch = Batch.random(config, args.rows, args.seq_len, args.device, args.packed)
    size = 8192 if args.device == "cuda" else 1024
    rates = {
        "fp32": matmul_rate(args.device, torch.float32, size),
        "bf16": matmul_rate(args.device, torch.bfloat16, size),
    }
    print(machine(args.device))
    print(", ".join(f"{name} products {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items()))
    print(f"{budget.parameters(config).total:,} parameters, {args.rows} rows of {args.seq_len} tokens\n")

    steps: dict[str, Step] = {}
    for name in variants:
        steps[name] = make_step(config, batch, name)
        start = time.perf_counter()
        losses = [steps[name]() for _ in range(2)]
        print(f"{name:<32} ready in {time.perf_counter() - start:5.1f} s, losses {losses[0]:.4f} {losses[1]:.4f}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name in variants:
            seconds[name].append(measure_step(steps[name]))

    tokens = args.rows * args.seq_len
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    print(f"\n{'':<32} {'tokens/s':>10} {'to eager':>9} {'to theirs':>9} {'of peak':>8}")
    for name, rate in speed.items():
        theirs = name.replace("ours", "transformers")
        to_eager = f"{rate / speed[BASELINE]:.2f}" if BASELINE in speed else "-"
        to_theirs = f"{rate / speed[theirs]:.2f}" if theirs in speed and theirs != name else "-"
        share = rate * budget.flops_per_token(config, args.seq_len) / rates[name.split()[-1]]
        print(f"{name:<32} {rate:>10,.0f} {to_eager:>9} {to_theirs:>9} {share:>8.1%}")
    print("\nto eager: against transformers eager fp32; to theirs: against transformers at the same setting;")
    print("of peak: FLOPs (models/budget.py) a second over the matrix rate measured above")


if __name__ == "__main__":
    main()
