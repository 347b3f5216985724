"""How long a step takes on many devices, from one device's step and what the ranks send each other.

Messages are priced by their latency and their bytes (the alpha-beta model), collectives as rings, or trees where those
are faster, as in Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH"
(2005); between nodes each device exchanges with its like, after and before an exchange within the node. What a strategy
sends while it computes is laid beside the computation, block by block. Arithmetic alone: imports no torch.

In formulas: W ranks, n bytes, a latency, B bytes a second, P parameters, b bytes of a value that is computed with.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from models import budget
from train.plan import DEEPSPEED_BUCKET, Workload, checkpoint_bytes, shards_of

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]

DDP_BUCKETS = (2**20, 25 * 2**20)
"""Bytes of DDP's first bucket and of the others, torch's defaults."""

SUMS = 3
"""Sums of a few numbers in a step of train/loop.py: targets and signals, loss, gradient norm."""

FORWARD = 1 / 3
"""Share of the forward pass in forward and backward together."""


@dataclass(frozen=True)
class Link:
    """What stands between two ranks."""

    latency: float
    """Seconds that a message takes however small it is."""
    bandwidth: float
    """Bytes a second, in each direction at once."""


NVLINK = Link(5e-6, 350e9)
"""Between the GPUs of a node: an assumption, somewhat less than the 450 GB/s in each direction that NVIDIA's H100
datasheet promises."""

INFINIBAND = Link(15e-6, 45e9)
"""Between nodes, of a GPU with an adapter of 400 Gbit/s for itself: an assumption as well."""


@dataclass(frozen=True)
class Message:
    """One collective."""

    operation: Operation
    size: int
    """Bytes of the whole: of what is summed, of all parts together, or of what a rank sends to all (all_to_all)."""
    over: Literal["all", "node", "nodes"] = "all"
    """Who takes part: all ranks, those of a node, or one of each node."""


@dataclass(frozen=True)
class Network:
    """The ranks and the links between them."""

    nodes: int
    devices: int
    """Ranks of a node."""
    inner: Mapping[Operation, Link] | Link
    """Between the ranks of a node, one for all operations or one each."""
    outer: Link | None = None
    """Between nodes, for each device."""
    hides: bool = True
    """Communication goes on beside computation: a GPU's does; a CPU whose cores all compute has nothing left for it."""

    def seconds(self, message: Message | None) -> float:
        """How long a message takes; 0 for none."""
        if message is None:
            return 0.0
        operation, size = message.operation, message.size
        inner = self.inner if isinstance(self.inner, Link) else self.inner[operation]
        if message.over == "node" or (message.over == "all" and self.nodes == 1):
            return collective(operation, size, self.devices, inner)
        assert self.outer is not None
        if message.over == "nodes":
            return collective(operation, size, self.nodes, self.outer)
        part = size if operation == "all_to_all" else size / self.devices
        outside = collective(operation, part, self.nodes, self.outer)
        if operation == "all_reduce":
            around = collective("reduce_scatter", size, self.devices, inner)
            return around + outside + collective("all_gather", size, self.devices, inner)
        return outside + collective(operation, size, self.devices, inner)


def collective(operation: Operation, size: float, ranks: int, link: Link) -> float:
    """Seconds of a collective among equal links.

    A ring: (W - 1)·a + n·(W - 1)/W / B, an all_reduce twice that, or as a tree 2·log2(W)·a + 2·n/B where that is less.
    """
    if ranks == 1:
        return 0.0
    ring = (ranks - 1) * link.latency + size * (ranks - 1) / ranks / link.bandwidth
    if operation != "all_reduce":
        return ring
    return 2 * min(ring, math.ceil(math.log2(ranks)) * link.latency + size / link.bandwidth)


@dataclass(frozen=True)
class Unit:
    """A part of a pass that is computed as one."""

    share: float
    """Of the pass's computation."""
    before: Message | None = None
    """What must have come before it can be computed; fetched while the unit before is computed."""
    after: tuple[Message, ...] = ()
    """What is sent, one after the other, when it has been computed."""


@dataclass(frozen=True)
class Exchange:
    """All that the ranks send each other in a step."""

    forward: tuple[Unit, ...]
    """Of each micro-batch."""
    backward: tuple[Unit, ...]
    last_backward: tuple[Unit, ...]
    """Of the last micro-batch."""
    at_end: tuple[Message, ...]
    """After the last backward pass, beside which nothing is computed."""


