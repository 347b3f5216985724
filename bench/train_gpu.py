"""Tokens/s and MFU of training on one GPU, beside transformers and litgpt in one run.

    python bench/train_gpu.py                                   # all sizes of README's table, bf16, rows of 2048 tokens
    python bench/train_gpu.py --json figures.jsonl --minutes 5 --variants ours
    python bench/train_gpu.py --json figures.jsonl --minutes 9  # goes on with what is not in the file yet
    python bench/train_gpu.py --sizes tiny --seq-len 64 --micro-rows 2 --rounds 1 --steps 1 --device cpu --no-compile

FLOPs a token = 6·(parameters without the input embedding, a tied head counted) + 12·L·H·N·T: L layers, H query
heads N wide, T tokens in a row. MFU = tokens/s · FLOPs a token / the GPU's dense bf16 peak. A step is zero_grad,
forward, backward, clipping at 1 and fused AdamW (``--optimizer muon``: ours alone), with fp32 weights under autocast.

Every side computes the same shape from the same weights, except that it is ours alone that has the QK-norm of
125m and 1b. Every row is one document. "documents" are rows of four to eight documents that do not see each other;
their attention is counted over the full row all the same, which is more than is computed.

Each variant has the GPU to itself for its turn: weights come from the host and leave again. The turns alternate
over the rounds, and medians count, so that clocks and temperature bear on all alike. Rows in a forward pass are
the plan's (train/plan.py), halved for a variant that runs out of memory with them.

The file of ``--json`` is written after every turn, so that a run that is cut off loses at most one. A line that is in
it is not measured again, unless ours, beside another side: the ratio in a line is of one call.
"""

import argparse
import gc
import json
import math
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from bench import peers
from bench.peers import Batch
from bench.train_step import machine, matmul_rate
from common.command import run_command
from common.errors import UserError
from common.files import write_text
from models import budget, gpus, hf, sizes
from models.sizes import ModelConfig, adapt
from models.transformer import Transformer
from train import float8
from train.muon import Muon
from train.plan import ENOUGH_TOKENS, Fit, Machine, Workload, best

TABLE = "60m 125m 350m 1b 3b c4-130m c4-1b".split()
"""The sizes of README's table."""

BARS = {"c4-130m": 0.45, "c4-1b": 0.50}
"""MFU that is aimed at on one H100 or H200, in bf16, compiled, in rows of 2048 tokens; the other sizes have no bar."""

LR, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0
WARM_UP = 3
"""Steps of a turn that do not count; in the first turn the first of them compiles."""

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Setting:
    """What all variants of a size share."""

    config: ModelConfig
    seq_len: int
    device: torch.device
    precision: str
    """bf16 or fp32."""
    compiled: bool
    optimizer: str
    """Of our side: adamw or muon."""
    fit: Fit
    """The plan's rows; its activation checkpointing is for our side."""
    may_halve: bool
    """The rows are the plan's, not asked for."""


class Trainee:
    """A model that trains in turns and holds memory of the device only during one.

    Args:
        model: on its device; what it holds is given up at once.
        loss: mean loss of a batch.
        weights: its parameters' values by name, on the host.
        optimizers: makes them anew for every turn.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Batch], Tensor],
        weights: dict[str, Tensor],
        optimizers: Callable[[], list[torch.optim.Optimizer]],
    ) -> None:
        self.named = dict(model.named_parameters())  # a tied matrix once
        self._loss, self._weights, self._make_optimizers = loss, weights, optimizers
        self._optimizers: list[torch.optim.Optimizer] = []
        self.leave()

    @torch.no_grad()
    def enter(self) -> None:
        """Take the device: the first weights, no moments."""
        for name, parameter in self.named.items():
            # The tensor stays the same, so that what was compiled for it stays good; only its memory comes and goes.
            parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
            parameter.copy_(self._weights[name])
        self._optimizers = self._make_optimizers()

    def leave(self) -> None:
        """Give back what the turn took."""
        self._optimizers = []
        for parameter in self.named.values():
            parameter.grad = None
            parameter.untyped_storage().resize_(0)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def loss(self, batch: Batch, autocast: bool) -> Tensor:
        """Mean loss of a batch, gradients of the step before thrown away."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast(batch.tokens.device.type, torch.bfloat16) if autocast else nullcontext():
            return self._loss(batch)

    def clip(self) -> None:
        """Scale the gradients down to a norm of 1."""
        nn.utils.clip_grad_norm_(self.named.values(), CLIP)

    def move(self) -> None:
        """Let the optimisers move the weights."""
        for optimizer in self._optimizers:
            optimizer.step()

    def step(self, batch: Batch, autocast: bool) -> Tensor:
        """One step; waits for nothing. The loss is still on the device."""
        loss = self.loss(batch, autocast)
        loss.backward()
        self.clip()
        self.move()
        return loss.detach()


