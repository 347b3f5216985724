"""What checkpoints and model folders tell of themselves in JSON. Imports nothing heavy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint; UserError when ``path`` is none."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint: its state.json cannot be read ({error})") from error


def own_data(stage: str, origins: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """What a run trains on, for the record: where its sources are from, and their shares."""
    shares = [{"source": origin, "weight": share} for origin, share in zip(origins, weights, strict=True)]
    return {"stage": stage, "sources": shares}


def data_seen(path: Path) -> list[dict[str, Any]]:
    """Every source that the weights in a model folder or checkpoint have seen, as far as they tell."""
    record: dict[str, Any] = {}
    if (path / "state.json").exists():
        record = read_state(path)["record"]
    elif (path / "palmtop.json").exists():
        try:
            record = json.loads((path / "palmtop.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path / 'palmtop.json'} cannot be read: {error}; without it the model counts as one of unknown data"
            ) from error
    return list(record.get("data") or [{"stage": "unknown", "from": str(path)}])


def seen_before(parents: Sequence[Path]) -> list[dict[str, Any]]:
    """What the weights of all parents have seen, the model's and its teacher's, each entry once."""
    entries = [entry for parent in parents for entry in data_seen(parent)]
    return [entry for number, entry in enumerate(entries) if entry not in entries[:number]]


def stored_generation(path: Path) -> dict[str, Any]:
    """The ``generation_config.json`` of a model folder or of a checkpoint; empty where there is none."""
    if (path / "state.json").exists():
        return dict(read_state(path)["generation"])
    file = path / "generation_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; put it right, or remove it") from error


def generation_config(begin: int | None, stop: Sequence[int], pad: int | None) -> dict[str, Any]:
    """The ``generation_config.json`` of a model that has written all when it writes one of ``stop``."""
    ids = {"bos_token_id": begin, "eos_token_id": stop[0] if len(stop) == 1 else list(stop), "pad_token_id": pad}
    return {name: value for name, value in ids.items() if value is not None}
