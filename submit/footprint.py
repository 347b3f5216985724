"""What a model folder takes on a phone, by the plan of :mod:`pruning.phone`."""

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from models.hf_config import read_values
from pruning.phone import WORKSPACE, Phone, on_phone
from pruning.shapes import Shape, parameters

CONTEXT = 2048
"""Tokens in the cache, where the model's context is not shorter: what small models get on Android."""


@dataclass(frozen=True)
class Footprint:
    """A model's size, here and there."""

    parameters: int
    file_bytes: int
    """Of the weights on the disk; 0 where they are not there."""
    phone: Phone
    workspace: int = WORKSPACE
    """Bytes of the phone's buffers, an estimate."""


def footprint(folder: Path) -> Footprint | None:
    """The figures of a model folder; None where there is none, or none of an architecture that is known."""
    if not (folder / "config.json").exists():
        return None
    try:
        values = read_values(folder)
        shape = Shape.of(values)
        context = min(CONTEXT, values.get("max_position_embeddings") or CONTEXT)
        phone = on_phone(values, shape, context)
    except (UserError, KeyError):
        return None
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    return Footprint(parameters(values, shape), size, phone)