Maker = Callable[[Setting, dict[str, Tensor]], Trainee]
"""Makes a trainee whose weights are those of the given state dict of ours."""


@dataclass(frozen=True)
class Variant:
    """A way of training that gets a line of the table."""

    name: str
    make: Maker
    packed: bool = False
    """Rows of several documents."""

    @property
    def is_ours(self) -> bool:
        """Whether it is what the others are compared with: ours, whole rows, in the precision asked for."""
        return self.make is make_ours and not self.packed

    @property
    def own(self) -> bool:
        """Whether it is a form of ours."""
        return self.name.startswith("ours")


@dataclass
class Measurement:
    """A variant's figures."""

    variant: Variant
    rows: int
    first_step: float | None = None
    """Seconds of its first step, which compiles."""
    loss: float | None = None
    """Of that step."""
    seconds: list[float] = field(default_factory=list)
    """A step, by rounds."""
    peak: int = 0
    """Most bytes of the device held at one time; 0 on a CPU."""
    trouble: str = ""

    def tokens_per_second(self, seq_len: int) -> float | None:
        """Median of the rounds; None when it did not work."""
        return self.rows * seq_len / statistics.median(self.seconds) if self.seconds else None


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW."""
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def our_optimizers(model: Transformer, setting: Setting) -> list[torch.optim.Optimizer]:
    """AdamW, or as in training Muon for the matrices of the blocks and AdamW for the rest."""
    if setting.optimizer == "adamw":
        return [adamw(list(model.parameters()))]
    named = dict(model.named_parameters())
    hidden = {name: value for name, value in named.items() if value.ndim == 2 and name.startswith("blocks.")}
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    rows = model.fused_rows()
    muon = Muon(list(hidden.items()), rows, lr=LR, momentum=0.95, weight_decay=WEIGHT_DECAY, dtype=dtype)
    return [muon, adamw([value for name, value in named.items() if name not in hidden])]


def make_ours(setting: Setting, state: dict[str, Tensor], *, fp8: bool = False) -> Trainee:
    """Our transformer, as training has it."""
    with setting.device:
        model = Transformer(setting.config, seed=None)
    if fp8:
        float8.convert(model)
    model.checkpointing = setting.fit.checkpointing
    if setting.compiled:
        model.compile_parts()

    def loss(batch: Batch) -> Tensor:
        total, _ = model(batch.tokens, batch.positions, batch.targets)
        return total / batch.targets.numel()

    return Trainee(model, loss, state, lambda: our_optimizers(model, setting))


def make_llama(setting: Setting, state: dict[str, Tensor], *, compiled: bool, causal: bool) -> Trainee:
    """transformers' Llama; ``causal``: see :func:`bench.peers.llama`."""
    plain = replace(setting.config, qk_norm=False)
    with setting.device:
        model: Any = peers.llama(plain, causal=causal)
    if compiled:
        model.compile(dynamic=False)
    loss = partial(peers.llama_loss, model)
    return Trainee(model, loss, hf.to_hugging_face(state, plain), lambda: [adamw(list(model.parameters()))])


def make_litgpt(setting: Setting, state: dict[str, Tensor]) -> Trainee:
    """litgpt's GPT and the loss of its pre-training."""
    with setting.device:
        model = peers.litgpt(setting.config)
    if setting.compiled:
        model.compile(dynamic=False)
    loss = partial(peers.litgpt_loss, model)
    weights = peers.to_litgpt(state, setting.config)
    return Trainee(model, loss, weights, lambda: [adamw(list(model.parameters()))])


