"""What a run will cost and whether it fits, before it starts: ``python train.py --size 1b --plan``.

Arithmetic on the shape, the machine and the settings (models/budget.py): imports no torch, touches neither
a GPU nor the data. The trainer asks the same functions which strategy and micro-batch to take. What only
printing needs is imported there, so that the arithmetic works wherever torch does (bench/memory.py).
"""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Required, TypedDict, Unpack

from common.errors import UserError
from models import budget, gpus
from models.budget import State
from models.gpus import Gpu
from models.sizes import ModelConfig

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from train.settings import TrainCommand, TrainSettings

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

MEASURED_MFU: dict[tuple[str, str], float] = {}
"""MFU by (GPU, size) that bench/ measured, which counts instead of the assumption. Nothing has been measured yet."""

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


class Asked(TypedDict, total=False):
    """What :func:`fits` and :func:`choose` are asked for, beside the shape and the machine."""

    rows: Required[int]
    seq_len: Required[int]
    precision: Required[str]
    optimizer: Required[str]
    strategy: str
    checkpointing: str
    micro_rows: int | None
    compiled: bool | None


@dataclass(frozen=True)
class Job:
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

    @property
    def value_bytes(self) -> int:
        """Bytes of a value that is computed with."""
        return 2 if self.precision == "bf16" else 4

    @property
    def is_compiled(self) -> bool:
        """Whether the blocks are compiled, as resolved."""
        return not self.machine.gpu.is_cpu if self.compiled is None else self.compiled

    def rows_a_device(self) -> int:
        """Each device's share of the batch; UserError with the nearest batches that can be shared."""
        world = self.machine.world
        if self.rows % world:
            below = self.rows // world * world
            near = " or ".join(str(rows * self.seq_len) for rows in (below, below + world) if rows)
            raise UserError(
                f"a batch of {self.rows * self.seq_len} tokens is {self.rows} rows of {self.seq_len}, which {world} "
                f"devices cannot share evenly; use --batch-tokens {near}"
            )
        return self.rows // world

    def micro_batches(self) -> list[int]:
        """Rows that a forward pass may have, most first: divisors of a device's share, not beyond need."""
        share = self.rows_a_device()
        divisors = [rows for rows in range(share, 0, -1) if share % rows == 0]
        if self.micro_rows is not None:
            if self.micro_rows not in divisors:
                near = min(reversed(divisors), key=lambda rows: abs(rows - (self.micro_rows or 0)))
                raise UserError(
                    f"--micro-batch {self.micro_rows} does not divide the {share} rows of each device; use {near}"
                )
            return [self.micro_rows]
        most = max(1, ENOUGH_TOKENS[self.machine.kind] // self.seq_len)
        return [rows for rows in divisors if rows <= most]


def fits(config: ModelConfig, machine: Machine, **asked: Unpack[Asked]) -> list[Fit]:
    """The best way of running under each strategy, see :func:`ways`."""
    return ways(Job(config, machine, **asked))


def choose(config: ModelConfig, machine: Machine, **asked: Unpack[Asked]) -> Fit:
    """How to run, see :func:`best`."""
    return best(Job(config, machine, **asked))


def ways(job: Job) -> list[Fit]:
    """The best way of running under each strategy: the least recomputation and then the most rows that fit.

    Where nothing fits under a strategy, what comes nearest to it. Without a strategy asked for: every one
    that the machine has a use for.

    Raises:
        UserError: the devices cannot share the batch evenly, or the micro-batch does not divide a share.
    """
    names = strategies(job.machine, job.optimizer) if job.strategy == "auto" else (job.strategy,)
    levels = CHECKPOINTING if job.checkpointing == "auto" else (job.checkpointing,)
    micro_batches = job.micro_batches()
    return [_best_under(job, name, levels, micro_batches) for name in names]


def best(job: Job) -> Fit:
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


def strategies(machine: Machine, optimizer: str = "adamw") -> tuple[str, ...]:
    """The strategies that there is a use for, those that auto chooses from first and in its order."""
    several = ("hsdp", "fsdp") if machine.nodes > 1 and machine.devices > 1 else ("fsdp",)
    ours = ("ddp", *several) if machine.world > 1 else ("ddp",)
    zero = ("deepspeed-2", "deepspeed-3", "deepspeed-3-offload") if machine.world > 1 else ("deepspeed-3-offload",)
    return ours if optimizer == "muon" else (*ours, *zero)  # DeepSpeed brings its own optimiser


def _best_under(job: Job, strategy: str, levels: tuple[str, ...], micro_batches: list[int]) -> Fit:
    fit = None
    for checkpointing in levels:
        for rows in micro_batches:
            fit = Fit(strategy, checkpointing, rows, memory(job, strategy, checkpointing, rows), job.machine.room)
            if fit.fits:
                return fit
    assert fit is not None
    return fit


def memory(job: Job, strategy: str, checkpointing: str, micro_rows: int) -> Memory:
    """Bytes on the fullest device at the peak of a step, which most often is the head's, after the last block.

    Gradients count in full there: they are, with several micro-batches or in ddp's buckets.
    """
    tokens, size = micro_rows * job.seq_len, job.value_bytes
    kind, compiled = job.machine.kind, job.is_compiled
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
        masked=kind == "cpu",
    )
    step = step_bytes(job, strategy)
    buffers = buffer_bytes(job, strategy) + max(0, backward - logits, step - activations - logits)
    return Memory(state.weights, state.gradients, state.optimizer, activations, logits, buffers)


