"""What ``python -m pruning`` can be told. Imports neither torch nor transformers: ``--help`` reads this module."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from jsonargparse.typing import register_type

from common.settings import Count, option
from data.settings import Mix
from models.hf_config import within_context
from pruning.recover_settings import RecoverSettings
from scoring.settings import SUITES, ScoreSettings, words

CONTEXT = 1_024
"""Tokens in the phone's KV cache by default."""

SEQ_LEN = 512
"""The longest default row of calibration text."""

LEAST_TOKENS = 98_304
"""Of the default calibration, 192 rows of 512."""

TOKENS_A_COLUMN = 16
"""Calibration tokens for each feed-forward unit by default: fewer leave the repair's regression to chance."""


Cut = TypeVar("Cut", bound="CutSettings")


class Target:
    """Parameters to cut a model to: a share of what it has (``0.8``) or a count (``3.8B``)."""

    def __init__(self, typed: str, share: float | None, count: int | None) -> None:
        self.typed, self.share, self.count = typed, share, count

    @classmethod
    def parse(cls, value: Any) -> "Target":
        """Read a target; ValueError when it is neither."""
        text = str(value).strip()
        if re.fullmatch(r"0?\.\d+|1(\.0*)?", text):
            if float(text) in (0.0, 1.0):
                raise ValueError(f"a share of parameters lies between 0 and 1, as 0.8 does; {text!r} cuts nothing out")
            return cls(text, float(text), None)
        return cls(text, None, int(Count.parse(text)))

    def of(self, parameters: int) -> int:
        """The count, for a model of so many parameters."""
        return self.count if self.share is None else round(self.share * parameters)  # type: ignore[return-value]

    def __str__(self) -> str:
        return self.typed


class Bytes(int):
    """An amount of memory: ``8GB`` is 8·10⁹ bytes, ``8GiB`` 8·2³⁰."""

    @classmethod
    def parse(cls, value: Any) -> "Bytes":
        """Read an amount; ValueError when it is none."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", str(value), re.IGNORECASE)
        if match is None:
            raise ValueError(f"{value!r} is no amount of memory; write it like 8GB, 6.5GB or 512MiB")
        number, unit, binary = match.groups()
        power = "KMGT".index(unit.upper()) + 1 if unit else 0
        return cls(float(number) * (1024 if binary else 1000) ** power)


register_type(Target, serializer=str, deserializer=Target.parse)
register_type(Bytes, serializer=int, deserializer=Bytes.parse)


@dataclass
class CutSettings:
    """How units are chosen and repaired, and the text that decides it."""

    method: Literal["fisher", "energy", "l1", "taylor", "random"] = "fisher"
    """Importance of a unit: energy (its mean square times its outgoing weights), fisher (energy, each direction counted
    for what the prediction makes of it), l1 (the competition's baseline), taylor (needs the whole model and its
    gradients in memory), random (a control)."""
    repair: bool = True
    """Fit the matrices that read the units to what was cut, by least squares, and the temperature of the prediction."""
    calibration: Mix = option(Mix.parse("c4"))
    """Text to calibrate on: c4, a folder in C4's layout, sample, or a mix with weights. Other than C4: not track 1."""
    tokens: Count | None = None
    """Calibration tokens. More help more than any other setting, at a cost in proportion. An eighth, at most 2,048, is
    left to the temperature of the prediction. Default: 98,304, and 16 for each feed-forward unit of a layer."""
    seq_len: Count | None = None
    """Tokens in a row of it. Default: 512, or the model's context where that is shorter."""
    seed: int = 0
    """Decides which documents are read, and random's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where a block is run; auto: cuda where there is one."""

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"--seq-len must be at least 2, not {self.seq_len}")
        if self.tokens is not None and self.seq_len is not None and self.tokens < self.seq_len:
            raise ValueError(f"--tokens {self.tokens:,} do not fill one row of --seq-len {self.seq_len:,}")


