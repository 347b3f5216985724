"""What a run will cost and whether it fits, before it starts: ``python train.py --size 1b --plan``.

Arithmetic on the shape, the machine and the settings (models/budget.py): imports no torch, touches neither
a GPU nor the data. The trainer asks the same functions which strategy and micro-batch to take; what is
printed is in train/plan_table.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common.errors import UserError
from models import budget
from models.budget import State
from models.gpus import Gpu
from models.sizes import ModelConfig

if TYPE_CHECKING:
    from train.settings import RunSettings

RESERVE = 0.08
"""Share of a device's memory that is left to CUDA's context and libraries (about 1 GB), NCCL's buffers (1 to 2 GB on
a node of 8) and fragmentation: an assumption, not measured."""

ENOUGH_TOKENS = {"cpu": 4_096, "cuda": 65_536}
"""Tokens in a forward pass beyond which more gain nothing: a GPU's matrix products are as efficient as they get long
before, a CPU's leave its caches."""

ASSUMED_MFU = 0.40
"""Share of the dense bf16 peak that training is assumed to reach. Public trainers of 125M to 3B parameters report 35 to
50% on 8 H100s (llm-foundry's benchmarking tables, nanotron, nanochat) and more on A100s; deep and thin shapes
and anything below 60M parameters will lie lower."""

MEASURED_MFU = {("h200", "125m"): 0.419, ("h200", "c4-130m"): 0.480, ("h200", "c4-1b"): 0.535}
"""MFU by (GPU, size) that bench/train_gpu.py and bench/profile_step.py measured on one device in rows of 2,048 tokens,
which counts instead of the assumption (docs/log.md)."""

DEEPSPEED_BUCKET = 200_000_000
"""Values in DeepSpeed's buckets for communication, Lightning's default."""

CHECKPOINTING = ("none", "selective", "full")
"""From the least recomputation to the most."""

DEFAULT_GPU = "h100-80g"


@dataclass(frozen=True)
class Machine:
    """What a run is spread over."""

    gpu: Gpu
    devices: int = 1
    """Devices of a node."""
    nodes: int = 1

    @property
    def world(self) -> int:
        """Processes, one a device."""
        return self.devices * self.nodes

    @property
    def room(self) -> int:
        """Bytes of a device that training may take: all but :data:`RESERVE`."""
        return int(self.gpu.memory * (1 - RESERVE))

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """The kind of its devices, as torch calls it."""
        return "cpu" if self.gpu.is_cpu else "cuda"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by what they are."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    """The head's gradients and one chunk of logits."""
    buffers: int
    """Copies of weights in bf16 or unsharded, communication, and what a block's backward pass or the optimiser's step
    need beyond the room that the head's passes, and for the step the activations, have left by then."""

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers


@dataclass(frozen=True)
class Fit:
    """One way of running: how it is spread, what is recomputed, how many rows at a time, and what that takes."""

    strategy: str
    checkpointing: str
    micro_rows: int
    memory: Memory
    room: int

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.memory.total <= self.room


