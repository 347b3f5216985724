"""The plan in print: ``python train.py --size 1b --plan [--explain]``. Imports no torch."""

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType

from common.settings import parse, read_yaml, recipe_file, to_dict
from models import budget, gpus
from models.hf_config import taken_shape
from models.sizes import ModelConfig
from train.plan import (
    ASSUMED_MFU,
    DEFAULT_GPU,
    ENOUGH_TOKENS,
    MEASURED_MFU,
    RESERVE,
    Fit,
    Machine,
    Workload,
    best,
    checkpoint_bytes,
    gb,
    tokens_per_second,
    ways,
    workload_of,
)
from train.scaling import INFINIBAND, NVLINK, Compute, Network, predict
from train.settings import TrainCommand, TrainSettings, model_config, resolve, trains_ours


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


def print_plan(command: TrainCommand) -> None:
    """Print the plan of a run, all that ``--plan`` does.

    Raises:
        UserError: the settings contradict each other, the devices cannot share the batch, or no such GPU.
    """
    config = model_config(command)
    machine, why = machine_of(command)
    settings = resolve(command, config, machine.world, own=trains_ours(command))
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    recipe = [] if command.recipe is None else [_recipe(command, command.recipe)]
    for section in [*recipe, *describe(settings, config, machine, price=command.price, why=why)]:
        console.print(_rendered(section, command.explain))
    if not command.explain:
        console.print("--explain adds the formula of every figure.", markup=False)


def _recipe(command: TrainCommand, name: str) -> Section:
    """What a recipe sets, and where a flag has won over it."""
    file = recipe_file(name, "train")
    alone = _flat(to_dict(parse(TrainCommand, ["--recipe", str(file)], prog="", description="")))
    asked = _flat(to_dict(command))
    rows = []
    for key in _flat(read_yaml(file)):
        formula = "from the recipe" if asked[key] == alone[key] else f"as given; the recipe has {alone[key]}"
        rows.append(Row(key.replace("_", "-"), f"{asked[key]}", formula))
    return Section(f"Recipe {file.stem}", rows)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Groups of settings as names with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def machine_of(command: TrainCommand) -> tuple[Machine, str]:
    """The machine to plan for, and where it is known from."""
    devices, nodes = command.devices or 1, command.nodes or 1
    if command.gpu is not None:
        return Machine(gpus.gpu(command.gpu), devices, nodes), "as given"
    if command.device == "cpu":
        return Machine(gpus.cpu_here(devices), devices, nodes), "this machine's"
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
    settings: TrainSettings, config: ModelConfig, machine: Machine, *, price: float | None = None, why: str = ""
) -> list[Section]:
    """The plan of a run, every figure with its formula.

    Args:
        settings: resolved (:func:`train.settings.resolve`).
        config: the shape.
        machine: what it runs on.
        price: dollars a device-hour.
        why: where the machine is known from.
    """
    teacher = None if settings.teacher is None else taken_shape(Path(settings.teacher))
    job = workload_of(settings, config, machine)
    if teacher is not None:
        job = replace(job, taken=job.value_bytes * budget.parameters(teacher).total)
    if settings.lora.rank is not None:
        job = replace(job, trainable=budget.adapter_parameters(config, settings.lora.rank))
    fit = best(job)
    others = [way for way in ways(replace(job, strategy="auto")) if way.strategy != fit.strategy]
    order = ("ddp", "hsdp", "fsdp", "deepspeed-2", "deepspeed-3", "deepspeed-3-offload")
    every = sorted([fit, *others], key=lambda way: order.index(way.strategy))
    return [
        _model(config),
        _run(settings, config),
        _memory(job, every, why),
        _chosen(job, fit),
        _time(settings, job, fit, price, teacher),
        _checkpoint(job, settings.checkpoint.keep),
        _phone(config),
    ]


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


def _run(settings: TrainSettings, config: ModelConfig) -> Section:
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
                "as given, else 2^18·sqrt(tokens / 2.5e9) to a power of two, 2^12 to 2^20 (growth: arXiv:2410.21676)",
            ),
            Row("steps", f"{-(-tokens // batch):,}", "tokens / batch, rounded up"),
            Row("optimiser", f"{settings.optimizer.name}, rate {settings.optimizer.lr:.3g}", _why_optimizer(settings)),
            Row(
                "FLOPs per token",
                f"{flops / 1e9:,.2f} G",
                f"6·(P without the input embedding) + 12·L·H·N·T, T = {seq_len} (arXiv:2204.02311, appendix B)",
            ),
            Row("FLOPs in all", f"{flops * tokens:.3g}", "FLOPs per token · tokens"),
        ],
    )


