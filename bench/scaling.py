"""How training scales: predicted from one device's step and the messages of each strategy, and checked here.

    python bench/scaling.py check                          # predicted against 2 and 4 processes, gloo, on this CPU
    python bench/scaling.py check --worlds 2 --strategies fsdp --size 15m
    python bench/scaling.py paper                          # 1b on up to 1,024 H100s, weak and strong scaling
    python bench/scaling.py paper --size 125m --gpu a100-80g --seconds 0.4 --outer 25e9 --optimizer muon

``check`` measures collectives of several sizes among the processes and fits latency and bandwidth, and measures the
step's computation with as many processes as will train, each alone: where processes share cores, that is in it. Then it
predicts the step (train/scaling.py) and times real ones, through train/loop.py and its engines. Everything takes turns,
round by round, for a machine that is busy with other things.

``paper`` takes the seconds of a step's passes on one device (``--seconds``), else FLOPs over the GPU's peak and the MFU
that was measured there or is assumed, and bandwidths and latencies as given; their defaults are assumptions.
"""

import argparse
import logging
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before OpenMP is there: processes that share cores, each of one thread

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from bench.train_step import machine
from common.command import run_command
from common.console import Console
from common.distributed import Job
from common.errors import UserError
from common.run_folder import RunFolder
from data.packing import Batch
from models import budget, gpus, sizes
from models.sizes import ModelConfig
from models.transformer import Transformer, initial_weight
from train.device import make_fabric
from train.engine import Engine, engine_for
from train.launch import Place
from train.loop import Training, training_step
from train.meter import Stopwatch
from train.optimizer import make_optimizers
from train.plan import ASSUMED_MFU, MEASURED_MFU, Machine, Workload, best
from train.scaling import (
    INFINIBAND,
    NVLINK,
    Compute,
    Link,
    Network,
    Operation,
    Reading,
    Saving,
    Step,
    collective,
    predict,
)
from train.settings import HealthSettings, OptimizerSettings, RunSettings

# torch 2.13 gave them new names and warns of the old ones.
gather_whole = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter_sums = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

OPERATIONS: tuple[Operation, ...] = get_args(Operation)
SIZES = (8, 2**16, 2**20, 2**22, 2**23)
"""Bytes of the messages that latency and bandwidth are fitted to."""
BETWEEN = 384
"""Rows and columns of the matrices that are multiplied between messages: some milliseconds."""
REPEATS = 15
TARGET = 0.15
"""How far the prediction may be from what is measured."""


@dataclass(frozen=True)
class Shape:
    """What each process trains on."""

    config: ModelConfig
    rows: int
    """Of a process, in one forward pass."""
    seq_len: int
    optimizer: str
    steps: int
    """That are timed."""