@dataclass(frozen=True)
class Workload:
    """Everything that decides how a run may be spread and how much memory it takes."""

    config: ModelConfig
    machine: Machine
    rows: int
    """Rows in a global batch."""
    seq_len: int
    """Tokens in a row."""
    precision: str
    """32 or bf16."""
    optimizer: str
    """adamw or muon."""
    strategy: str = "auto"
    """auto, or the one that is asked for."""
    checkpointing: str = "auto"
    """auto, none, selective or full."""
    micro_rows: int | None = None
    """Rows in a forward pass; None: what fits."""
    compiled: bool | None = None
    """The blocks are compiled, which keeps fewer activations. None: on a GPU."""
    trainable: int | None = None
    """Parameters that are trained, where the others are frozen (LoRA). None: all."""
    taken: int = 0
    """Bytes of a device that something else takes, such as a teacher."""

    @property
    def room(self) -> int:
        """Bytes of a device that training may take."""
        return max(0, self.machine.room - self.taken)

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that is computed with."""
        return 2 if self.precision == "bf16" else 4

    @property
    def is_compiled(self) -> bool:
        """Whether the blocks are compiled, as resolved."""
        return not self.machine.gpu.is_cpu if self.compiled is None else self.compiled

    @property
    def share(self) -> int:
        """Rows of each device; UserError with the nearest batches that can be shared."""
        return share_of_rows(self.rows * self.seq_len, self.seq_len, self.machine.world)

    def micro_batches(self) -> list[int]:
        """Rows that a forward pass may have, most first: divisors of a device's share, not beyond need."""
        if self.micro_rows is not None:
            check_micro_batch(self.micro_rows, self.share)
            return [self.micro_rows]
        most = max(1, ENOUGH_TOKENS[self.machine.kind] // self.seq_len)
        return [rows for rows in range(min(self.share, most), 0, -1) if self.share % rows == 0]


def ways(job: Workload) -> list[Fit]:
    """The best way of running under each strategy: the least recomputation and then the most rows that fit.

    Where nothing fits under a strategy, what comes nearest to it. Without a strategy asked for: every one
    that the machine has a use for.

    Raises:
        UserError: the devices cannot share the batch evenly, or the micro-batch does not divide a share.
    """
    names = strategies(job.machine) if job.strategy == "auto" else (job.strategy,)
    levels = CHECKPOINTING if job.checkpointing == "auto" else (job.checkpointing,)
    micro_batches = job.micro_batches()
    return [_best_under(job, name, levels, micro_batches) for name in names]


def best(job: Workload) -> Fit:
    """How to run: as asked for, or of ddp, hsdp and fsdp the first that fits, else what needs least.

    ddp communicates least; hsdp keeps the gathering of weights within a node; fsdp needs the least memory.
    auto never takes DeepSpeed.

    Raises:
        UserError: as :func:`ways`.
    """
    found = ways(job)
    if job.strategy == "auto":
        found = [fit for fit in found if not fit.strategy.startswith("deepspeed")]
    return next((fit for fit in found if fit.fits), min(found, key=lambda fit: fit.memory.total))


def strategies(machine: Machine) -> tuple[str, ...]:
    """The strategies that there is a use for, those that auto chooses from first and in its order."""
    several = ("hsdp", "fsdp") if machine.nodes > 1 and machine.devices > 1 else ("fsdp",)
    ours = ("ddp", *several) if machine.world > 1 else ("ddp",)
    zero = ("deepspeed-2", "deepspeed-3", "deepspeed-3-offload") if machine.world > 1 else ("deepspeed-3-offload",)
    return (*ours, *zero)


def _best_under(job: Workload, strategy: str, levels: tuple[str, ...], micro_batches: list[int]) -> Fit:
    fit = None
    for checkpointing in levels:
        for rows in micro_batches:
            fit = Fit(strategy, checkpointing, rows, memory(job, strategy, checkpointing, rows), job.room)
            if fit.fits:
                return fit
    assert fit is not None
    return fit


def memory(job: Workload, strategy: str, checkpointing: str, micro_rows: int) -> Memory:
    """Bytes on the fullest device at the peak of a step, which most often is the head's, after the last block.

    Gradients count in full there: they are, with several micro-batches or in ddp's buckets.
    """
    tokens, size = micro_rows * job.seq_len, job.value_bytes
    kind, compiled = job.machine.kind, job.is_compiled and not strategy.startswith("deepspeed-3")
    state = device_state(job, strategy)
    chunk = budget.HEAD_CHUNK[kind]
    logits = budget.head_bytes(job.config, tokens, size, chunk=chunk, compiled=compiled)
    backward = budget.backward_bytes(job.config, tokens, size, checkpointing=checkpointing, compiled=compiled)
    activations = budget.activation_bytes(
        job.config,
        micro_rows,
        job.seq_len,
        size,
        checkpointing=checkpointing,
        compiled=compiled,
    )
    step = step_bytes(job, strategy)
    buffers = buffer_bytes(job, strategy) + max(0, backward - logits, step - activations - logits)
    return Memory(state.weights, state.gradients, state.optimizer, activations, logits, buffers)


def device_state(job: Workload, strategy: str) -> State:
    """Bytes of weights, gradients and optimiser on the fullest device.

    Exact for ddp, fsdp and hsdp (:func:`models.budget.state_bytes`). Roughly for DeepSpeed, whose ZeRO cuts one
    flat vector into W parts: stage 2 weights b·P, gradients 4·P/W, fp32 weights and moments 12·P/W; stage 3
    weights b·P/W as well; with offload gradients b·P/W, and the rest of the optimiser in main memory. Where only R
    parameters are trained (not under DeepSpeed): weights b·P + 4·R, gradients 4·R, AdamW's moments 8·R.
    """
    if job.trainable is not None:
        shards, extra = shards_of(job, strategy), job.trainable
        weights = job.value_bytes * budget.parameters(job.config).total + 4 * extra
        return State(-(-weights // shards), -(-4 * extra // shards), -(-8 * extra // shards))
    if not strategy.startswith("deepspeed"):
        return budget.state_bytes(job.config, job.optimizer, shards=shards_of(job, strategy))
    count = budget.parameters(job.config).total
    part = -(-count // job.machine.world)
    if strategy == "deepspeed-3-offload":
        return State(job.value_bytes * part, job.value_bytes * part, 0)
    return State(job.value_bytes * (count if strategy == "deepspeed-2" else part), 4 * part, 12 * part)


def buffer_bytes(job: Workload, strategy: str) -> int:
    """Bytes of weights' copies and of communication; roughly, but for ddp.

    ddp: in bf16, autocast's copies of the blocks' weights, 2 bytes each, from forward to backward; its buckets
    are the gradients themselves. fsdp, hsdp and deepspeed-3: embedding, head and last norm whole all along
    and the head's whole gradient, b each; two blocks whole, one's gradients, b each, and those in fp32 for
    reduction. DeepSpeed also has a bucket to send from, and in stage 2 one to gather into.
    """
    config, size = job.config, job.value_bytes
    counts = budget.parameters(config)
    bucket = size * min(DEEPSPEED_BUCKET, counts.total)
    if strategy == "ddp":
        return 2 * counts.layers if size == 2 else 0
    if strategy == "deepspeed-2":
        return 2 * bucket
    block = (counts.layers - config.width) // config.layers
    root = counts.embedding + counts.head + config.width
    whole = size * (root + counts.embedding) + block * (3 * size + 4)
    return whole + (bucket if strategy.startswith("deepspeed") else 0)


def step_bytes(job: Workload, strategy: str) -> int:
    """Bytes that the optimiser's step needs beside its state: none for fused AdamW, roughly 10·L·2·F·D/W for Muon.

    Under DeepSpeed it is always AdamW. Muon handles all matrices of a shape together, at worst gate and up:
    directions in fp32 and bf16, and Newton-Schulz's products.
    """
    if job.optimizer != "muon" or strategy.startswith("deepspeed"):
        return 0
    largest = 2 * job.config.layers * job.config.ffn * job.config.width
    return 10 * largest // shards_of(job, strategy)


def shards_of(job: Workload, strategy: str) -> int:
    """Devices that share the optimiser's state."""
    return {"ddp": 1, "hsdp": job.machine.devices}.get(strategy, job.machine.world)


def warn_if_too_big(fit: Fit) -> str | None:
    """What to say before a run starts that the plan says will not fit; None when it does."""
    if fit.fits:
        return None
    parts = vars(fit.memory).items()
    largest = ", ".join(f"{gb(value)} {name}" for name, value in sorted(parts, key=lambda part: -part[1])[:3])
    remedies = {"ddp": "--strategy fsdp on more devices", "hsdp": "--strategy fsdp", "fsdp": "more devices"}
    more = [remedies.get(fit.strategy, "more devices"), "a shorter --seq-len"]
    if fit.checkpointing != "full":
        more.insert(0, "--activation-checkpointing full")
    if fit.micro_rows > 1:
        more.insert(0, "a smaller --micro-batch")
    return (
        f"the plan needs {gb(fit.memory.total)} on a device and {gb(fit.room)} can be used, under {fit.strategy} with "
        f"{fit.checkpointing} activation checkpointing and {fit.micro_rows} rows a forward pass ({largest}); "
        f"it may run out of memory: try {', '.join(more[:-1])} or {more[-1]}"
    )


def tokens_per_second(
    config: ModelConfig,
    seq_len: int,
    machine: Machine,
    checkpointing: str,
    mfu: float,
    teacher: ModelConfig | None = None,
) -> float:
    """Expected speed of all devices: W · peak · MFU / (FLOPs a token, what is recomputed and a teacher's included).

    A teacher's forward pass is a third of what training it would take. Takes it that communication is hidden behind
    computation and data always there.
    """
    assert machine.gpu.peak is not None
    flops = budget.flops_per_token(config, seq_len) + budget.recomputed_flops(config, seq_len, checkpointing)
    taught = 0 if teacher is None else budget.flops_per_token(teacher, seq_len) // 3
    return machine.world * machine.gpu.peak * mfu / (flops + taught)


def checkpoint_bytes(config: ModelConfig, optimizer: str) -> int:
    """Bytes of a checkpoint's tensors: fp32 weights and the optimiser, once, however many devices there are."""
    state = budget.state_bytes(config, optimizer)
    return state.weights + state.optimizer


def workload_of(settings: "RunSettings", config: ModelConfig, machine: Machine) -> Workload:
    """What resolved settings ask for on a machine; precision is chosen as on that device."""
    assert settings.seq_len is not None
    assert settings.batch_tokens is not None
    precision = settings.precision
    if precision == "auto":
        precision = "32" if machine.gpu.is_cpu else "bf16"
    return Workload(
        config,
        machine,
        rows=settings.batch_tokens // settings.seq_len,
        seq_len=int(settings.seq_len),
        precision=precision,
        optimizer=settings.optimizer.name,
        strategy=settings.strategy,
        checkpointing=settings.activation_checkpointing,
        micro_rows=settings.micro_batch,
        compiled=None if settings.compile == "auto" else settings.compile == "on",
    )


def gb(count: float) -> str:
    """Bytes for people: ``2.10 GB``, ``47.2 MB``."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def share_of_rows(batch_tokens: int, seq_len: int, world: int) -> int:
    """Rows of a global batch that each device gets; UserError with the nearest batches when it is no whole number."""
    rows = batch_tokens // seq_len
    if rows % world:
        below = rows // world * world
        near = " or ".join(str(count * seq_len) for count in (below, below + world) if count)
        raise UserError(
            f"a batch of {batch_tokens} tokens is {rows} rows of {seq_len}, which {world} devices cannot share evenly; "
            f"use a number of devices that divides the rows, or --batch-tokens {near}"
        )
    return rows // world


def check_micro_batch(rows: int, share: int) -> None:
    """UserError with the nearest that does when a micro-batch does not divide a device's share of the rows."""
    if share % rows:
        near = min((n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - rows))
        raise UserError(f"--micro-batch {rows} does not divide the {share} rows of each device; use {near}")
