"""The rotary embedding of a model folder, wherever its ``config.json`` has it.

transformers 5 writes ``rope_parameters`` alone, older versions and our own folders write it at the top level; MLC-LLM
reads the top level alone and takes other values without a word where it has none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

THETA = 10_000.0
"""What transformers takes where a folder names none."""

PHI_PARTIAL = 0.5
"""The share of a head that Phi turns where a folder names none."""


@dataclass(frozen=True)
class Rotary:
    """How positions are encoded."""

    theta: float
    partial: float
    """Share of each head that is turned; 1.0 but for Phi."""
    scaling: dict[str, Any] | None
    """How long contexts are stretched to: None, or as ``rope_scaling`` holds it, with ``rope_type``."""

    @classmethod
    def of(cls, values: dict[str, Any], folder: Path) -> "Rotary":
        """Of a ``config.json``.

        Raises:
            UserError: the top level and ``rope_parameters`` contradict each other.
        """
        nested = values.get("rope_parameters") or {}
        found: dict[str, Any] = {"rope_theta": THETA}
        found["partial_rotary_factor"] = PHI_PARTIAL if values.get("model_type") == "phi" else 1.0
        for name in found:
            both = [float(place[name]) for place in (values, nested) if place.get(name) is not None]
            if len(set(both)) > 1:
                raise _contradiction(folder, name, *both)
            found[name] = both[0] if both else found[name]
        stretched = _scaling(nested)
        if "rope_scaling" in values:
            top = _scaling(values["rope_scaling"] or {})
            if nested and top != stretched:
                raise _contradiction(folder, "rope_scaling", top, stretched)
            stretched = top
        return cls(found["rope_theta"], found["partial_rotary_factor"], stretched)

    @property
    def at_top(self) -> dict[str, Any]:
        """As MLC-LLM reads it from the top level of a ``config.json``."""
        return {
            "rope_theta": self.theta,
            "partial_rotary_factor": self.partial,
            "rope_scaling": self.scaling,
        }


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling alone; older folders call ``rope_type`` ``type``."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    own = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor", "type")}
    return own | {"rope_type": kind}


def _contradiction(folder: Path, name: str, top: Any, nested: Any) -> UserError:
    return UserError(
        f"{folder / 'config.json'} contradicts itself: {name} is {top} at the top level and {nested} in "
        "rope_parameters; put the wrong one right"
    )