def _why_optimizer(settings: TrainSettings) -> str:
    """Where the optimiser's name and rate come from."""
    if settings.optimizer.name == "muon":
        return "as given, else muon for new weights (fewer tokens to the same loss, docs/log.md), at 0.2 / D^⅔"
    if settings.init is not None:
        return "as given, else adamw for weights that know something already, at a rate in proportion to 1 / D"
    return "as given, else adamw under DeepSpeed, which cuts the matrices that muon needs; at 0.768 / D, at most 4e-3"


def _memory(job: Workload, every: list[Fit], why: str) -> Section:
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
    logit = budget.logit_bytes(size, compiled=job.is_compiled)
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
        "how sure": "weights, gradients and optimiser exact, rough for deepspeed; the peak on an H200 was within 0.2% "
        "of it",
    }
    return Section(title, [Row(name, "", formula) for name, formula in formulas.items()], [heading, *lines])


def _block_formula(job: Workload) -> str:
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


def _chosen(job: Workload, fit: Fit) -> Section:
    world, share = job.machine.world, job.share
    strategy = "one device" if world == 1 and fit.strategy == "ddp" else fit.strategy
    used = f"{gb(fit.memory.total)} of {gb(fit.room)}: {'fits' if fit.fits else 'DOES NOT FIT'}"
    micro = f"{fit.micro_rows} rows = {fit.micro_rows * job.seq_len:,} tokens a device"
    beside = [Row("the teacher", gb(job.taken), "b·(its parameters), beside that on every device")] if job.taken else []
    return Section(
        "Chosen",
        [
            Row("strategy", strategy, "as given, else the first of ddp, hsdp and fsdp that fits"),
            Row("activation checkpointing", fit.checkpointing, "as given, else the least that fits"),
            Row("micro-batch", micro, "as given, else the most rows that fit"),
            Row("micro-batches a step", f"{share // fit.micro_rows}", f"{job.rows} rows / {world} / {fit.micro_rows}"),
            Row("memory", used, "the sum of its line above"),
            *beside,
        ],
    )


def _time(
    settings: TrainSettings, job: Workload, fit: Fit, price: float | None, teacher: ModelConfig | None
) -> Section:
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
    rate = tokens_per_second(job.config, job.seq_len, machine, fit.checkpointing, mfu, teacher)
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
            *_communication(job, fit, rate),
            Row("optimiser, at least", passes, "(2·weights + gradients + 2·optimiser) / bandwidth"),
            Row("time", f"{duration(seconds)} = {seconds / 86400:,.2f} days", "tokens / tokens/s, evaluation apart"),
            Row("GPU-hours", f"{hours:,.1f}", "time · devices"),
            Row("cost", cost, "GPU-hours · price"),
        ],
    )


def _communication(job: Workload, fit: Fit, rate: float) -> list[Row]:
    """What of a step is expected to be communication that nothing hides, on several devices."""
    machine = job.machine
    if machine.world == 1 or job.trainable is not None:
        return []
    passes = fit.micro_rows * job.seq_len * machine.world / rate
    step = predict(
        job,
        fit.strategy,
        fit.micro_rows,
        Compute(passes, 0.0),
        Network(machine.nodes, machine.devices, NVLINK, INFINIBAND),
    )
    links = f"{NVLINK.bandwidth / 1e9:.0f} GB/s within a node, {INFINIBAND.bandwidth / 1e9:.0f} GB/s a device between"
    value = f"{1e3 * step.communication:,.1f} ms of a step are not hidden, {step.communication / step.total:.1%}"
    return [Row("communication", f"{value}; links ASSUMED", f"not in the other figures; {links} (train/scaling.py)")]


def _checkpoint(job: Workload, keep: int) -> Section:
    size = checkpoint_bytes(job.config, job.optimizer)
    model = 4 * budget.parameters(job.config).total
    moments = "8·P + 4 a tensor" if job.optimizer == "adamw" else "4 a weight of matrices, else 8"
    formula = f"4·P + the optimiser's {moments}, whatever the strategy"
    if job.trainable is not None:
        size, formula = 12 * job.trainable, "12 a parameter of the adapters"
    return Section(
        "Checkpoint",
        [
            Row("a checkpoint", gb(size), formula),
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


def _rendered(section: Section, explain: bool) -> Group:
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
