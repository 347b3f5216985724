"""The shapes that can be trained by name; adding one is adding a row.

The own sizes are deep and thin: at equal parameters, depth serves small language models better than
width (MobileLLM, arXiv:2402.14905). Heads are 64 wide (128 from 3b), query heads share key/value
heads (GQA) so that the KV cache of a phone stays small, and below 1b the embedding is tied to the
head, where it would otherwise be a large part of the model. The ``c4-`` shapes are those of the
GaLore paper (arXiv:2403.03507) and of the C4 tables that followed it.
"""

import difflib
from dataclasses import dataclass, replace

from common.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and the arithmetic of a model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ffn: int
    vocab: int
    context: int
    """The longest row, in tokens, that it is trained on."""
    tied: bool
    """The head is the embedding."""
    qk_norm: bool
    """RMSNorm on queries and keys: the Qwen3 face; without it, the Llama face."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_width", "ffn", "vocab", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"a model needs {name} of at least 1, not {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.head_width % 2:
            raise ValueError(f"head_width {self.head_width} is odd: rotary embedding turns pairs")


@dataclass(frozen=True)
class Size:
    """A named shape, its parameter count and the reason for it."""

    config: ModelConfig
    parameters: int
    why: str


def _row(
    layers: int, width: int, heads: int, kv: int, head: int, ffn: int, vocab: int, context: int,
    tied: int, qk: int, parameters: int, why: str,
) -> Size:  # fmt: skip
    config = ModelConfig(layers, width, heads, kv, head, ffn, vocab, context, bool(tied), bool(qk))
    return Size(config, parameters, why)


# fmt: off
SIZES: dict[str, Size] = {
    #               layers width heads kv head  ffn  vocab   ctx tied qk    parameters  why this shape
    "tiny":    _row(  6,   192,   3,  1,  64,  512,  4096,  256, 1,  1,     3_148_992, "learns to spell in minutes on two CPU cores"),
    "15m":     _row( 14,   256,   4,  2,  64,  704, 16384,  512, 1,  1,    14_525_440, "the smallest that writes sentences; half the usual vocabulary"),
    "60m":     _row( 16,   512,   8,  2,  64, 1408, 32768, 2048, 1,  1,    61_884_928, "a first real run on one small GPU"),
    "125m":    _row( 30,   576,   9,  3,  64, 1536, 32768, 2048, 1,  1,   125_081_664, "MobileLLM-125M's depth and width"),
    "350m":    _row( 32,   960,  15,  5,  64, 2560, 32768, 2048, 1,  1,   346_096_576, "MobileLLM-350M's depth and width"),
    "600m":    _row( 40,  1152,  18,  6,  64, 3072, 32768, 2048, 1,  1,   604_078_208, "MobileLLM-600M's depth and width"),
    "1b":      _row( 54,  1280,  20,  5,  64, 3584, 32768, 2048, 0,  1, 1_048_394_752, "MobileLLM-1B's depth and width; 2.1 GB in fp16"),
    "1.5b":    _row( 52,  1600,  25,  5,  64, 4352, 32768, 2048, 0,  1, 1_510_779_456, "near MobileLLM-1.5B; the largest below MLC's OpenCL memory gate"),
    "3b":      _row( 40,  2560,  20,  4, 128, 6912, 32768, 2048, 0,  1, 2_920_501_760, "6 GB with its cache: a 12 GB phone holds it, MLC's OpenCL gate does not pass it"),
    "c4-60m":  _row(  8,   512,   8,  8,  64, 1376, 32000,  256, 0,  0,    58_073_600, "GaLore's LLaMA 60M, for its C4 table"),
    "c4-130m": _row( 12,   768,  12, 12,  64, 2048, 32000,  256, 0,  0,   134_105_856, "GaLore's LLaMA 130M"),
    "c4-350m": _row( 24,  1024,  16, 16,  64, 2736, 32000,  256, 0,  0,   367_969_280, "GaLore's LLaMA 350M"),
    "c4-1b":   _row( 24,  2048,  32, 32,  64, 5461, 32000,  256, 0,  0, 1_339_082_752, "GaLore's LLaMA 1B"),
}
# fmt: on


def size(name: str) -> Size:
    """The row called ``name``; UserError with the list, closest names first, when there is none."""
    if name in SIZES:
        return SIZES[name]
    ranked = sorted(SIZES, key=lambda known: -difflib.SequenceMatcher(None, name.lower(), known).ratio())
    raise UserError(f"no size is called {name!r}; the sizes are {', '.join(ranked)} (closest first)")


def adapt(
    config: ModelConfig, *, vocab: int | None = None, context: int | None = None, qk_norm: bool | None = None
) -> ModelConfig:
    """``config`` with the given fields replaced; None keeps what it has."""
    changes = {"vocab": vocab, "context": context, "qk_norm": qk_norm}
    return replace(config, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