def all_variants(compiled: bool, litgpt: bool, fp8: bool = False) -> list[Variant]:
    """The lines of the table; litgpt and float8 where they are there."""
    mode = "compiled" if compiled else "eager"
    found = [Variant(f"ours {mode}", make_ours), Variant(f"ours {mode}, documents", make_ours, packed=True)]
    if fp8:
        found.append(Variant(f"ours {mode}, fp8", partial(make_ours, fp8=True)))
    if compiled:
        found += [
            Variant("transformers compiled", partial(make_llama, compiled=True, causal=False)),
            Variant("transformers compiled, causal", partial(make_llama, compiled=True, causal=True)),
        ]
    found.append(Variant("transformers eager", partial(make_llama, compiled=False, causal=False)))
    return [*found, Variant(f"litgpt {mode}", make_litgpt)] if litgpt else found


def make_batch(setting: Setting, rows: int, packed: bool) -> Batch:
    """Random tokens, one document a row or several."""
    batch = Batch.random(setting.config, rows, setting.seq_len, setting.device.type)
    if not packed:
        return batch
    chance = random.Random(0)
    positions = torch.tensor([list(document_positions(setting.seq_len, chance)) for _ in range(rows)])
    return replace(batch, positions=positions.to(setting.device))


def document_positions(seq_len: int, chance: random.Random) -> Iterator[int]:
    """Each token's place in its document, in a row of four to eight documents of random lengths."""
    cuts = sorted(chance.sample(range(1, seq_len), chance.randint(3, 7)))
    for first, end in zip([0, *cuts], [*cuts, seq_len], strict=True):
        yield from range(end - first)


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def take_turn(trainee: Trainee, setting: Setting, found: Measurement, steps: int) -> None:
    """Warm up, then measure some steps."""
    batch = make_batch(setting, found.rows, found.variant.packed)
    step = partial(trainee.step, batch, setting.precision == "bf16")
    trainee.enter()
    start = time.perf_counter()
    loss = step().item()
    if found.first_step is None:
        found.first_step, found.loss = time.perf_counter() - start, loss
    for _ in range(WARM_UP - 1):
        step()
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait_for(setting.device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait_for(setting.device)
    found.seconds.append((time.perf_counter() - start) / steps)
    if setting.device.type == "cuda":
        found.peak = max(found.peak, torch.cuda.max_memory_allocated())


def turn_or_trouble(trainee: Trainee, setting: Setting, found: Measurement, steps: int) -> str:
    """Take a turn; what went wrong in it, or nothing."""
    try:
        take_turn(trainee, setting, found, steps)
        return ""
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except Exception as error:  # one variant's failure must not cost the other lines
        traceback.print_exc()
        return failure(error)


def failure(error: Exception) -> str:
    """An exception in a line."""
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:80]}"


def fitting_turn(trainee: Trainee, setting: Setting, found: Measurement, steps: int) -> None:
    """Take a turn, if need be with fewer rows than the plan's."""
    while True:
        found.trouble = turn_or_trouble(trainee, setting, found, steps)
        trainee.leave()  # after the exception, whose frames hold tensors
        if found.trouble:
            print(f"{found.variant.name}, {found.rows} rows: {found.trouble}", flush=True)
            found.first_step, found.loss, found.seconds, found.peak = None, None, [], 0
        if found.trouble != OUT_OF_MEMORY or not setting.may_halve or found.rows == 1:
            return
        found.rows //= 2


