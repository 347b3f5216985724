"""What a cut did: ``pruning.json`` in the new model folder, and the table that is shown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import aligned
from common.errors import UserError
from common.files import gigabytes, write_json
from models.budget import PHONE_BANDWIDTH
from models.hf_config import read_values
from pruning.phone import Phone, on_phone
from pruning.plan import Candidate
from pruning.shapes import Shape, parameters

if TYPE_CHECKING:
    from pruning.perplexity import Measured

FILE = "pruning.json"
"""In the new model folder."""


@dataclass(frozen=True)
class Stage:
    """A model at one point: before the cut, after it, after recovery."""

    name: str
    folder: str
    shape: Shape
    parameters: int
    file_bytes: int
    """Of the weights on the disk."""
    phone: Phone
    losses: "tuple[Measured, ...]"
    """On held-out text, the same at every stage."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """By task, where the stage was scored."""

    @classmethod
    def of(cls, name: str, folder: Path, context: int, losses: "Sequence[Measured]") -> "Stage":
        """A model folder's figures, with what was measured of it."""
        values = read_values(folder)
        shape = Shape.of(values)
        return cls(
            name,
            str(folder),
            shape,
            parameters(values, shape),
            sum(file.stat().st_size for file in folder.glob("model*.safetensors")),
            on_phone(values, shape, context),
            tuple(losses),
        )

    def record(self) -> dict[str, Any]:
        """For ``pruning.json``."""
        losses = [
            asdict(one) | {"perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte} for one in self.losses
        ]
        return asdict(self) | {
            "phone": asdict(self.phone) | {"total": self.phone.total, "passes_opencl_gate": self.phone.passes_gate},
            "losses": losses,
        }


def write_report(folder: Path, stages: Sequence[Stage], more: dict[str, Any] | None = None) -> None:
    """Add the stages, and ``more``, to the ``pruning.json`` in a model folder; UserError where that is no JSON."""
    path = folder / FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; prune the model again") from error
    write_json(path, before | (more or {}) | {"stages": [stage.record() for stage in stages]})


def stage_table(stages: Sequence[Stage]) -> str:
    """The stages side by side; ratios and differences are to the first."""
    first = stages[0]
    context = f"{first.phone.context:,} tokens"
    lines = [
        ["", *(stage.name for stage in stages)],
        ["layers", *(f"{stage.shape.layers}" for stage in stages)],
        ["feed-forward width", *(f"{stage.shape.ffn:,}" for stage in stages)],
        ["query / key-value heads", *(f"{stage.shape.heads} / {stage.shape.kv_heads}" for stage in stages)],
        ["vocabulary", *(f"{stage.shape.vocab:,}" for stage in stages)],
        ["parameters", *(_changed(stage.parameters, first.parameters) for stage in stages)],
        ["weights on the disk", *(gigabytes(stage.file_bytes) for stage in stages)],
        [f"phone, fp16, {context}", *(gigabytes(stage.phone.total) for stage in stages)],
        ["MLC's OpenCL gate", *("passes" if stage.phone.passes_gate else "does not pass" for stage in stages)],
        ["decode ceiling, tokens/s", *(f"{stage.phone.decode_ceiling:,.1f}" for stage in stages)],
    ]
    for number, text in enumerate(first.losses):
        found = [stage.losses[number] for stage in stages]
        source = _short(text.source)
        ratios = [f" ({one.perplexity / text.perplexity:.3g}x)" for one in found[1:]]
        perplexities = [f"{one.perplexity:.4g}{more}" for one, more in zip(found, ["", *ratios], strict=True)]
        lines.append([f"perplexity, {source}", *perplexities])
        lines.append([f"bits/byte, {source}", *(f"{one.bits_per_byte:.4f}" for one in found)])
    for task in first.scores:
        lines.append([task, *(_score(stage.scores.get(task)) for stage in stages)])
    notes = [f"The decode ceiling assumes that the phone reads {PHONE_BANDWIDTH / 1e9:.0f} GB/s."]
    if len({stage.shape.vocab for stage in stages}) > 1:
        notes.append("Perplexities of different vocabularies cannot be compared; bits per byte can.")
    return "\n".join([*aligned(lines), *notes])


def plan_table(values: dict[str, Any], found: Sequence[Candidate], tried: Sequence[Candidate]) -> str:
    """Shapes that meet the target, the ones to be tried marked, and the model as it is above them."""
    now = Shape.of(values)
    head = ["", "layers", "feed-forward", "heads", "vocabulary", "parameters", "phone", "decode ceiling"]
    whole = Candidate(now, parameters(values, now), on_phone(values, now, found[0].phone.context))
    lines = [head, ["now", *_cells(whole, whole)]]
    lines += [[f"try {tried.index(one) + 1}" if one in tried else "", *_cells(one, whole)] for one in found]
    return "\n".join(aligned(lines))


def rank_table(tried: Sequence[Candidate], found: Sequence[float]) -> str:
    """What each tried shape costs in bits per byte, the best marked."""
    best = min(range(len(tried)), key=lambda number: found[number])
    lines = [["", "layers", "feed-forward", "heads", "vocabulary", "parameters", "bits/byte"]]
    for number, (one, bits) in enumerate(zip(tried, found, strict=True)):
        shape = one.shape
        cells = [f"{shape.layers}", f"{shape.ffn:,}", f"{shape.heads} / {shape.kv_heads}", f"{shape.vocab:,}"]
        lines.append(["kept" if number == best else "", *cells, f"{one.parameters:,}", f"{bits:.4f}"])
    return "\n".join(aligned(lines))


def _cells(one: Candidate, whole: Candidate) -> list[str]:
    shape = one.shape
    return [
        f"{shape.layers}",
        f"{shape.ffn:,}",
        f"{shape.heads} / {shape.kv_heads}",
        f"{shape.vocab:,}",
        _changed(one.parameters, whole.parameters),
        gigabytes(one.phone.total),
        f"{one.phone.decode_ceiling:,.1f} tok/s",
    ]


def _changed(count: int, before: int) -> str:
    return f"{count:,}" if count == before else f"{count:,} ({count / before - 1:+.1%})"


def _score(value: float | None) -> str:
    return "not run" if value is None else f"{value:.2f}"


def _short(source: str) -> str:
    """A source's name, of a path its end."""
    return source if len(source) <= 24 else f"…{source[-23:]}"
