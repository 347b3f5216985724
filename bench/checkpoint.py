"""How long a checkpoint stops the training, beside a bare copy of its bytes and a save that is waited for.

    python bench/checkpoint.py                                  # 15m on this CPU
    python bench/checkpoint.py --size 1b --device cuda --folder /scratch

The stop of an asynchronous save is the copy of weights and moments to host memory; a thread writes, flushes
and sums the copy. Rounds are interleaved; medians count. Nothing trains meanwhile, so what the writing
takes from the step on a machine with few cores is not measured here.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from bench.train_step import machine
from common.command import run_command
from common.distributed import Job
from models import sizes
from models.transformer import Transformer, initial_weight
from train.checkpoint import Checkpoints
from train.engine import Engine
from train.fabric import Fabric


def make_engine(name: str, device: str) -> Engine:
    """A model of a size with AdamW's moments, which the first step makes."""
    config = sizes.size(name).config
    engine = Engine(
        Fabric(accelerator=device, devices=1),
        Job(),
        build=lambda: Transformer(config, seed=None),
        values=lambda name, shape: initial_weight(name, shape, config, seed=0),
        make_optimizers=lambda raw: [torch.optim.AdamW(raw.parameters(), lr=1e-4, fused=True)],
        spike=0.0,
    )
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=engine.device)
    loss, nll = engine.model(tokens, None, tokens)
    engine.backward(loss)
    engine.update(1e-4, 1.0, nll)
    return engine


def copy_of(tensors: dict[str, Tensor]) -> Callable[[], None]:
    """A bare copy of the tensors into host memory that is there already."""
    cuda = any(tensor.device.type == "cuda" for tensor in tensors.values())
    hosts = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda) for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            hosts[name].copy_(tensor, non_blocking=cuda)
        if cuda:
            torch.cuda.synchronize()

    return copy


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="15m", help="a size of models/sizes.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    engine = make_engine(args.size, args.device)
    tensors = engine.tensors()
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"{machine(args.device)}\n{args.size}: {size / 1e6:,.0f} MB of weights, moments and step counts\n")
    copy = copy_of(tensors)
    times: dict[str, list[float]] = {"bare copy": [], "stop": [], "then written after": [], "waited for": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(Path(folder), keep=1)
        for number in range(args.rounds + 1):
            step = 2 * number
            measured = {
                "bare copy": seconds(copy),
                "stop": seconds(partial(checkpoints.save, step, tensors, {}, {}, wait=False)),
                "then written after": seconds(checkpoints.wait),
                "waited for": seconds(partial(checkpoints.save, step + 1, tensors, {}, {})),
            }
            if number:  # the first round allocates
                for name, value in measured.items():
                    times[name].append(value)
        checkpoints.finish()
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:<20} {1e3 * value:>9.1f} ms {size / value / 1e9:>7.2f} GB/s")
    print(f"\nstop / bare copy {medians['stop'] / medians['bare copy']:.2f}")
    print(f"stop / save that is waited for {medians['stop'] / medians['waited for']:.3f}")


if __name__ == "__main__":
    run_command(main)