def first_weights(setting: Setting) -> dict[str, Tensor]:
    """Our state dict that all begin with, on the host.

    Drawn on the device: on the host, and as training does it, that takes a minute at 3b.
    """
    with torch.device("meta"):
        model = Transformer(setting.config, seed=None)
    chance = torch.Generator(setting.device).manual_seed(0)
    drawn: dict[nn.Parameter, Tensor] = {}
    for parameter in model.parameters():
        value = torch.ones(parameter.shape, device=setting.device)
        drawn[parameter] = (value if parameter.ndim == 1 else value.normal_(0, 0.02, generator=chance)).cpu()
    return {name: drawn[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}


def measure(
    setting: Setting,
    variants: list[Variant],
    rounds: int,
    steps: int,
    deadline: float = math.inf,
    keep: Callable[[list[Measurement]], None] = lambda found: None,
) -> list[Measurement]:
    """Let the variants take turns.

    Args:
        setting: of a size.
        variants: that take part.
        rounds: turns of each.
        steps: of a turn that count.
        deadline: of time.monotonic(), after which no turn begins.
        keep: called after every turn with all that was found so far.
    """
    torch.compiler.reset()  # else the sizes before count towards the limit on recompilations
    state = first_weights(setting)
    found = [Measurement(variant, setting.fit.micro_rows) for variant in variants]
    trainees: dict[str, Trainee] = {}
    for number in range(rounds):
        for one in found:
            if one.trouble:
                continue
            if time.monotonic() > deadline:
                return found
            try:
                trainee = trainees.get(one.variant.name) or one.variant.make(setting, state)
            except Exception as error:  # as in turn_or_trouble
                traceback.print_exc()
                one.trouble = failure(error)
                keep(found)
                continue
            trainees[one.variant.name] = trainee
            fitting_turn(trainee, setting, one, steps)
            keep(found)
            if number == 0 and not one.trouble:
                print(f"{one.variant.name:<30} first step {one.first_step:6.1f} s, loss {one.loss:.4f}", flush=True)
    return found


@dataclass(frozen=True)
class Line:
    """A line of the table and of the JSON file; None is what could not be measured or does not apply."""

    size: str
    variant: str
    micro_rows: int
    checkpointing: str
    tokens_per_second: float | None
    mfu: float | None
    step_ms: float | None
    peak_gb: float | None
    turns: int
    """That it had; fewer than asked for where the run was cut off."""
    ours_over_it: float | None
    """Tokens/s of ours, whole rows, in the same call, over those of this line."""
    bar: float | None
    met: bool | None
    first_step_s: float | None
    first_loss: float | None
    flops_per_token: int
    trouble: str


def make_lines(size: str, setting: Setting, found: list[Measurement], gpu: gpus.Gpu | None) -> list[Line]:
    """The lines of a size; none of what has had no turn."""
    found = [one for one in found if one.seconds or one.trouble]
    speeds = {one.variant.name: one.tokens_per_second(setting.seq_len) for one in found}
    ours = next((speeds[one.variant.name] for one in found if one.variant.is_ours), None)
    flops = budget.flops_per_token(setting.config, setting.seq_len)
    peak = gpu.peak if gpu and setting.precision == "bf16" else None
    judged = gpu is not None and gpu.name.startswith(("h100", "h200")) and setting.compiled and setting.seq_len == 2048
    lines = []
    for one in found:
        speed, own = speeds[one.variant.name], one.variant.own
        mfu = speed * flops / peak if speed and peak else None
        bar = BARS.get(size) if one.variant.is_ours else None
        line = Line(
            size=size,
            variant=one.variant.name,
            micro_rows=one.rows,
            turns=len(one.seconds),
            checkpointing=setting.fit.checkpointing if own else "none",
            tokens_per_second=speed,
            mfu=mfu,
            step_ms=1e3 * statistics.median(one.seconds) if one.seconds else None,
            peak_gb=one.peak / 1e9 if one.peak else None,
            ours_over_it=ours / speed if speed and ours and not own else None,
            bar=bar,
            met=mfu >= bar if judged and mfu is not None and bar is not None else None,
            first_step_s=one.first_step,
            first_loss=one.loss,
            flops_per_token=flops,
            trouble=one.trouble,
        )
        lines.append(line)
    return lines


def shown(value: float | None, form: str) -> str:
    """A figure, or a dash."""
    return "-" if value is None else format(value, form)


def print_table(lines: list[Line]) -> None:
    """Print a size's lines."""
    heads = f"{'rows':>5} {'tokens/s':>10} {'MFU':>6} {'ms/step':>9} {'GB':>6} {'ours/it':>7}  bar"
    print(f"\n{'size':<8} {'variant':<30} {heads}")
    for line in lines:
        start = f"{line.size:<8} {line.variant:<30} {line.micro_rows:>5} "
        if line.trouble:
            print(start + line.trouble)
            continue
        bar = shown(line.bar, ".0%")
        if line.met is not None:
            bar += " met" if line.met else " missed"
        elif line.bar is not None:
            bar += " on one H100 or H200"
        figures = (
            f"{shown(line.tokens_per_second, ',.0f'):>10} {shown(line.mfu, '.1%'):>6} {shown(line.step_ms, ',.1f'):>9} "
            f"{shown(line.peak_gb, '.1f'):>6} {shown(line.ours_over_it, '.2f'):>7}  {bar}"
        )
        print(start + figures)
    print(flush=True)


def plan_for(config: ModelConfig, args: argparse.Namespace) -> Fit:
    """Rows in a forward pass and activation checkpointing by the plan for this device."""
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = gpus.here(properties.name, properties.total_memory)
    else:
        gpu = gpus.cpu_here(1)
    workload = Workload(
        config,
        Machine(gpu),
        rows=args.micro_rows or max(1, ENOUGH_TOKENS[args.device] // args.seq_len),
        seq_len=args.seq_len,
        precision="bf16" if args.precision == "bf16" else "32",
        optimizer=args.optimizer,
        micro_rows=args.micro_rows,
        compiled=args.compile,
    )
    return best(workload)


def make_setting(name: str, args: argparse.Namespace) -> Setting:
    """A size under the command line's settings."""
    config = sizes.size(name).config
    config = adapt(config, context=max(config.context, args.seq_len))
    device, fit = torch.device(args.device), plan_for(config, args)
    may_halve = args.micro_rows is None
    return Setting(config, args.seq_len, device, args.precision, args.compile, args.optimizer, fit, may_halve)


def describe(name: str, setting: Setting) -> str:
    """A size, its FLOPs a token with their terms, and how it is run."""
    config, counted = setting.config, budget.parameters(setting.config)
    multiplied = counted.layers + config.vocab * config.width
    terms = f"6·{multiplied:,} + 12·{config.layers}·{config.heads}·{config.head_width}·{setting.seq_len}"
    rows = f"{setting.fit.micro_rows} rows of {setting.seq_len} tokens ({'the plan' if setting.may_halve else 'asked'})"
    return (
        f"{name}: {counted.total:,} parameters, {rows}, our activation checkpointing: {setting.fit.checkpointing}\n"
        f"{name}: {terms} = {budget.flops_per_token(config, setting.seq_len):,} FLOPs a token"
    )


def print_heading(args: argparse.Namespace, gpu: gpus.Gpu | None) -> None:
    """The machine, the peak and what the figures mean."""
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    print(machine(args.device))
    if cuda:
        rate = matmul_rate(args.device, dtype, 8192)
        print(f"CUDA {torch.version.cuda}; products of 8192 × 8192 matrices: {rate / 1e12:,.0f} TFLOP/s")
    if gpu and gpu.peak and args.precision == "bf16":
        print(
            f"peak {gpu.peak / 1e12:,.0f} TFLOP/s dense bf16: {gpu.name} in models/gpus.py, from the maker's datasheet"
        )
    else:
        print("MFU n/a: no bf16 peak of this device in models/gpus.py" if not gpu else "MFU n/a: the peaks are bf16's")
    print(f"{args.precision}, {'compiled' if args.compile else 'eager'}, {args.optimizer}, ", end="")
    print(f"{args.rounds} rounds of {args.steps} steps")
    print("FLOPs a token = 6·(parameters without the input embedding, a tied head counted) + 12·L·H·N·T")
    print("documents: four to eight a row, attention counted over the full row; all others one document a row")
    print("transformers, litgpt: the same shape without QK-norm; causal: its mask left out, see bench/peers.py")
    print("ours/it: tokens/s of ours, one document a row, over those of the line")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", default=TABLE, choices=list(sizes.SIZES))
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-rows", type=int, help="rows in a forward pass; default: the plan's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="that count, of each variant in each round")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on CUDA")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"), help="of our side")
    parser.add_argument("--variants", nargs="+", default=[""], metavar="WORDS", help="those that contain one of these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="lines of the table, to go on from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no turn begins")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    return args


def why_no_fp8(args: argparse.Namespace) -> str | None:
    """Why float8 takes no part; None when it does."""
    if args.precision != "bf16":
        return "stands beside bf16"
    try:
        float8.require(torch.device(args.device))
    except UserError as error:
        return str(error)
    return None


def prepare_torch() -> None:
    """The allocator as in training, and no silent step back from compiled to eager."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch._dynamo.config.recompile_limit = 64  # shapes and masks of one size, however often its rows are halved
    torch._dynamo.config.fail_on_recompile_limit_hit = True


class Figures:
    """The lines of a call, with those that its file already holds of the same machine, versions and settings.

    Args:
        path: JSON lines; None keeps them in memory alone.
        asked: what a line must have in common with this call to count, stored with it.

    Raises:
        UserError: the file is there and is another kind of file.
    """

    def __init__(self, path: Path | None, asked: dict[str, Any]) -> None:
        self._path, self._asked, self._others = path, asked, []
        self._lines: dict[tuple[str, str], Line] = {}
        for record in _read_records(path) if path is not None and path.exists() else []:
            if {key: record.get(key) for key in asked} != asked:
                self._others.append(record)
            else:
                line = Line(**{one.name: record[one.name] for one in fields(Line)})
                self._lines[line.size, line.variant] = line

    def of(self, size: str) -> list[Line]:
        """The lines of a size."""
        return [line for line in self._lines.values() if line.size == size]

    def missing(self, size: str, variants: list[Variant]) -> list[Variant]:
        """What is not measured yet."""
        return [variant for variant in variants if (size, variant.name) not in self._lines]

    def add(self, lines: list[Line]) -> None:
        """Take lines in the place of those of the same name, and write the file."""
        self._lines |= {(line.size, line.variant): line for line in lines}
        if self._path is not None:
            records = [*self._others, *(self._asked | asdict(line) for line in self._lines.values())]
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in records))


def _read_records(path: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        records = [None]
    names = {one.name for one in fields(Line)}
    if not all(isinstance(record, dict) and names <= record.keys() for record in records):
        raise UserError(f"{path} holds other lines than this program's; name another file for --json")
    return records


def main() -> int:
    """Measure and print; 1 when a variant of ours did not work, 2 when something is to be put right first."""
    args = parse()
    try:
        return run(args, time.monotonic() + 60 * args.minutes)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def run(args: argparse.Namespace, deadline: float) -> int:
    """The same until a deadline of time.monotonic()."""
    prepare_torch()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    asked = {key: getattr(args, key) for key in ("seq_len", "precision", "optimizer", "rounds", "steps")}
    versions = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    figures = Figures(args.json, versions | asked | {"asked_rows": args.micro_rows})
    gpu = gpus.named_by(name)
    print_heading(args, gpu)
    no_litgpt = peers.why_no_litgpt()
    print(f"litgpt: {no_litgpt or peers.litgpt_version()}")
    no_fp8 = why_no_fp8(args)
    print(f"fp8: {no_fp8 or 'the blocks of ours, by torchao'}")
    variants = all_variants(args.compile, litgpt=no_litgpt is None, fp8=no_fp8 is None)
    variants = [variant for variant in variants if any(words in variant.name for words in args.variants)]
    for size in args.sizes:
        missing = figures.missing(size, variants)
        if missing and time.monotonic() < deadline:
            setting = make_setting(size, args)
            print(f"\n{describe(size, setting)}", flush=True)

            def keep(found: list[Measurement], size: str = size, setting: Setting = setting) -> None:
                figures.add(make_lines(size, setting, found, gpu))

            beside = [one for one in variants if one in missing or one.is_ours]
            measure(setting, beside, args.rounds, args.steps, deadline, keep)
        print_table(figures.of(size))
        for variant in figures.missing(size, variants):
            print(f"{size:<8} {variant.name:<30} not measured: time is up")
    lines = [line for size in args.sizes for line in figures.of(size)]
    return int(any(line.trouble and line.variant.startswith("ours") for line in lines))


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