@dataclass
class ShapeSettings:
    """What to cut the model to: a target, and axes that are settled beforehand."""

    params: Target | None = None
    """Parameters: a share of what there are (0.8) or a count (3.8B)."""
    phone_memory: Bytes | None = None
    """Memory on the phone for weights in fp16, KV cache and workspace, such as 8GB."""
    context: Count | None = None
    """Tokens in the phone's KV cache. Default: 1,024, or the model's context where that is shorter."""
    layers: int | None = None
    """Settle the number of layers."""
    ffn: Count | None = None
    """Settle the feed-forward width."""
    heads: int | None = None
    """Settle the query heads."""
    kv_heads: int | None = None
    """Settle the key/value heads; a query head goes with its own."""
    vocab: Count | Literal["auto", "keep"] = "auto"
    """Settle the vocabulary: a number of tokens, keep, or auto: whatever the target asks for."""
    chinese_tokens: int = 4_000
    """Tokens with Chinese characters that a cut vocabulary keeps at least, where there are so many; CHID needs them."""
    rank: int = 3
    """Shapes that meet the target and are tried on a quarter of the calibration text, the best of them cut; 1: the
    first by the order of axes, which costs no trial."""

    def __post_init__(self) -> None:
        if self.params is not None and self.phone_memory is not None:
            raise ValueError("--params and --phone-memory are two targets; give one")
        if self.context is not None and self.context < 1:
            raise ValueError(f"--context must be at least 1, not {self.context}")
        if self.rank < 1 or self.chinese_tokens < 0:
            raise ValueError("--rank must be at least 1 and --chinese-tokens not negative")

    @property
    def settled(self) -> dict[str, int]:
        """The axes that are settled, by the names of :class:`pruning.shapes.Shape`."""
        axes = {name: getattr(self, name) for name in ("layers", "ffn", "heads", "kv_heads")}
        if not isinstance(self.vocab, str):
            axes["vocab"] = int(self.vocab)
        return {name: int(value) for name, value in axes.items() if value is not None}


@dataclass
class PruneSettings(ShapeSettings, CutSettings):  # fields of the last base come first, in the help too
    """Cut a model."""

    measure: str | None = None
    """Texts to measure perplexity on before and after, separated by commas. Default: --calibration's and sample."""
    measure_tokens: Count = option(Count(12_288))
    """Held-out tokens of each."""

    def __post_init__(self) -> None:
        ShapeSettings.__post_init__(self)
        CutSettings.__post_init__(self)

    @property
    def texts(self) -> list[str]:
        """The sources that perplexity is measured on, each once."""
        if self.measure is not None:
            return words(self.measure)
        return list(dict.fromkeys([*(name for name, _ in self.calibration.parts), "sample"]))


@dataclass
class PruneCommand(PruneSettings):
    """The model, and what comes after the cut."""

    model: str | None = None
    """Model folder to cut; it stays as it is."""
    out: str | None = None
    """Folder to write. Default: the model's name with -pruned, beside the model."""
    plan: bool = False
    """Show the shapes that meet the target, and stop."""
    recover: bool = False
    """Train the cut model afterwards, the whole one as its teacher."""
    recovery: RecoverSettings = field(default_factory=RecoverSettings)
    """Recovery."""
    score: str | None = None
    """Score before and after: suites of python -m scoring, such as sample or competition."""
    score_data: str | None = None
    """Folder of evaluation data for it. Default: the hub."""
    score_limit: int | None = None
    """Score only so many rows of a task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise ValueError("give the model folder to cut: python -m pruning MODEL --params 0.8")
        if self.params is None and self.phone_memory is None and not self.settled:
            raise ValueError("give a target: --params 0.8, --params 3.8B, --phone-memory 8GB or a shape (--ffn 4096)")
        if self.recovery != RecoverSettings() and not self.recover:
            raise ValueError("--recovery.* belongs to --recover")
        unknown = [suite for suite in words(self.score) if suite not in SUITES]
        if unknown:
            raise ValueError(f"--score {unknown[0]} is no suite; there are {', '.join(SUITES)}")
        ScoreSettings(suite=self.score)  # refuses suites that do not go together
        for name in ("score_data", "score_limit"):
            if getattr(self, name) is not None and self.score is None:
                raise ValueError(f"--{name.replace('_', '-')} belongs to --score")
        if self.score_limit is not None and self.score_limit < 1:
            raise ValueError(f"--score-limit must be at least 1, not {self.score_limit}")


@dataclass
class ImportCommand:
    """What ``python -m pruning import`` takes."""

    model: str | None = None
    """Folder of a first-generation Qwen, as it lies on the hub."""
    out: str | None = None
    """Folder to write. Default: the model's name with -qwen2, beside it."""

    def __post_init__(self) -> None:
        if self.model is None:
            raise ValueError("give the folder of a first-generation Qwen: python -m pruning import Qwen-7B")


def resolve(settings: Cut, ffn: int, context: int) -> Cut:
    """Fill in the row's length, and calibration tokens in whole rows.

    Args:
        settings: as given.
        ffn: the model's feed-forward width, which the default of the tokens is enough for.
        context: tokens that the model can see.

    Raises:
        UserError: a row would be longer than the context.
    """
    seq_len = within_context("--seq-len", settings.seq_len, SEQ_LEN, context)
    tokens = settings.tokens or max(LEAST_TOKENS, TOKENS_A_COLUMN * ffn)
    return replace(settings, seq_len=Count(seq_len), tokens=Count(-(-tokens // seq_len) * seq_len))


def out_folder(model: str, out: str | None, ending: str) -> Path:
    """Where a command writes: as asked, else beside the model, under its name."""
    if out is not None:
        return Path(out)
    folder = Path(model).absolute()
    return folder.with_name(f"{folder.name}-{ending}")
