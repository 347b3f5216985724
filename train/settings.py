"""What ``python train.py`` can be told, and the defaults that follow from the size.

Imports neither torch nor lightning: ``--help`` reads this module.
"""

import datetime
import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse.typing import register_type

from common.errors import UserError
from common.settings import MAY_CHANGE, Count, option
from data.settings import LoaderSettings, Mix
from models import budget
from models.hf_config import is_ours, read_values, taken_shape
from models.sizes import ModelConfig, adapt, size
from scoring.quick import TASKS as QUICK
from train.learning import DistillSettings, LoraSettings
from train.plan import check_micro_batch, share_of_rows
from train.slurm import Request

Run = TypeVar("Run", bound="RunSettings")

SEQ_LEN = 2_048
"""The longest default row of a recovery or of a foreign model, whose context may be a hundred thousand tokens."""

RECOVERY_STEPS = 128
"""The least steps that a run with --init and --teacher takes by default, however small its budget."""

TUNING_RATE = 2e-5 * 4096
"""Default learning rate, times the width, for weights that know something already: Alpaca's for LLaMA-7B."""

MUON_RATE = 0.2
"""Default learning rate of muon, times the width to the power of 2/3, which the best rates at widths 128, 256 and 512
follow (docs/log.md). By the root of the width, which alone would keep the largest singular value of an update (Yang et
al., arXiv:2310.17813), it comes out too high for wide models, in inverse proportion too low."""

BETA2 = 0.95
"""Default decay of the mean of squared gradients, of one step of the default batch."""

DECAY = 0.6
"""Share of a run in which the learning rate falls to zero: better than a fifth by 0.03 to 0.07 nats (docs/log.md)."""

RUNS = Path("runs")
"""Where runs live that are given a name."""

Strategy = Literal["auto", "ddp", "fsdp", "hsdp", "deepspeed-2", "deepspeed-3", "deepspeed-3-offload"]


@dataclass
class ModelSettings:
    """What may differ from the size's row in models/sizes.py."""

    vocab: Count | None = None
    """Rows of the embedding; at least the tokenizer's vocabulary. Default: the size's."""
    qk_norm: bool | None = None
    """RMSNorm on queries and keys (exported as Qwen3; without it as Llama). Default: the size's."""
    z_loss: float = 0.0
    """Weight of the squared log-partition in the loss (PaLM uses 1e-4)."""

    def __post_init__(self) -> None:
        if self.vocab is not None and self.vocab < 1:
            raise ValueError("--model.vocab must be at least 1")
        if self.z_loss < 0:
            raise ValueError(f"--model.z-loss must not be negative, not {self.z_loss}")


