"""What ``python -m sft`` can be told, and the defaults that follow from the model and the data.

Imports neither torch nor lightning: ``--help`` reads this module.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from common.settings import MAY_CHANGE, Count, option
from data.settings import Mix
from models.hf_config import within_context
from models.sizes import ModelConfig
from train.learning import DistillSettings, LoraSettings
from train.settings import TUNING_RATE, RunSettings, check_whole, dated_name, fill_alpha, resolve_run

BATCH_TOKENS = 16_384
"""Of the default batch: some 130 conversations of Alpaca's, whose own recipe takes 128."""

SEQ_LEN = 1_024
"""The longest default row; less than one in a thousand of Alpaca's conversations is longer."""


@dataclass
class AnswerSettings:
    """Validation and answers to fixed questions while training."""

    every: Count | None = option(None, MAY_CHANGE)
    """Tokens between evaluations; 0: never. Default: a tenth of the run."""
    tokens: Count = option(Count(50_000), MAY_CHANGE)
    """Held-out tokens of each language to evaluate on."""
    prompts: list[str] = field(
        default_factory=lambda: [
            "What is the capital of France?",
            "Name three animals that live in the sea.",
            "Write a sentence about autumn.",
            "Which is larger, 17 or 71? Explain.",
            "中国的首都是哪里？",
            "说出三种水果的名字。",
            "用一句话描述秋天。",
            "把“谢谢你”翻译成英文。",
        ],
        metadata=MAY_CHANGE,
    )
    """Questions that the model answers at every evaluation."""
    answer: int = field(default=48, metadata=MAY_CHANGE)
    """Most tokens of an answer; 0: none."""

    def __post_init__(self) -> None:
        if self.answer < 0 or self.tokens < 1:
            raise ValueError("--eval.answer must not be negative, and --eval.tokens at least 1")


@dataclass
class Conversations:
    """What only fine-tuning can be told: the model, its data, and how it learns."""

    model: str | None = None
    """Model folder to start from."""
    data: Mix = option(Mix.parse("alpaca=1,alpaca_zh=1"))
    """alpaca, alpaca_zh, sample, JSON or JSON lines files (also gzipped), ORG/NAME on the hub, with weights."""
    epochs: float | None = option(None, MAY_CHANGE)
    """Times through the data; --tokens in its place is a budget. Default: 3."""
    keep_out: str | None = None
    """Folder of evaluation data; what shares 13 words in a row with it, or a whole shorter question, is left out."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters."""
    teacher: str | None = None
    """Model folder to learn from beside the data, as a pruned model recovers (knowledge distillation)."""
    distill: DistillSettings = field(default_factory=DistillSettings)
    """The teacher."""
    eval: AnswerSettings = field(default_factory=AnswerSettings)
    """Evaluation."""


@dataclass
class SftSettings(RunSettings, Conversations):  # fields of the last base come first, in the help too
    """Fine-tune a model folder on conversations."""

    tokens: Count | None = None
    """Training budget, padding and questions counted. Default: --epochs of the data."""
    seq_len: Count | None = None
    """Positions in a row; longer conversations are left out. Default: the model's context, at most 1024."""
    batch_tokens: Count | None = None
    """Positions in a global batch. Default: about 16,384."""
    seed: int = 0
    """Decides the order of conversations and the adapters' first weights."""
    run: str | None = field(default=None, metadata=MAY_CHANGE)
    """Name (under runs/) or path of the run folder. Default: the model's name, sft and the date or SLURM job."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise ValueError("give the model folder to start from: python -m sft MODEL")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"--epochs must be positive, not {self.epochs}")
        if self.teacher is None and self.distill != DistillSettings():
            raise ValueError("--distill.weight and --distill.temperature belong to --teacher")


@dataclass
class SftCommand(SftSettings):
    """What ``python -m sft`` takes: a run's settings, and what to do with them instead of training."""

    show: int | None = None
    """Print the first so many conversations of every source, token by token, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.tokens is not None:
            raise ValueError("--epochs and --tokens both say how long to train; leave one out")
        if self.show is not None and self.show < 1:
            raise ValueError(f"--show must be at least 1, not {self.show}")


def sft_settings(command: SftCommand) -> SftSettings:
    """The settings of the run that a command asks for."""
    return SftSettings(**{field.name: getattr(command, field.name) for field in fields(SftSettings)})


def run_name(settings: SftSettings) -> str:
    """The name given, or one of the model: its folder's, or its run's where the folder is called ``model``."""
    folder = Path(settings.model or "").absolute()
    name = folder.parent.name if folder.name == "model" else folder.name
    return settings.run or dated_name(f"{name}-sft")


def row_length(settings: SftSettings, shape: ModelConfig) -> int:
    """Positions in a row; UserError when the model's context is shorter than what is asked for."""
    return within_context("--seq-len", settings.seq_len, SEQ_LEN, shape.context)


def resolve(settings: SftSettings, shape: ModelConfig, *, own: bool, rows: int | None, world: int) -> SftSettings:
    """Fill in every default that follows from the model and the data.

    The learning rate is 2e-5 at width 4096, Alpaca's own for LLaMA-7B, in inverse proportion to the width, and ten
    times that for adapters.

    Args:
        settings: as given.
        shape: of the model.
        own: whether the model is our transformer.
        rows: in the epochs asked for; None where there is a budget of tokens.
        world: devices that share the batch.

    Raises:
        UserError: as :func:`train.settings.resolve_run`; or muon or DeepSpeed is asked for where it does not work.
    """
    check_whole(settings, settings.lora, own=own)
    seq_len = row_length(settings, shape)
    batch = settings.batch_tokens or Count(max(1, round(BATCH_TOKENS / seq_len / world)) * world * seq_len)
    tokens = settings.tokens if rows is None else Count(-(-rows * seq_len // batch) * batch)
    assert tokens is not None
    every = settings.eval.every if settings.eval.every is not None else Count(max(tokens // 10, batch))
    rate = TUNING_RATE / shape.width * (1 if settings.lora.rank is None else 10)
    return resolve_run(
        replace(
            settings,
            tokens=tokens,
            epochs=None,
            seq_len=Count(seq_len),
            batch_tokens=batch,
            run=run_name(settings),
            optimizer=replace(settings.optimizer, lr=settings.optimizer.lr or rate),
            lora=fill_alpha(settings.lora),
            eval=replace(settings.eval, every=every),
        ),
        world,
    )