ALONE = (Unit(1.0),)
"""A pass without messages."""


def exchange(job: Workload, strategy: str) -> Exchange:
    """What is sent in a step of a workload under ddp, fsdp, hsdp, deepspeed-2 or deepspeed-3 (offload as 3).

    ddp sums the fp32 gradients, 4·P, in buckets as they come, once a step. fsdp, hsdp and ZeRO-3 gather each block's
    weights, b each, in both passes, and cut up its gradients after it (in fp32; ZeRO-3's are b each), for every
    micro-batch; embedding, last norm and head are gathered once. hsdp does so within a node, and sums each shard over
    nodes in the last micro-batch. ZeRO-2 cuts up gradients in buckets and gathers the new weights at the end.
    """
    counts, size = budget.parameters(job.config), job.value_bytes
    sums = (Message("all_reduce", 8),) * SUMS
    end = (*muon_messages(job, strategy), *sums)
    if strategy == "ddp":
        return Exchange(ALONE, ALONE, _bucketed("all_reduce", 4 * counts.total, *DDP_BUCKETS), end)
    if strategy == "deepspeed-2":
        bucket = size * DEEPSPEED_BUCKET
        backward = _bucketed("reduce_scatter", size * counts.total, bucket, bucket)
        return Exchange(ALONE, backward, backward, (Message("all_gather", size * counts.total), *end))
    over: Literal["all", "node"] = "node" if strategy == "hsdp" else "all"
    gradient = size if strategy.startswith("deepspeed") else 4
    root = counts.embedding + counts.head + job.config.width
    block = (counts.total - root) // job.config.layers
    share = 1 / job.config.layers
    fetch, cut = Message("all_gather", size * block, over), Message("reduce_scatter", gradient * block, over)
    forward = (Unit(0.0, Message("all_gather", size * root, over)), *(Unit(share, fetch),) * job.config.layers)
    root_cut = Message("reduce_scatter", gradient * root, over)
    backward = (*(Unit(share, fetch, (cut,)),) * job.config.layers, Unit(0.0, None, (root_cut,)))
    if strategy != "hsdp":
        return Exchange(forward, backward, backward, end)
    shards = job.machine.devices
    over_nodes = [tuple(Message("all_reduce", one.size // shards, "nodes") for one in unit.after) for unit in backward]
    last = tuple(replace(unit, after=unit.after + more) for unit, more in zip(backward, over_nodes, strict=True))
    return Exchange(forward, backward, last, end)


def muon_messages(job: Workload, strategy: str) -> tuple[Message, ...]:
    """What Muon's ranks send each other in a step, for every shape of matrices: nothing under AdamW.

    Under ddp each gathers all updates from those that share the work, b a weight of a share rounded up to whole
    matrices; under fsdp and hsdp it sends its shards to the matrices' owners and gets its rows of the updates back.
    """
    if job.optimizer != "muon":
        return ()
    hidden = [s for name, s in budget.parameter_shapes(job.config).items() if name.startswith("blocks.") and len(s) > 1]
    messages = []
    for shape, count in Counter(hidden).items():
        matrix, sharers = job.value_bytes * math.prod(shape), muon_sharers(job, strategy)
        over: Literal["all", "node"] = "node" if sharers < job.machine.world else "all"
        if strategy == "ddp":
            messages.append(Message("all_gather", sharers * -(-count // sharers) * matrix, over))
        else:
            messages += [Message("all_to_all", count * matrix // sharers, over)] * 2
    return tuple(messages)


def muon_sharers(job: Workload, strategy: str) -> int:
    """The ranks that share Muon's work: under ddp those of a node, or all where each is one of its own."""
    if strategy != "ddp":
        return shards_of(job, strategy)
    return job.machine.devices if job.machine.devices > 1 else job.machine.world


def _bucketed(operation: Operation, size: int, first: int, bucket: int) -> tuple[Unit, ...]:
    """A backward pass that sends its gradients, ``size`` bytes, in buckets as they fill."""
    sizes = [min(first, size)]
    while sum(sizes) < size:
        sizes.append(min(bucket, size - sum(sizes)))
    return tuple(Unit(one / size, None, (Message(operation, one),)) for one in sizes)


def elapsed(units: Sequence[Unit], compute: float, network: Network) -> float:
    """Seconds of a pass whose computation alone takes ``compute``."""
    if not network.hides:
        return compute + sum(network.seconds(one) for unit in units for one in (unit.before, *unit.after))
    clock, wire = 0.0, network.seconds(units[0].before)  # when the device and the network are free
    arrived = wire
    for unit, following in zip(units, [*units[1:], Unit(0.0)], strict=True):
        begun = max(clock, arrived)
        clock = begun + unit.share * compute
        arrived = 0.0
        if following.before is not None:
            arrived = wire = max(wire, begun) + network.seconds(following.before)
        if unit.after:
            wire = max(wire, clock) + sum(map(network.seconds, unit.after))
    return max(clock, wire)


@dataclass(frozen=True)
class Compute:
    """Seconds on one device, measured."""

    passes: float
    """Forward and backward of a micro-batch."""
    update: float
    """Clipping and the optimiser on all parameters."""


@dataclass(frozen=True)
class Saving:
    """How checkpoints are written (train/checkpoint.py): each rank copies its part aside, and writes it meanwhile."""

    every: int
    """Steps."""
    copied: float
    """Bytes a second to a rank's host memory."""
    written: float
    """Bytes a second of a rank to the file system."""
    written_in_all: float
    """Bytes a second that the file system takes from all ranks."""

    def seconds(self, size: int, ranks: int, step: float) -> float:
        """What a checkpoint of ``size`` bytes costs a step of ``step`` seconds on average.

        The stop for the copy, and where writing takes longer than the steps until the next one, waiting for it.
        """
        stop = size / ranks / self.copied
        writing = size / min(ranks * self.written, self.written_in_all)
        return (stop + max(0.0, writing - self.every * step)) / self.every


@dataclass(frozen=True)
class Reading:
    """How a rank gets its rows."""

    workers: int
    """Processes a rank."""
    encoded: float
    """Tokens a second that one makes of text."""
    unpacked: float
    """Tokens a second of text that one unpacks and passes over."""
    shards: int
    """Of the corpus."""

    def seconds(self, tokens: int, ranks: int, step: float) -> float:
        """What a step of ``step`` seconds waits for its ``tokens`` of each rank.

        Where more workers than shards read, those of a shard each unpack all of it and keep their part.
        """
        sharing = max(1.0, ranks * self.workers / self.shards)
        rate = self.workers / (1 / self.encoded + (sharing - 1) / self.unpacked)
        return max(0.0, tokens / rate - step)


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they are for."""

    compute: float
    communication: float
    """What is not hidden behind the computation."""
    checkpoint: float = 0.0
    data: float = 0.0

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.communication + self.checkpoint + self.data


def predict(
    job: Workload,
    strategy: str,
    micro_rows: int,
    compute: Compute,
    network: Network,
    saving: Saving | None = None,
    reading: Reading | None = None,
) -> Step:
    """A step of a workload whose machine is the network's ranks.

    Args:
        job: what is trained on what.
        strategy: as in :func:`exchange`.
        micro_rows: rows of a micro-batch.
        compute: of one device with as many rows.
        network: between the devices.
        saving: of checkpoints; None saves none.
        reading: of the rows; None has them there.

    Raises:
        UserError: the ranks cannot share the batch.
    """
    world, share = job.machine.world, job.share
    sent = exchange(job, strategy)
    forward, backward = FORWARD * compute.passes, (1 - FORWARD) * compute.passes
    one = elapsed(sent.forward, forward, network) + elapsed(sent.backward, backward, network)
    last = elapsed(sent.forward, forward, network) + elapsed(sent.last_backward, backward, network)
    passes = (share // micro_rows - 1) * one + last
    end = sum(network.seconds(message) for message in sent.at_end)
    shared = muon_sharers(job, strategy) if job.optimizer == "muon" else shards_of(job, strategy)
    alone = share // micro_rows * compute.passes + compute.update / shared
    step = passes + end + compute.update / shared
    size = checkpoint_bytes(job.config, job.optimizer)
    return Step(
        alone,
        max(0.0, step - alone),
        0.0 if saving is None else saving.seconds(size, world, step),
        0.0 if reading is None else reading.seconds(share * job.seq_len, world, step),
    )
