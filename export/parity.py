"""Whether an exported library computes what transformers does: :func:`check`.

The reference is transformers in fp32 on the weights rounded to fp16, which is what the export holds; so what is
compared is arithmetic alone. Both read the same text, token by token as it stands there. The library reads it the three
ways that it has: a chunk, a chunk after another, and tokens one at a time.

Letters: T tokens, V vocabulary.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import gigabytes
from data.sources import TextSource, open_source
from data.tokenizer import Tokenizer
from data.validation import held_out_texts
from export.engine import Array, Engine

TEXTS = 2
"""Stretches of text that are read."""

TOKENS = 640
"""Of a stretch at most: more than a chunk of prefill, so that a second one looks back on it."""

DECODED = 16
"""Tokens of a stretch, its last ones, that are read one at a time."""

ROWS = 64
"""Positions that are compared at one time: a large vocabulary's probabilities are not all in memory together."""

LARGEST_DIVERGENCE = 1e-3
"""Mean KL divergence of a library with fp16 weights, in nats, that passes."""

CLEAR = 0.2
"""Where the two highest logits differ by more, the library must choose the same."""

LARGEST_DIFFERENCE = 1e-4
"""Of logits of a library in fp32 that passes, as a share of the largest logit where that is above 1."""


@dataclass(frozen=True)
class Parity:
    """What :func:`check` found."""

    tokens: int
    """Positions that were compared."""
    divergence: float
    """Mean KL divergence from transformers to the library, in nats."""
    difference: float
    """The largest difference of two logits."""
    scale: float
    """The largest logit, without its sign."""
    clear: int
    """Positions whose two highest logits differ by more than :data:`CLEAR`."""
    agreed: int
    """Those of them where the library has the same one highest."""
    dtype: str
    """Of the library: f16 or f32."""

    @property
    def problem(self) -> str | None:
        """What is over the bar."""
        if self.divergence > LARGEST_DIVERGENCE or not np.isfinite(self.divergence):
            return f"the mean KL divergence is {self.divergence:.3g}, over {LARGEST_DIVERGENCE}"
        if self.agreed < self.clear:
            return f"{self.clear - self.agreed:,} of {self.clear:,} clear choices differ"
        bar = LARGEST_DIFFERENCE * max(1.0, self.scale)
        if self.dtype == "f32" and self.difference > bar:
            return f"logits differ by up to {self.difference:.3g}, over {bar:.3g}"
        return None

    @property
    def summary(self) -> str:
        """The figures in a line."""
        return (
            f"KL {self.divergence:.2e}, logits within {self.difference:.1e} of up to {self.scale:.1f}, "
            f"{self.agreed:,} of {self.clear:,} clear choices alike ({self.tokens:,} tokens)"
        )


def check(model: Path, export: Path) -> dict[str, Any]:
    """Compare the host library of an export with transformers on the model that it was made from.

    Args:
        model: folder of the model.
        export: folder with ``mlc`` and ``lib``.

    Returns:
        The fields of :class:`Parity`, and its ``summary``.

    Raises:
        UserError: a figure is over its bar.
    """
    (library,) = (export / "lib").glob("host-*.so")
    engine = Engine(library, export / "mlc")
    texts = read_texts(Tokenizer(model), engine.context)
    found = compare(reference(model, texts), candidate(engine, texts), engine.metadata["dtype"])
    if found.problem is not None:
        raise UserError(
            f"the exported library does not compute what transformers does: {found.problem}. {found.summary}. "
            "This is a fault of the export, not of the model"
        )
    return asdict(found) | {"summary": found.summary}


def candidate(engine: Engine, texts: list[list[int]]) -> list[Array]:
    """The library's logits (T, V) of each text."""
    found = []
    for ids in texts:
        engine.reset()
        last = min(DECODED, len(ids) - 1)
        read = [engine.all_logits(ids[: len(ids) - last])]
        read += [engine.decode(token)[None] for token in ids[len(ids) - last :]]
        found.append(np.concatenate(read))
    return found


def reference(model: Path, texts: list[list[int]]) -> list[Array]:
    """Transformers' logits (T, V) of each text, in fp32 on weights rounded to fp16."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    )
    with torch.inference_mode():
        for parameter in loaded.eval().parameters():
            parameter.copy_(parameter.half())
        return [loaded(torch.tensor([ids])).logits[0].numpy() for ids in texts]


def compare(expected: list[Array], found: list[Array], dtype: str) -> Parity:
    """The figures of two lists of logits (T, V)."""
    tokens = clear = agreed = 0
    divergence = difference = scale = 0.0
    for all_ours, all_theirs in zip(found, expected, strict=True):
        for first in range(0, len(all_theirs), ROWS):
            ours, theirs = all_ours[first : first + ROWS], all_theirs[first : first + ROWS]
            log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
            divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
            difference = max(difference, float(np.abs(ours - theirs).max()))
            scale = max(scale, float(np.abs(theirs).max()))
            second, highest = np.partition(theirs, -2, axis=-1)[:, -2:].T
            decided = highest - second > CLEAR
            clear += int(decided.sum())
            agreed += int((ours.argmax(-1) == theirs.argmax(-1))[decided].sum())
            tokens += len(theirs)
    return Parity(tokens, divergence / tokens, difference, scale, clear, agreed, dtype)


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def read_texts(tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """English prose that every machine has, as stretches of tokens."""
    source = open_source("sample")
    assert isinstance(source, TextSource)
    length, ids, found = min(TOKENS, context), list[int](), list[list[int]]()
    for text in held_out_texts(source):
        ids += tokenizer.encode(text)
        if len(ids) >= length:
            found.append(ids[:length])
            ids = []
        if len(found) == TEXTS:
            break
    return found or [ids]


def require_memory(weights: int, available: int | None) -> None:
    """Raise a UserError where :func:`check` does not fit into a machine's memory.

    Args:
        weights: bytes of the exported ones; transformers has them in fp32 beside.
        available: bytes; None where they are not known.
    """
    needed = 3 * weights
    if available is not None and needed > available:
        raise UserError(
            f"comparing the library with transformers in fp32 needs {gigabytes(needed)} of memory, and "
            f"{gigabytes(available)} are free; use a larger machine, or --parity skip"
        )


def available_memory() -> int | None:
    """Bytes that a process can still have; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    (line,) = [line for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(line.split()[1])