@dataclass
class OptimizerSettings:
    """The optimiser, its learning rate and clipping."""

    name: Literal["auto", "adamw", "muon"] = "auto"
    """muon: hidden matrices by orthogonalised momentum, everything else by AdamW. auto: muon for new weights, adamw
    for weights that know something already, and under DeepSpeed."""
    lr: float | None = None
    """Peak learning rate. Default: muon 2.4e-3 at width 768, by the width to the power of -2/3, and in smaller batches
    than the default by the root of the batch; the others in inverse proportion to the width: adamw, pre-training, 1e-3
    at 768, at most 4e-3; fine-tuning, and --init with --teacher, 2e-5 at 4096; adapters 2e-4 at 4096."""
    weight_decay: float = 0.1
    """Decay of matrices; norms have none."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float | None = None
    """Decay of the mean of squared gradients. Default: 0.95; beside muon, in smaller batches than the default, so near
    to 1 that it is the mean of as many tokens."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    clip: float = 1.0
    """Largest global norm of the gradients; 0 does not clip."""
    momentum: float = 0.95
    """Muon's decay of the mean of gradients (Nesterov)."""
    newton_schulz: Literal["auto", "bf16", "32"] = "auto"
    """Precision in which muon orthogonalises. Default: the run's."""

    def __post_init__(self) -> None:
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"--optimizer.lr must be positive, not {self.lr}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"--optimizer.{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("weight_decay", "eps", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"--optimizer.{name.replace('_', '-')} must not be negative, not {getattr(self, name)}"
                )


@dataclass
class ScheduleSettings:
    """The learning rate over the tokens of the run."""

    name: Literal["wsd", "cosine"] = "wsd"
    """Warm-up, stable, linear decay to the final rate; or warm-up and a cosine."""
    warmup: Count | None = None
    """Tokens of linear warm-up. Default: 2% of the run, at least 10 steps and at most half of it."""
    decay: Count | None = None
    """Tokens of decay at the end (wsd). Default: 60% of the run, or what the warm-up leaves."""
    final: float | None = None
    """Rate at the end, relative to the peak. Default: 0 (wsd), 0.1 (cosine)."""

    def __post_init__(self) -> None:
        if self.final is not None and not 0 <= self.final <= 1:
            raise ValueError(f"--schedule.final must be from 0 to 1, not {self.final}")


class ScoreInLoop:
    """What to score while training: ``quick@every=1e8``, ``hellaswag+piqa@every=50M,limit=200,data=DIR``."""

    def __init__(self, named: str, every: int, limit: int | None, data: str | None) -> None:
        self.named, self.every, self.limit, self.data = named, every, limit, data

    @property
    def tasks(self) -> list[str]:
        """The quick tasks that are meant."""
        return list(QUICK) if self.named == "quick" else self.named.split("+")

    @classmethod
    def parse(cls, value: Any) -> "ScoreInLoop":
        """Read it; ValueError says what is wrong."""
        named, _, rest = str(value).strip().partition("@")
        options = dict(word.partition("=")[::2] for word in rest.split(",") if word)
        unknown = sorted(options.keys() - {"every", "limit", "data"})
        if unknown or "every" not in options:
            raise ValueError(f"{str(value)!r} is not like quick@every=1e8 (also limit=ROWS, data=DIR)")
        every, limit = Count.parse(options["every"]), options.get("limit")
        if not every or (limit is not None and not Count.parse(limit)):
            raise ValueError(f"every and limit must be at least 1 in {str(value)!r}")
        asked = cls(named, every, None if limit is None else Count.parse(limit), options.get("data"))
        strangers = [name for name in asked.tasks if name not in QUICK]
        if strangers:
            raise ValueError(f"{strangers[0]!r} is neither quick nor one of {', '.join(QUICK)}")
        return asked

    def __str__(self) -> str:
        options = {"every": self.every, "limit": self.limit, "data": self.data}
        return f"{self.named}@" + ",".join(f"{name}={value}" for name, value in options.items() if value is not None)


register_type(ScoreInLoop, serializer=str, deserializer=ScoreInLoop.parse)


@dataclass
class EvalSettings:
    """Validation and sample continuations while training."""

    every: Count | None = option(None, MAY_CHANGE)
    """Tokens between evaluations; 0: never. Default: a twentieth of the run."""
    tokens: Count | None = option(None, MAY_CHANGE)
    """Held-out tokens of each source to evaluate on. Default: a fiftieth of the run, 20,000 to 500,000."""
    prompts: list[str] = field(
        default_factory=lambda: ["The", "In this paper we", "Once upon a time", "To make a good cup of tea,"],
        metadata=MAY_CHANGE,
    )
    """Beginnings that the model continues at every evaluation."""
    continuation: int = field(default=48, metadata=MAY_CHANGE)
    """Tokens of each continuation; 0: none."""
    scores: ScoreInLoop | None = field(default=None, metadata=MAY_CHANGE)
    """Score likelihood tasks too, at the first evaluation after every so many tokens: quick@every=1e8, or some with
    hellaswag+piqa@every=50M,limit=200,data=DIR. Rows come from the hub unless data names a folder."""


@dataclass
class CheckpointSettings:
    """When the run is saved."""

    every: int | None = field(default=None, metadata=MAY_CHANGE)
    """Steps between checkpoints. Default: a twentieth of the run, 10 to 1,000."""
    minutes: float = field(default=30.0, metadata=MAY_CHANGE)
    """Minutes after which a checkpoint is made in any case."""
    keep: int = field(default=3, metadata=MAY_CHANGE)
    """How many of the newest checkpoints stay."""

    def __post_init__(self) -> None:
        if self.minutes <= 0:
            raise ValueError(f"--checkpoint.minutes must be positive, not {self.minutes}")
        if self.keep < 1 or (self.every is not None and self.every < 1):
            raise ValueError("--checkpoint.keep and --checkpoint.every must be at least 1")


@dataclass
class HealthSettings:
    """When a step is not taken. A step whose loss or gradient norm is not finite never is."""

    spike: float = field(default=6.0, metadata=MAY_CHANGE)
    """Skip a step whose gradient norm is so many standard deviations above its running mean; 0: never, as always under
    DeepSpeed."""
    patience: int = field(default=20, metadata=MAY_CHANGE)
    """Stop the run after so many skipped steps in a row."""

    def __post_init__(self) -> None:
        if self.spike < 0:
            raise ValueError(f"--health.spike must not be negative, not {self.spike}")
        if self.patience < 1:
            raise ValueError(f"--health.patience must be at least 1, not {self.patience}")


@dataclass
class LogSettings:
    """What is written while training."""

    every: int = field(default=10, metadata=MAY_CHANGE)
    """Steps between lines on the console and flushes of metrics.jsonl (which has every step)."""
    tensorboard: bool = field(default=True, metadata=MAY_CHANGE)
    """Write TensorBoard events into the run folder."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"--log.every must be at least 1, not {self.every}")


@dataclass
class RunSettings:
    """What every run of the loop can be told, whatever stage it is of."""

    tokens: Count | None = None
    """Training budget, such as 2e9. Default: 20 tokens a parameter."""
    seq_len: Count | None = None
    """Tokens in a row. Default: the size's context."""
    batch_tokens: Count | None = None
    """Tokens in a global batch. Default: grows with the root of the budget, 2^12 to 2^20; with --init and --teacher so
    small that there are 128 steps."""
    run: str | None = field(default=None, metadata=MAY_CHANGE)
    """Name (under runs/) or path of the run folder. Default: the size and the date of its start, or the SLURM job."""
    resume: str = field(default="auto", metadata=MAY_CHANGE)
    """auto: go on from the run's newest good checkpoint; never: refuse a run that exists; or a checkpoint's path."""
    seed: int = 0
    """Decides the initial weights and the order of shards."""
    device: str = field(default="auto", metadata=MAY_CHANGE)
    """auto, cpu, cuda or cuda:N."""
    devices: int | None = field(default=None, metadata=MAY_CHANGE)
    """Processes on a node, each with a GPU (or a share of the CPU). Default: torchrun's or SLURM's, else 1."""
    nodes: int | None = field(default=None, metadata=MAY_CHANGE)
    """Machines. Default: torchrun's or SLURM's, else 1."""
    strategy: Strategy = field(default="auto", metadata=MAY_CHANGE)
    """How the job is spread. auto: by the plan, ddp where a device holds the model, else hsdp or fsdp."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = field(default="auto", metadata=MAY_CHANGE)
    """Recompute in the backward pass: the feed-forward halves (selective) or whole blocks. auto: by the plan."""
    deepspeed_config: str | None = field(default=None, metadata=MAY_CHANGE)
    """JSON of DeepSpeed's own settings, laid over ours."""
    precision: Literal["auto", "32", "bf16"] = "auto"
    """bf16 computes in bfloat16 over fp32 weights. Default: bf16 where the device multiplies it natively."""
    fp8: bool = field(default=False, metadata=MAY_CHANGE)
    """Beside bf16, multiply within the blocks in float8: faster from about 1b up, on GPUs from L4 and H100 on. It needs
    the extra fp8 (torchao)."""
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata=MAY_CHANGE)
    """Compile the model with torch.compile. Default: on CUDA."""
    deterministic: bool = False
    """Insist on bit-identical results from run to run, at some speed."""
    keep_every: int | None = field(default=None, metadata=MAY_CHANGE)
    """Save every N steps and keep those checkpoints for good."""
    micro_batch: int | None = field(default=None, metadata=MAY_CHANGE)
    """Rows in one forward pass. Default: what fits."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """Optimiser."""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """Learning-rate schedule."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Checkpoints."""
    health: HealthSettings = field(default_factory=HealthSettings)
    """Steps that are skipped."""
    log: LogSettings = field(default_factory=LogSettings)
    """Logs."""

    def __post_init__(self) -> None:
        for name in ("tokens", "seq_len", "batch_tokens", "micro_batch", "keep_every", "devices", "nodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


@dataclass
class PretrainSettings:
    """What only pre-training can be told: the model's shape and its text."""

    size: str | None = None
    """Shape of the model, a row of models/sizes.py: tiny, 15m, 60m, 125m … 3b, c4-60m … c4-1b. Default: 125m."""
    data: Mix = option(Mix.parse("c4"))
    """c4, c4:LANGUAGE, sample, a folder (C4's layout or prepared), or a mix: c4:en=0.9,c4:zh=0.1."""
    tokenizer: str | None = None
    """A tokenizer's folder, a model folder or a name on the hub. Default: one is trained before the first step."""
    init: str | None = None
    """Start a new run from the weights of a model folder (also Llama, Qwen2, Qwen3 or Phi) or a checkpoint."""
    teacher: str | None = None
    """Model folder to learn from beside the text, as a pruned model recovers from the whole one (distillation)."""
    distill: DistillSettings = field(default_factory=DistillSettings)
    """The teacher."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters."""
    skip_bad_shards: bool = field(default=False, metadata=MAY_CHANGE)
    """Pass over shards that cannot be decompressed, and count them, instead of stopping."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Departures from the size."""
    loader: LoaderSettings = field(default_factory=LoaderSettings)
    """Data loader."""
    eval: EvalSettings = field(default_factory=EvalSettings)
    """Evaluation."""


@dataclass
class TrainSettings(RunSettings, PretrainSettings):  # fields of the last base come first, in the help too
    """Pre-train a language model from text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher is None and self.distill != DistillSettings():
            raise ValueError("--distill.weight and --distill.temperature belong to --teacher")
        if self.lora.rank is not None and self.init is None:
            raise ValueError("--lora.rank trains adapters beside the weights of --init")


@dataclass
class TrainCommand(TrainSettings):
    """What ``python train.py`` takes: a run's settings, and what to do with them instead of training here."""

    recipe: str | None = field(default=None, metadata={"recipes": "train"})
    """Settings of recipes/train, galore-60m … galore-1b, or any YAML file of settings; flags win over it."""
    plan: bool = False
    """Print what the run would cost and whether it fits, and stop."""
    explain: bool = False
    """With --plan: the formula of every figure."""
    gpu: str | None = None
    """With --plan: the GPU to plan for, such as h100-80g. Default: the one that is here, else h100-80g."""
    price: float | None = None
    """With --plan: price of a GPU-hour in dollars."""
    slurm: Request | None = None
    """Submit a SLURM job: nodes=4,gpus=8,time=24:00:00 (also tasks, cpus, mem, signal, partition, account, qos,
    constraint)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("explain", "gpu", "price"):
            if getattr(self, name) and not self.plan:
                raise ValueError(f"--{name} belongs to --plan; to choose what to train on use --device and --devices")
        if self.plan and self.slurm is not None:
            raise ValueError("--plan takes --nodes and --devices, processes a node, in place of --slurm")
        if self.price is not None and self.price < 0:
            raise ValueError(f"--price must not be negative, not {self.price}")


def run_settings(command: TrainCommand) -> TrainSettings:
    """The settings of the run that a command asks for."""
    return TrainSettings(**{field.name: getattr(command, field.name) for field in fields(TrainSettings)})


def model_config(settings: TrainSettings) -> ModelConfig:
    """The shape to train: the size's, or with ``--init`` that of the given weights, of foreign ones the nearest.

    Raises:
        UserError: ``--size`` names another shape than ``--init`` holds, or rows are longer than foreign weights take.
    """
    changes = {"vocab": settings.model.vocab, "qk_norm": settings.model.qk_norm}
    if settings.init is None:
        config = adapt(size(settings.size or "125m").config, **changes)  # type: ignore[arg-type]
    else:
        config = taken_shape(Path(settings.init))
        for name, value in changes.items():
            if value is not None and value != getattr(config, name):
                flag = name.replace("_", "-")
                raise UserError(f"--model.{flag} {value} cannot change the weights of --init ({getattr(config, name)})")
        if settings.size is not None:
            named = adapt(
                size(settings.size).config, vocab=config.vocab, context=config.context, qk_norm=config.qk_norm
            )
            if named != config:
                raise UserError(f"--init {settings.init} holds {config}, but --size {settings.size} is {named}")
    if settings.seq_len is not None and settings.seq_len > config.context:
        if not trains_ours(settings):
            raise UserError(f"--seq-len {settings.seq_len} is longer than the context of --init, {config.context}")
        config = adapt(config, context=settings.seq_len)
    return config


def trains_ours(settings: TrainSettings) -> bool:
    """Whether the model of a new run is our transformer, not one of transformers' own."""
    return settings.init is None or is_ours(read_values(Path(settings.init)))


def resolve(settings: TrainSettings, config: ModelConfig, world: int = 1, *, own: bool = True) -> TrainSettings:
    """Fill in every default that follows from the shape and the budget.

    Args:
        settings: as given.
        config: the shape.
        world: devices that share the batch.
        own: whether the model is our transformer.

    Raises:
        UserError: as :func:`resolve_run` and :func:`check_whole`, the streams cannot be shared evenly, z-loss is
            asked for where there is none, or another model than that of the run that goes on.
    """
    check_whole(settings, settings.lora, own=own)
    for name in ("vocab", "qk_norm"):
        asked, there = getattr(settings.model, name), getattr(config, name)
        if asked not in (None, there):
            raise UserError(
                f"--model.{name.replace('_', '-')} {asked} cannot change the model of the run, which has {there}; "
                "choose another --run"
            )
    if settings.model.z_loss and (settings.teacher is not None or not own):
        raise UserError("--model.z-loss is for our own models without a teacher; leave it out")
    tokens = settings.tokens or Count(budget.default_tokens(config))
    recovers = settings.init is not None and settings.teacher is not None
    seq_len = settings.seq_len or Count(min(config.context, SEQ_LEN) if recovers or not own else config.context)
    usual = default_batch_tokens(tokens)
    if recovers:
        usual = max(1, min(usual, tokens // RECOVERY_STEPS))
    rows = max(1, round(usual / seq_len / world)) * world
    batch = settings.batch_tokens or Count(rows * seq_len)
    held_out = settings.eval.tokens or Count(min(500_000, max(20_000, tokens // 50)))
    every = settings.eval.every if settings.eval.every is not None else Count(max(tokens // 20, batch))
    resolved = replace(
        settings,
        size=settings.size or (None if settings.init else "125m"),
        tokens=tokens,
        seq_len=seq_len,
        batch_tokens=batch,
        run=run_name(settings),
        optimizer=_optimizer(settings, config, min(1.0, batch / usual)),
        lora=fill_alpha(settings.lora),
        model=replace(settings.model, vocab=Count(config.vocab), qk_norm=config.qk_norm),
        eval=replace(settings.eval, every=every, tokens=held_out),
    )
    resolved = resolve_run(resolved, world)
    if resolved.eval.scores is not None and not every:
        raise UserError("--eval.scores scores at an evaluation, of which --eval.every 0 has none")
    if resolved.eval.scores is not None and settings.strategy.startswith("deepspeed-3"):
        raise UserError(f"--eval.scores needs whole weights, which --strategy {settings.strategy} has not; use fsdp")
    if resolved.eval.scores is not None and settings.lora.rank is not None:
        raise UserError("--eval.scores scores plain weights; leave it or --lora.rank out")
    check_streams(settings.loader, world)
    return resolved


def _optimizer(settings: TrainSettings, config: ModelConfig, share: float) -> OptimizerSettings:
    """The optimiser with its name, rate and second beta, for a batch of a share of the usual one."""
    given = settings.optimizer
    new = settings.init is None and not settings.strategy.startswith("deepspeed")
    name = given.name if given.name != "auto" else "muon" if new else "adamw"
    beta2 = BETA2**share if name == "muon" and given.beta2 is None else given.beta2
    return replace(given, name=name, lr=given.lr or _rate(settings, config, name, share), beta2=beta2)


def _rate(settings: TrainSettings, config: ModelConfig, optimizer: str, share: float) -> float:
    """The default peak learning rate, as :class:`OptimizerSettings` tells it."""
    if settings.lora.rank is not None:
        return 10 * TUNING_RATE / config.width
    if settings.init is not None and settings.teacher is not None:
        return TUNING_RATE / config.width
    if optimizer == "muon":
        return MUON_RATE / config.width ** (2 / 3) * share**0.5
    return min(4e-3, 1e-3 * 768 / config.width)


def check_whole(settings: RunSettings, lora: LoraSettings, *, own: bool) -> None:
    """UserError when muon, DeepSpeed or float8 is asked for where not all weights of a model of ours are trained."""
    if own and lora.rank is None:
        return
    if settings.fp8:
        raise UserError("--fp8 multiplies in our own models without adapters; leave it out")
    if settings.optimizer.name == "muon":
        raise UserError("muon trains whole matrices of our own models; use --optimizer.name adamw")
    if settings.strategy.startswith("deepspeed"):
        raise UserError(f"--strategy {settings.strategy} takes our own models without adapters; use --strategy fsdp")


def fill_alpha(lora: LoraSettings) -> LoraSettings:
    """Twice the rank where nothing else is asked for."""
    return lora if lora.rank is None else replace(lora, alpha=lora.alpha or 2 * lora.rank)


def resolve_run(settings: Run, world: int) -> Run:
    """Fill in what follows from the budget, sequence length, batch and learning rate, which must be known.

    Args:
        settings: of a run of any stage.
        world: devices that share the batch.

    Raises:
        UserError: the batch does not divide into rows, the rows among the devices, or into micro-batches; muon,
            float8 or compilation is asked for where DeepSpeed does not allow it.
    """
    tokens, seq_len, batch, schedule = settings.tokens, settings.seq_len, settings.batch_tokens, settings.schedule
    assert tokens is not None
    assert seq_len is not None
    assert batch is not None
    if settings.compile == "on" and settings.strategy.startswith("deepspeed-3"):
        raise UserError(f"--compile does not work with --strategy {settings.strategy}, whose hooks break every graph")
    if settings.optimizer.name == "muon" and settings.strategy.startswith("deepspeed"):
        raise UserError(
            f"muon needs whole matrices, which --strategy {settings.strategy} cuts into pieces; use --strategy fsdp, "
            "or --optimizer.name adamw"
        )
    if settings.deepspeed_config is not None and not settings.strategy.startswith("deepspeed"):
        raise UserError("--deepspeed-config belongs to --strategy deepspeed-2, deepspeed-3 or deepspeed-3-offload")
    if settings.fp8 and (settings.strategy.startswith("deepspeed") or settings.precision == "32"):
        raise UserError("--fp8 stands beside --precision bf16, under --strategy ddp, fsdp or hsdp")
    if batch % seq_len:
        below = batch // seq_len * seq_len
        choices = " or ".join(str(value) for value in (below, below + seq_len) if value)
        raise UserError(f"--batch-tokens {batch} is not a whole number of rows of {seq_len} tokens; use {choices}")
    share = share_of_rows(batch, seq_len, world)
    if settings.micro_batch is not None:
        check_micro_batch(settings.micro_batch, share)
    warmup = schedule.warmup if schedule.warmup is not None else Count(min(max(tokens // 50, 10 * batch), tokens // 2))
    decay = schedule.decay if schedule.decay is not None else Count(max(0, min(int(DECAY * tokens), tokens - warmup)))
    if warmup + (decay if schedule.name == "wsd" else 0) > tokens:
        raise UserError(
            f"the warm-up of {warmup:,} tokens and the decay of {decay:,} do not fit into the run of {tokens:,}; give "
            "smaller ones with --schedule.warmup and --schedule.decay"
        )
    save = settings.checkpoint.every or min(1000, max(10, math.ceil(tokens / batch) // 20))
    optimizer = settings.optimizer
    return replace(
        settings,
        optimizer=replace(
            optimizer,
            name="adamw" if optimizer.name == "auto" else optimizer.name,
            beta2=BETA2 if optimizer.beta2 is None else optimizer.beta2,
        ),
        schedule=replace(
            schedule,
            warmup=warmup,
            decay=decay,
            final=schedule.final if schedule.final is not None else {"wsd": 0.0, "cosine": 0.1}[schedule.name],
        ),
        checkpoint=replace(settings.checkpoint, every=save),
    )


def check_streams(loader: LoaderSettings, world: int) -> None:
    """UserError when the canonical streams cannot be shared evenly by the devices and their workers."""
    readers = world * max(loader.workers or 1, 1)
    if loader.streams % readers:
        workers = f" with {loader.workers} workers each" if (loader.workers or 0) > 1 else ""
        raise UserError(
            f"{loader.streams} streams cannot be shared evenly by {world} devices{workers}; a new run may take "
            f"--loader.streams {-(-loader.streams // readers) * readers}, one that goes on needs devices × workers "
            "that divide them"
        )


def default_batch_tokens(tokens: int) -> int:
    """A power of two near 2^18 · sqrt(tokens / 2.5e9), between 2^12 and 2^20.

    The critical batch, with which about a fifth more tokens are needed than with small ones: that it grows as the
    root of the tokens is from Zhang et al., arXiv:2410.21676, the factor from the runs in docs/log.md.
    """
    return int(2 ** min(20, max(12, round(18 + math.log2(tokens / 2.5e9) / 2))))


def run_name(settings: TrainSettings) -> str:
    """The name given, or one of the size."""
    return settings.run or dated_name(called_after(settings))


def called_after(settings: TrainSettings) -> str:
    """What a run without a name is called after: the size, or the weights that it starts from."""
    return settings.size or (Path(settings.init).name if settings.init else "125m")


def dated_name(subject: str) -> str:
    """The subject and the SLURM job, which a requeued job keeps, or else a date.

    Today's; but that of the newest such run where it is not finished, so that the same command goes on with it after
    midnight, too.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        return f"{subject}-{job}"
    dated = re.compile(re.escape(subject) + r"-\d{4}-\d\d-\d\d")
    there = sorted(path for path in RUNS.glob("*") if dated.fullmatch(path.name) and (path / "config.yaml").exists())
    if there and not (there[-1] / "model").exists():
        return there[-1].name
    return f"{subject}-{datetime.date.today().isoformat()}"


def run_path(name: str) -> Path:
    """Where a run lives: what has a slash or is ``.`` is a path, a plain name lies under ``runs/``."""
    return Path(name).expanduser() if "/" in name or name == "." else RUNS / name
