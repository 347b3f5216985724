"""The plan's memory against what PyTorch holds, in one process.

    python bench/memory.py                                     # tiny on this CPU
    python bench/memory.py --size 125m --rows 16 --seq-len 2048 --device cuda
    python bench/memory.py --size 1b --rows 4 --device cuda --checkpointing selective --compile off

The peak of steps of two micro-batches each, so that gradients are there while the second goes forward, as the
plan has it; the first steps, in which compilation and the optimiser's state arise, do not count. On CUDA it
is torch.cuda.max_memory_allocated, on a CPU it is summed from the allocations that torch's profiler saw. On a
CPU also the bytes that autograd keeps from the forward to the backward pass. Rows are packed with four
documents each.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from common.command import run_command
from models import budget, gpus, sizes
from models.sizes import adapt
from models.transformer import Transformer
from train.plan import Machine, Memory, Workload, memory

MICRO_BATCHES = 2
WARM_UP = 2
"""Steps that do not count."""


@dataclass(frozen=True)
class Trial:
    """A model, its rows, and how it is trained."""

    job: Workload
    checkpointing: str
    rows: int

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return self.job.machine.kind

    def plan(self) -> Memory:
        """What the plan says of it."""
        return memory(self.job, "ddp", self.checkpointing, self.rows)

    def model(self) -> Transformer:
        """The model on its device, compiled where asked for."""
        model = Transformer(self.job.config).to(self.device)
        model.checkpointing = self.checkpointing
        if self.job.is_compiled:
            model.compile_parts()
        return model

    def loss(self, model: Transformer) -> Tensor:
        """The mean loss of random tokens, in rows of four documents."""
        shape = (self.rows, self.job.seq_len)
        tokens = torch.randint(self.job.config.vocab, shape, device=self.device)
        places = torch.arange(self.job.seq_len, device=self.device)
        positions = places.remainder(-(-self.job.seq_len // 4)).expand(shape)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.job.precision == "bf16"):
            total, _ = model(tokens, positions, tokens)
        return total / tokens.numel()


def make_step(trial: Trial) -> Callable[[], None]:
    """A step of two micro-batches, warmed up."""
    model = trial.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            trial.loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM_UP):
        step()
    return step


def measure_cuda(trial: Trial, steps: int) -> tuple[int, int]:
    """Bytes at the peak of the steps, allocated and reserved."""
    step = make_step(trial)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def measure_cpu(trial: Trial) -> int:
    """Bytes at the peak of a step: weights and optimiser, and the most that was allocated beyond them."""
    step = make_step(trial)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    plan = trial.plan()
    return plan.weights + plan.optimizer + max(live)


def measure_saved(trial: Trial) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, weights and their bf16 copies apart."""
    model = trial.model()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        copy = tensor.dtype == torch.bfloat16 and bool({tuple(tensor.shape), tuple(tensor.shape[::-1])} & shapes)
        if tensor.untyped_storage().data_ptr() not in own and not copy:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trial.loss(model)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", default="tiny", help="a size of models/sizes.py")
    parser.add_argument("--rows", type=int, default=8, help="rows in a micro-batch")
    parser.add_argument("--seq-len", type=int, help="default: the size's context")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("32", "bf16"), help="default: bf16 on CUDA")
    parser.add_argument("--compile", choices=("on", "off"), help="default: on on CUDA")
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--steps", type=int, default=3, help="steps that count, on CUDA")
    return parser.parse_args()


def trial_of(args: argparse.Namespace) -> Trial:
    """What the command line asks for, on the device that is here."""
    config = sizes.size(args.size).config
    seq_len = args.seq_len or config.context
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = gpus.here(properties.name, properties.total_memory)
    else:
        gpu = gpus.cpu(0)
    job = Workload(
        adapt(config, context=max(config.context, seq_len)),
        Machine(gpu),
        rows=MICRO_BATCHES * args.rows,
        seq_len=seq_len,
        precision=args.precision or ("bf16" if args.device == "cuda" else "32"),
        optimizer="adamw",
        compiled=None if args.compile is None else args.compile == "on",
    )
    return Trial(job, args.checkpointing, args.rows)


def show(name: str, measured: int, planned: int) -> None:
    """A line: measured, planned, and the plan relative to the measurement."""
    print(f"{name:<24} {measured / 1e9:>10.4f} {planned / 1e9:>10.4f} {planned / measured:>10.3f}")


def main() -> None:
    """Measure and print both."""
    args = parse()
    trial = trial_of(args)
    job, plan = trial.job, trial.plan()
    graph = "compiled" if job.is_compiled else "eager"
    where = torch.cuda.get_device_name() if trial.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}")
    print(
        f"{args.size}: {budget.parameters(job.config).total:,} parameters, {trial.rows} rows of {job.seq_len} tokens, "
        f"{job.precision}, {graph}, {trial.checkpointing} checkpointing"
    )
    print("plan: " + ", ".join(f"{name} {value / 1e9:.4f}" for name, value in vars(plan).items()) + " GB\n")
    print(f"{'GB':<24} {'measured':>10} {'planned':>10} {'plan / it':>10}")
    if trial.device == "cuda":
        allocated, reserved = measure_cuda(trial, args.steps)
        show("peak allocated", allocated, plan.total)
        show("peak reserved", reserved, plan.total)
    else:
        kept = budget.head_kept_bytes(job.config, trial.rows * job.seq_len, job.value_bytes)
        show("peak allocated", measure_cpu(trial), plan.total)
        show("kept for the backward", measure_saved(trial), plan.activations + kept)


if __name__ == "__main__":
    run_command(main)