def device_state(job: Job, strategy: str) -> State:
    """Bytes of weights, gradients and optimiser on the fullest device.

    Exact for ddp, fsdp and hsdp (:func:`models.budget.state_bytes`). Roughly for DeepSpeed, whose ZeRO cuts one
    flat vector into W parts: stage 2 weights b·P, gradients 4·P/W, fp32 weights and moments 12·P/W; stage 3
    weights b·P/W as well; with offload gradients b·P/W, and the rest of the optimiser in main memory.
    """
    if not strategy.startswith("deepspeed"):
        return budget.state_bytes(job.config, job.optimizer, shards=_shards(job, strategy))
    count = budget.parameters(job.config).total
    part = -(-count // job.machine.world)
    if strategy == "deepspeed-3-offload":
        return State(job.value_bytes * part, job.value_bytes * part, 0)
    return State(job.value_bytes * (count if strategy == "deepspeed-2" else part), 4 * part, 12 * part)


def buffer_bytes(job: Job, strategy: str) -> int:
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


def step_bytes(job: Job, strategy: str) -> int:
    """Bytes that the optimiser's step needs beside its state: none for fused AdamW, roughly 10·L·2·F·D/W for Muon.

    Muon handles all matrices of a shape together, at worst gate and up: directions in fp32 and bf16, and
    Newton-Schulz's products.
    """
    if job.optimizer != "muon":
        return 0
    largest = 2 * job.config.layers * job.config.ffn * job.config.width
    return 10 * largest // _shards(job, strategy)


def _shards(job: Job, strategy: str) -> int:
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


def tokens_per_second(config: ModelConfig, seq_len: int, machine: Machine, checkpointing: str, mfu: float) -> float:
    """Expected speed of all devices: W · peak · MFU / (FLOPs a token, what is recomputed included).

    Takes it that communication is hidden behind computation and data always there.
    """
    assert machine.gpu.peak is not None
    flops = budget.flops_per_token(config, seq_len) + budget.recomputed_flops(config, seq_len, checkpointing)
    return machine.world * machine.gpu.peak * mfu / flops


def checkpoint_bytes(config: ModelConfig, optimizer: str) -> int:
    """Bytes of a checkpoint's tensors: fp32 weights and the optimiser, once, however many devices there are."""
    state = budget.state_bytes(config, optimizer)
    return state.weights + state.optimizer


# The printed plan


@dataclass(frozen=True)
class Row:
    """A figure and how it comes about."""

    name: str
    value: str
    formula: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the plan: figures, or a table whose columns are explained by ``rows``."""

    title: str
    rows: list[Row]
    table: list[list[str]] | None = None
    """Lines of a table, the headings first."""


def print_plan(command: "TrainCommand") -> None:
    """Print the plan of a run, all that ``--plan`` does.

    Raises:
        UserError: the settings contradict each other, the devices cannot share the batch, or no such GPU.
    """
    from rich.console import Console

    from train.settings import model_config, resolve

    config = model_config(command)
    settings = resolve(command, config)
    machine, why = machine_of(command)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    for section in describe(settings, config, machine, price=command.price, why=why):
        console.print(_rendered(section, command.explain))
    if not command.explain:
        console.print("--explain adds the formula of every figure.", markup=False)


def machine_of(command: "TrainCommand") -> tuple[Machine, str]:
    """The machine to plan for, and where it is known from."""
    devices, nodes = command.devices or 1, command.nodes or 1
    if command.gpu is not None:
        return Machine(gpus.gpu(command.gpu), devices, nodes), "as given"
    if command.device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(gpus.cpu(memory // devices), devices, nodes), "this machine's"
    name = gpu_here()
    known = gpus.named_by(name) if name else None
    if known is not None:
        return Machine(known, devices, nodes), "the one that is here"
    why = f"{name}, which is here, is not in the table" if name else "none is here; --gpu names another"
    return Machine(gpus.gpu(DEFAULT_GPU), devices, nodes), why


def gpu_here() -> str | None:
    """What the driver calls the first GPU of this machine; None without one."""
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=2, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.splitlines()), "").strip() or None


def describe(
    settings: "TrainSettings", config: ModelConfig, machine: Machine, *, price: float | None = None, why: str = ""
) -> list[Section]:
    """The plan of a run, every figure with its formula.

    Args:
        settings: resolved (:func:`train.settings.resolve`).
        config: the shape.
        machine: what it runs on.
        price: dollars a device-hour.
        why: where the machine is known from.
    """
    job = job_of(settings, config, machine)
    fit = best(job)
    others = [way for way in ways(replace(job, strategy="auto")) if way.strategy != fit.strategy]
    order = ("ddp", "hsdp", "fsdp", "deepspeed-2", "deepspeed-3", "deepspeed-3-offload")
    every = sorted([fit, *others], key=lambda way: order.index(way.strategy))
    return [
        _model(config),
        _run(settings, config),
        _memory(job, every, why),
        _chosen(job, fit),
        _time(settings, job, fit, price),
        _checkpoint(settings, config),
        _phone(config),
    ]


def job_of(settings: "TrainSettings", config: ModelConfig, machine: Machine) -> Job:
    """What resolved settings ask for on a machine; precision is chosen as on that device."""
    assert settings.seq_len is not None
    assert settings.batch_tokens is not None
    precision = settings.precision
    if precision == "auto":
        precision = "32" if machine.gpu.is_cpu else "bf16"
    return Job(
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


def _model(config: ModelConfig) -> Section:
    counts = budget.parameters(config)
    qk_norm = " + 2·N" if config.qk_norm else ""
    symbols = {
        "L": config.layers,
        "D": config.width,
        "H": config.heads,
        "K": config.kv_heads,
        "N": config.head_width,
        "F": config.ffn,
        "V": config.vocab,
    }
    shape = f"{config.layers} layers of width {config.width}, {config.heads} heads, {config.kv_heads} key/value heads"
    block = f"D·(H + 2·K)·N + H·N·D + 3·D·F + 2·D{qk_norm}"
    matrix = "1·V·D, the head is the embedding" if config.tied else "2·V·D"
    return Section(
        "Model",
        [
            Row("shape", shape, ", ".join(f"{name} {value}" for name, value in symbols.items())),
            Row("parameters", f"{counts.total:,}", f"embedding and head + L·block + D; block: {block}"),
            Row("embedding and head", f"{counts.embedding + counts.head:,}", matrix),
            Row("blocks", f"{counts.layers:,}", "L·block + D"),
        ],
    )


def _run(settings: "TrainSettings", config: ModelConfig) -> Section:
    tokens, batch, seq_len = settings.tokens, settings.batch_tokens, settings.seq_len
    assert tokens is not None
    assert batch is not None
    assert seq_len is not None
    flops = budget.flops_per_token(config, seq_len)
    ratio = f"{tokens / budget.parameters(config).total:.1f} a parameter"
    return Section(
        "Training run",
        [
            Row("tokens", f"{tokens:,} ({ratio})", "as given, else 20·P (arXiv:2203.15556)"),
            Row(
                "batch",
                f"{batch:,} tokens = {batch // seq_len} rows of {seq_len}",
                "as given, else 2^19·sqrt(tokens / 2.5e9) to a power of two, 2^14 to 2^20 (arXiv:2410.21676)",
            ),
            Row("steps", f"{-(-tokens // batch):,}", "tokens / batch, rounded up"),
            Row(
                "FLOPs per token",
                f"{flops / 1e9:,.2f} G",
                f"6·(P without the input embedding) + 12·L·H·N·T, T = {seq_len} (arXiv:2204.02311, appendix B)",
            ),
            Row("FLOPs in all", f"{flops * tokens:.3g}", "FLOPs per token · tokens"),
        ],
    )


def _memory(job: Job, every: list[Fit], why: str) -> Section:
    machine, size = job.machine, job.value_bytes
    heading = "strategy weights gradients optimiser activations logits buffers total fits recompute rows".split()
    lines = []
    for fit in every:
        parts = [f"{value / 1e9:,.2f}" for value in (*vars(fit.memory).values(), fit.memory.total)]
        lines.append([fit.strategy, *parts, "yes" if fit.fits else "NO", fit.checkpointing, str(fit.micro_rows)])
    devices = f"{machine.world} × {machine.gpu.name}" + (f" on {machine.nodes} nodes" if machine.nodes > 1 else "")
    title = f"Memory per device in GB, {devices} ({why or 'as given'})"
    moments = "8·P + 4 a tensor" if job.optimizer == "adamw" else "4 a weight of the blocks' matrices, else AdamW's 8"
    shards = f"W = {machine.world}" + (f", for hsdp {machine.devices}" if machine.nodes > 1 else "")
    logit = size + budget.logit_bytes(size, compiled=job.is_compiled)
    copies = " + 4·V·D" if size == 2 else ""
    chunk, most = budget.HEAD_CHUNK[machine.kind], ENOUGH_TOKENS[machine.kind]
    formulas = {
        "usable": f"{gb(machine.room)} = {1 - RESERVE:.0%} of {gb(machine.gpu.memory)}; "
        "the rest is for CUDA's context, NCCL and fragmentation: assumed",
        "weights": f"ddp 4·P; fsdp and hsdp 4·ceil(rows/W)·columns of each tensor, {shards}; deepspeed-2 b·P, -3 b·P/W",
        "gradients": "as the weights in ddp, fsdp and hsdp; deepspeed 4·P/W, with offload b·P/W",
        "optimiser": f"{moments}, cut as the weights; deepspeed 12·P/W, with offload in main memory",
        "activations": f"M·(L·block + b·N + 8·D + 12); {_block_formula(job)}",
        "logits": f"b·M·D + 4·V·D + the larger of {logit}·C·V{copies} and b·M·D + 4·V·D; C = min(M, {chunk})",
        "buffers": "ddp b·(blocks) in bf16; else embedding, head and two blocks whole, roughly (train/plan.py)",
        "rows": f"M = rows·T, at most {most:,} tokens: beyond it nothing is gained; b = {size} bytes a value in "
        f"{job.precision}",
        "how sure": "weights, gradients and optimiser exact, rough for deepspeed; the peak not measured on a GPU yet",
    }
    return Section(title, [Row(name, "", formula) for name, formula in formulas.items()], [heading, *lines])


def _block_formula(job: Job) -> str:
    """A block's bytes a token, in numbers."""
    attention = budget.attention_values(job.config, job.value_bytes, compiled=job.is_compiled)
    ffn = budget.ffn_values(job.config, job.value_bytes, compiled=job.is_compiled)
    stream = job.value_bytes * job.config.width
    selective = attention + (0 if job.is_compiled else stream)
    graph = "compiled" if job.is_compiled else "eager"
    return (
        f"block, {graph}: {attention:,} bytes a token of attention + {ffn:,} of feed-forward (models/budget.py); "
        f"selective {selective:,}, full {stream:,}"
    )


def _chosen(job: Job, fit: Fit) -> Section:
    world, share = job.machine.world, job.rows_a_device()
    strategy = "one device" if world == 1 and fit.strategy == "ddp" else fit.strategy
    used = f"{gb(fit.memory.total)} of {gb(fit.room)}: {'fits' if fit.fits else 'DOES NOT FIT'}"
    micro = f"{fit.micro_rows} rows = {fit.micro_rows * job.seq_len:,} tokens a device"
    return Section(
        "Chosen",
        [
            Row("strategy", strategy, "as given, else the first of ddp, hsdp and fsdp that fits"),
            Row("activation checkpointing", fit.checkpointing, "as given, else the least that fits"),
            Row("micro-batch", micro, "as given, else the most rows that fit"),
            Row("micro-batches a step", f"{share // fit.micro_rows}", f"{job.rows} rows / {world} / {fit.micro_rows}"),
            Row("memory", used, "the sum of its line above"),
        ],
    )


def _time(settings: "TrainSettings", job: Job, fit: Fit, price: float | None) -> Section:
    machine, gpu = job.machine, job.machine.gpu
    if gpu.peak is None or job.precision != "bf16":
        reason = f"no peak of {gpu.name} is known" if gpu.peak is None else "only peaks in bf16 are known"
        return Section("Time and cost", [Row("speed", f"not estimated: {reason}")])
    from common.console import duration

    assert settings.tokens is not None
    assert settings.batch_tokens is not None
    measured = MEASURED_MFU.get((gpu.name, settings.size or ""))
    mfu = measured or ASSUMED_MFU
    source = "measured" if measured else "ASSUMED, not measured"
    reason = "measured by bench/" if measured else "public trainers of 125M to 3B reach 35 to 50% on 8 H100s"
    rate = tokens_per_second(job.config, job.seq_len, machine, fit.checkpointing, mfu)
    seconds = settings.tokens / rate
    hours = seconds / 3600 * machine.world
    cost = f"${hours * price:,.2f} at ${price:g} a GPU-hour" if price is not None else "unknown: give --price"
    again = budget.recomputed_flops(job.config, job.seq_len, fit.checkpointing) / 1e9
    state = fit.memory
    moved = 2 * state.weights + state.gradients + 2 * state.optimizer
    passes = f"{moved / gpu.bandwidth * 1e3:,.0f} ms of it" if gpu.bandwidth else "unknown"
    speed = f"devices · peak · MFU / (FLOPs per token + {again:,.2f} G recomputed); communication hidden"
    return Section(
        "Time and cost",
        [
            Row("MFU", f"{mfu:.0%} of {gpu.peak / 1e12:,.0f} TFLOP/s dense bf16, {source}", reason),
            Row("tokens/s", f"{rate:,.0f}, {rate / machine.world:,.0f} a device", speed),
            Row("a step", f"{settings.batch_tokens / rate:,.2f} s", "batch / tokens/s"),
            Row("optimiser, at least", passes, "(2·weights + gradients + 2·optimiser) / bandwidth"),
            Row("time", f"{duration(seconds)} = {seconds / 86400:,.2f} days", "tokens / tokens/s, evaluation apart"),
            Row("GPU-hours", f"{hours:,.1f}", "time · devices"),
            Row("cost", cost, "GPU-hours · price"),
        ],
    )


def _checkpoint(settings: "TrainSettings", config: ModelConfig) -> Section:
    size = checkpoint_bytes(config, settings.optimizer.name)
    model = 4 * budget.parameters(config).total
    moments = "8·P + 4 a tensor" if settings.optimizer.name == "adamw" else "4 a weight of matrices, else 8"
    keep = settings.checkpoint.keep
    return Section(
        "Checkpoint",
        [
            Row("a checkpoint", gb(size), f"4·P + the optimiser's {moments}, whatever the strategy"),
            Row("the model folder", gb(model), "4·P, fp32 safetensors"),
            Row("on disk at most", gb((keep + 2) * size + model), f"{keep} kept, one for good, one new, and the model"),
        ],
    )


def _phone(config: ModelConfig) -> Section:
    weights = 2 * budget.parameters(config).total
    at_2k, at_4k = (budget.kv_cache_bytes(config, context) for context in (2048, 4096))
    fitting = "yes" if weights + at_4k <= budget.PHONE_MEMORY else "NO"
    gate = "passes" if weights + at_2k <= budget.OPENCL_GATE else "DOES NOT PASS"
    bandwidth = f"{budget.PHONE_BANDWIDTH / 1e9:.0f} GB/s"
    read = "P" if config.tied else "(P - V·D)"
    return Section(
        "On the phone",
        [
            Row("weights in fp16", gb(weights), "2·P"),
            Row("KV cache", f"{gb(at_2k)} at 2k tokens, {gb(at_4k)} at 4k", "2·L·K·N·tokens · 2 bytes"),
            Row(
                "fits 12 GB", f"{fitting}, {gb(weights + at_4k)}", "weights + cache at 4k; the system's own share apart"
            ),
            Row(
                "MLC's OpenCL gate",
                f"{gate}, {gb(weights + at_2k)} of {gb(budget.OPENCL_GATE)}",
                "weights + cache at 2k; 0.85·max(5 GiB, memory reported), 12 GB phones report 4.4 to 4.8 GB",
            ),
            Row(
                "decode ceiling",
                f"{budget.decode_ceiling(config, 2048):,.1f} tokens/s at {bandwidth}, ASSUMED",
                f"bandwidth / (2·{read} + cache at 2k); public 16-bit figures of phones imply 45 to 55 GB/s",
            ),
        ],
    )


def _rendered(section: Section, explain: bool) -> "Group":
    """A section for the console: its figures in columns, with ``explain`` their formulas beside them."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = [Text(section.title, style="bold")]
    if section.table is not None:
        heading, *lines = section.table
        table = Table(box=None, padding=(0, 2, 0, 0))
        for name in heading:
            table.add_column(name, justify="left" if name in ("strategy", "recompute") else "right")
        for line in lines:
            table.add_row(*line)
        parts.append(Padding(table, (0, 0, 0, 2), expand=False))
    if section.table is None or explain:
        grid = Table.grid(padding=(0, 2))
        for row in section.rows:
            cells = [row.name, row.value] if row.value else [row.name]
            formula = [Text(row.formula, style="dim")] if explain else []
            grid.add_row(*map(Text, cells), *formula)
        parts.append(Padding(grid, (0, 0, 0, 2), expand=False))
    return Group(*parts, "")


def gb(count: float) -> str:
    """Bytes for people: ``2.10 GB``, ``47.2 MB``."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