class RandomRows:
    """The same rows of random tokens in every step."""

    def __init__(self, shape: Shape) -> None:
        text = np.random.default_rng(0).integers(shape.config.vocab, size=(shape.rows, shape.seq_len + 1))
        positions = np.broadcast_to(np.arange(shape.seq_len), (shape.rows, shape.seq_len)).copy()
        self._batch = Batch(text[:, :-1].copy(), text[:, 1:].copy(), positions)

    def take(self, rows: int) -> Batch:
        """This rank's share."""
        return self._batch

    def state(self) -> dict[str, Any]:
        """Nothing to go on from."""
        return {}

    def merge(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The same of all ranks."""
        return {}

    def warnings(self, state: dict[str, Any]) -> list[str]:
        """None."""
        return []

    def close(self) -> None:
        """Nothing was started."""


def make_training(shape: Shape, strategy: str, place: Place) -> Training:
    """The loop's own parts for a step, as pre-training puts them together."""
    optimizer = OptimizerSettings(name=cast(Any, shape.optimizer), lr=1e-4, beta2=0.95)
    settings = RunSettings(device="cpu", precision="32", strategy=cast(Any, strategy), optimizer=optimizer)
    fabric = make_fabric(settings, place, strategy)
    engine = engine_for(fabric)(
        fabric,
        Job.of_all(),
        lambda: Transformer(shape.config, seed=None),
        lambda name, size: initial_weight(name, size, shape.config, seed=0),
        lambda raw: make_optimizers(raw, optimizer, "32"),
        HealthSettings().spike,
    )

    def objective(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, nll = module(batch["inputs"], batch["positions"], batch["targets"])
        return loss, nll

    return Training(
        engine=engine,
        batches=RandomRows(shape),
        objective=objective,
        rate=lambda before, tokens: 1e-4,
        run=RunFolder(Path(os.devnull), writes=False),
        console=Console(rank=1),
        tokens=0,
        rows=shape.rows * place.world_size,
        micro_rows=shape.rows,
        seq_len=shape.seq_len,
        clip=optimizer.clip,
        log_every=1,
        evaluate=lambda step: {},
        evaluate_every=0,
        save=lambda progress, wait: None,
        save_every=2**62,
    )


@contextmanager
def timing_update(engine: Engine, into: list[float]) -> Any:
    """A block in which the seconds of clipping and of the optimiser are noted."""
    update = engine.update

    def timed(rate: float, clip: float, nll: Tensor) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        done = update(rate, clip, nll)
        into.append(time.perf_counter() - start)
        return done

    engine.update = timed  # type: ignore[method-assign]
    yield
    engine.update = update  # type: ignore[method-assign]


def time_steps(shape: Shape, strategy: str, place: Place, together: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each step, and of the update in it, on this rank.

    ``together`` waits for the other processes after each step: where they exchange nothing too a step is the slowest
    one's, and the scheduler of a busy machine, which favours who has waited, treats both alike.
    """
    training, watch = make_training(shape, strategy, place), Stopwatch(torch.device("cpu"))
    training.engine.model.train()
    seconds: list[float] = []
    updates: list[float] = []
    with timing_update(training.engine, updates):
        for _ in range(shape.steps + 2):  # two warm up: the optimiser's state, the strategy's buffers
            start = time.perf_counter()
            training_step(training, 1e-4, [0.0, 0.0, 0.0, 0.0], watch).tolist()
            together()
            seconds.append(time.perf_counter() - start)
    return {"steps": seconds[2:], "updates": updates[2:]}


def time_collectives() -> dict[Operation, list[float]]:
    """Median seconds of each operation, by size in :data:`SIZES`.

    all_reduce one after the other, as at the end of a step, to which the computation is measured; the others, which a
    strategy has between blocks, between short computations: the ranks do not arrive at once, and caches are cold.
    """
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    square = torch.randn(BETWEEN, BETWEEN)

    def between() -> None:
        torch.mm(square, square)

    found: dict[Operation, list[float]] = {operation: [] for operation in OPERATIONS}
    for size in SIZES:
        whole = torch.zeros(max(world, size // 4 // world * world))
        for operation in OPERATIONS:
            action = _collective(operation, whole, world)
            before = [] if operation == "all_reduce" else [between]
            pairs = [(_seconds(*before), _seconds(*before, action)) for _ in range(REPEATS)]
            alone, together = map(statistics.median, zip(*pairs, strict=True))
            found[operation].append(max(together - alone, 1e-6))
    dist.destroy_process_group()
    return found


def _collective(operation: Operation, whole: Tensor, world: int) -> Callable[[], object]:
    """An operation on ``whole``, which as under FSDP2 is gathered into and cut up from memory that is new each time."""

    def gather() -> None:
        gathered = torch.empty_like(whole)
        gather_whole(gathered, part.clone())
        whole.copy_(gathered)

    part = whole[: len(whole) // world]
    actions: dict[Operation, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": gather,
        "reduce_scatter": lambda: scatter_sums(torch.empty_like(part), whole.clone()),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    return actions[operation]


def _seconds(*actions: Callable[[], object]) -> float:
    """How long some actions take one after the other."""
    start = time.perf_counter()
    for action in actions:
        action()
    return time.perf_counter() - start


def fit_link(operation: Operation, seconds: Sequence[float], world: int) -> Link:
    """Latency and bandwidth from the times of several sizes: a line by least squares of relative errors."""
    sizes_, times = np.array(SIZES, dtype=float), np.array(seconds)
    terms = np.stack([np.ones_like(sizes_), sizes_], axis=1) / times[:, None]
    (fixed, each), *_ = np.linalg.lstsq(terms, np.ones_like(times), rcond=None)
    messages = collective(operation, 0, world, Link(1.0, math.inf))
    crossings = collective(operation, 1, world, Link(0.0, 1.0))
    return Link(float(max(fixed, 0.0)) / messages, crossings / float(max(each, 1e-15)))


def in_processes(world: int, work: Callable[..., Any], *arguments: Any, joined: bool = True) -> list[Any]:
    """What ``work(rank, world, barrier, *arguments)`` returns in each of some forked processes, one thread each.

    Args:
        world: how many.
        work: what each does.
        arguments: for it.
        joined: the processes find each other as ranks of one job; else each is alone.
    """
    context = get_context("fork")  # the imports are paid once
    barrier, results = context.Barrier(world), context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def run(rank: int) -> None:
        if joined:
            where: dict[str, object] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
            }
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in where.items()})
        torch.set_num_threads(1)
        results.put((rank, work(rank, world, barrier, *arguments)))

    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < world:
        if results.empty():
            failed = [process for process in processes if process.exitcode]
            if failed:
                for process in processes:
                    process.kill()
                raise UserError(f"a process ended with {failed[0].exitcode}; what it said is above")
            time.sleep(0.01)
            continue
        rank, value = results.get()
        found[rank] = value
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world)]


def _train(rank: int, world: int, barrier: Any, shape: Shape, strategy: str) -> dict[str, list[float]]:
    return time_steps(shape, strategy, Place("torchrun", rank, rank, world, 1), barrier.wait)


def _train_alone(rank: int, world: int, barrier: Any, shape: Shape, strategy: str) -> dict[str, list[float]]:
    return time_steps(shape, strategy, Place("alone", 0, 0, 1, 1), barrier.wait)


def _collectives(rank: int, world: int, barrier: Any) -> dict[Operation, list[float]]:
    return time_collectives()


def typical(results: Sequence[dict[str, list[float]]], name: str) -> float:
    """The median over the steps of the processes' mean seconds."""
    return statistics.median(map(statistics.mean, zip(*(result[name] for result in results), strict=True)))


@dataclass(frozen=True)
class Comparison:
    """A round of one strategy in one number of processes."""

    predicted: Step
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted.total / self.measured


def compare(shape: Shape, strategy: str, world: int, links: dict[Operation, Link]) -> Comparison:
    """Measure the computation, predict the step from it, and measure the step."""
    alone = in_processes(world, _train_alone, shape, strategy, joined=False)
    measured = typical(in_processes(world, _train, shape, strategy), "steps")
    update = typical(alone, "updates")
    compute = Compute(typical(alone, "steps") - update, update)
    machine_ = Machine(gpus.cpu_here(world), world)
    job = Workload(shape.config, machine_, shape.rows * world, shape.seq_len, "32", shape.optimizer, strategy)
    network = Network(1, world, links, hides=False)
    return Comparison(predict(job, strategy, shape.rows, compute, network), measured)


def check(args: argparse.Namespace) -> None:
    """Predict and measure; prints both, round by round and in the median."""
    config = sizes.size(args.size).config
    shape = Shape(config, args.rows, args.seq_len, args.optimizer, args.steps)
    print(f"{machine('cpu')}\n{args.size}, {args.rows} rows of {args.seq_len} tokens a process, one thread each")
    found: dict[tuple[str, int], list[Comparison]] = {}
    for number in range(args.rounds):
        for world in args.worlds:
            times = in_processes(world, _collectives)[0]
            links = {operation: fit_link(operation, times[operation], world) for operation in OPERATIONS}
            for operation, link in links.items():
                print(
                    f"round {number + 1}, {world} processes: {operation} {1e6 * link.latency:,.0f} µs a message, "
                    f"{link.bandwidth / 1e9:.2f} GB/s"
                )
            for strategy in args.strategies:
                one = compare(shape, strategy, world, links)
                found.setdefault((strategy, world), []).append(one)
                print(f"round {number + 1}, {strategy} in {world}: {one.ratio:.3f}", flush=True)
    heading = f"{'strategy':<10} {'processes':>9} {'compute':>9} {'messages':>9} {'predicted':>9} {'measured':>9}"
    print(f"\n{heading} {'ratio':>7} (ms; medians of {args.rounds} rounds)")
    for (strategy, world), rounds in found.items():
        compute, sent, predicted, measured = (
            1e3 * statistics.median(values)
            for values in zip(
                *((r.predicted.compute, r.predicted.communication, r.predicted.total, r.measured) for r in rounds),
                strict=True,
            )
        )
        ratio = statistics.median(one.ratio for one in rounds)
        verdict = "" if abs(ratio - 1) <= TARGET else f"  further than {TARGET:.0%}"
        print(
            f"{strategy:<10} {world:>9} {compute:>9.1f} {sent:>9.1f} {predicted:>9.1f} {measured:>9.1f} {ratio:>7.3f}"
            f"{verdict}"
        )


def paper(args: argparse.Namespace) -> None:
    """Weak and strong scaling of a size on up to ``--ranks`` GPUs, from what is given or assumed."""
    config, gpu = sizes.size(args.size).config, gpus.gpu(args.gpu)
    one = Workload(config, Machine(gpu), args.rows, args.seq_len, "bf16", args.optimizer)
    fit = best(replace(one, micro_rows=args.micro_rows))
    compute, source = compute_of(args, one, fit.micro_rows)
    print(f"{args.size} on {gpu.name}, {args.rows} rows of {args.seq_len} tokens a device, {fit.micro_rows} at a time")
    print(f"passes {1e3 * compute.passes:,.1f} ms a micro-batch ({source}), update {1e3 * compute.update:,.1f} ms")
    print(
        f"links within a node of {args.devices}: {args.inner / 1e9:,.0f} GB/s, {1e6 * args.inner_latency:g} µs; "
        f"between nodes {args.outer / 1e9:,.0f} GB/s a device, {1e6 * args.outer_latency:g} µs; as given or assumed"
    )
    saving = Saving(args.save_every, args.copied, args.written, args.written_in_all)
    reading = Reading(args.workers, args.encoded, args.unpacked, args.shards)
    for title, grows in (("weak scaling: as many rows on every device", True), ("strong scaling: as many rows", False)):
        print(f"\n{title} (ms a step)")
        print(f"{'strategy':<12} {'ranks':>6} {'compute':>9} {'exposed':>9} {'checkpoint':>10} {'data':>7} {'eff.':>7}")
        for strategy in args.strategies:
            for ranks in powers(args.ranks):
                devices = min(ranks, args.devices)
                network = Network(
                    ranks // devices,
                    devices,
                    Link(args.inner_latency, args.inner),
                    Link(args.outer_latency, args.outer),
                )
                rows = args.rows * (ranks if grows else args.strong)
                job = replace(one, machine=Machine(gpu, devices, ranks // devices), rows=rows)
                show(strategy, job, compute, network, fit.micro_rows, saving, reading)


def show(
    strategy: str, job: Workload, compute: Compute, network: Network, micro: int, saving: Saving, reading: Reading
) -> None:
    """A line of the table. Fewer rows than a micro-batch are taken to need that much less time."""
    world = job.machine.world
    if job.rows % world:
        print(f"{strategy:<12} {world:>6} {'fewer rows than devices':>40}")
        return
    fewer = min(micro, job.share)
    compute, micro = replace(compute, passes=compute.passes * fewer / micro), fewer
    one = replace(job, machine=replace(job.machine, devices=1, nodes=1), rows=job.rows // world)
    step = predict(job, strategy, micro, compute, network, saving, reading)
    alone = predict(one, "ddp", micro, compute, replace(network, nodes=1, devices=1))
    parts = (step.compute, step.communication, step.checkpoint, step.data)
    shown = [f"{1e3 * part:>{width},.1f}" for part, width in zip(parts, (9, 9, 10, 7), strict=True)]
    print(f"{strategy:<12} {world:>6} {' '.join(shown)} {alone.total / step.total:>7.1%}")


def compute_of(args: argparse.Namespace, job: Workload, micro_rows: int) -> tuple[Compute, str]:
    """Seconds of a micro-batch and of the update, and where they are from.

    The update reads and writes weights and moments and reads gradients, at the memory's bandwidth.
    """
    gpu = job.machine.gpu
    assert gpu.peak is not None
    assert gpu.bandwidth is not None
    state = budget.state_bytes(job.config, job.optimizer)
    update = (2 * state.weights + state.gradients + 2 * state.optimizer) / gpu.bandwidth
    if args.seconds is not None:
        return Compute(args.seconds, update), "as given"
    known = MEASURED_MFU.get((gpu.name, args.size))
    flops = budget.flops_per_token(job.config, job.seq_len) * micro_rows * job.seq_len
    source = f"at an MFU of {known or ASSUMED_MFU:.0%}, {'measured' if known else 'assumed'}"
    return Compute(flops / (gpu.peak * (known or ASSUMED_MFU)), update), source


def powers(most: int) -> list[int]:
    """1, 2, 4 … up to ``most``."""
    return [2**power for power in range(int(math.log2(most)) + 1)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    here, there = commands.add_parser("check"), commands.add_parser("paper")
    for command, size, strategies in ((here, "tiny", "ddp fsdp"), (there, "1b", "ddp fsdp hsdp deepspeed-2")):
        command.add_argument("--size", default=size, choices=list(sizes.SIZES))
        command.add_argument("--strategies", nargs="+", default=strategies.split())
        command.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    here.add_argument("--worlds", type=int, nargs="+", default=[2, 4], help="numbers of processes")
    here.add_argument("--rows", type=int, default=2, help="of a process")
    here.add_argument("--seq-len", type=int, default=128)
    here.add_argument("--steps", type=int, default=10)
    here.add_argument("--rounds", type=int, default=3)
    there.add_argument("--gpu", default="h100-80g", choices=list(gpus.GPUS))
    there.add_argument("--ranks", type=int, default=1024, help="the most")
    there.add_argument("--devices", type=int, default=8, help="of a node")
    there.add_argument("--rows", type=int, default=16, help="of a device and step; strong scaling: times --strong")
    there.add_argument("--strong", type=int, default=64, help="devices whose rows strong scaling shares out")
    there.add_argument("--micro-rows", type=int, help="in a forward pass; default: what fits")
    there.add_argument("--seq-len", type=int, default=2048)
    there.add_argument("--seconds", type=float, help="of forward and backward of a micro-batch, where measured")
    there.add_argument("--inner", type=float, default=NVLINK.bandwidth, help="bytes/s between devices of a node")
    there.add_argument("--inner-latency", type=float, default=NVLINK.latency)
    there.add_argument("--outer", type=float, default=INFINIBAND.bandwidth, help="bytes/s of a device between nodes")
    there.add_argument("--outer-latency", type=float, default=INFINIBAND.latency)
    there.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    there.add_argument("--copied", type=float, default=10e9, help="bytes/s of a device to host memory")
    there.add_argument("--written", type=float, default=1e9, help="bytes/s of a rank to the file system")
    there.add_argument("--written-in-all", type=float, default=50e9, help="bytes/s that the file system takes")
    there.add_argument("--workers", type=int, default=8, help="processes of a device that tokenise")
    there.add_argument("--encoded", type=float, default=300e3, help="tokens/s that one makes (docs/log.md)")
    there.add_argument("--unpacked", type=float, default=30e6, help="tokens/s that one unpacks and passes over")
    there.add_argument("--shards", type=int, default=1024, help="of the corpus; C4 has 1,024")
    return parser.parse_args()


def main() -> None:
    """Do as asked; a mistake is one message and exit code 2."""
    args = parse()
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # says of every start who has met
    try:
        {"check": check, "paper": paper}[args.command](args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_command(main)
