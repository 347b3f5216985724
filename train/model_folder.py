"""The model folder at the end of a run, with the record of where it came from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import new_folder, write_json
from common.run_folder import command, git_commit
from data.tokenizer import Tokenizer
from models.foreign import Architecture
from models.hf import save_weights
from train import checkpoint, lora


def own_data(stage: str, origins: Sequence[str], weights: Sequence[float]) -> dict[str, Any]:
    """What a run trains on, for the record: where its sources are from, and their shares."""
    shares = [{"source": origin, "weight": share} for origin, share in zip(origins, weights, strict=True)]
    return {"stage": stage, "sources": shares}


def data_seen(path: Path) -> list[dict[str, Any]]:
    """Every source that the weights in a model folder or checkpoint have seen, as far as they tell."""
    record: dict[str, Any] = {}
    if (path / "state.json").exists():
        record = checkpoint.read_state(path)["record"]
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
        return dict(checkpoint.read_state(path)["generation"])
    file = path / "generation_config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; put it right, or remove it") from error


def generation_config(begin: int | None, stop: Sequence[int], pad: int | None) -> dict[str, Any]:
    """The ``generation_config.json`` of a model that has written all when it writes one of ``stop``."""
    ids = {"bos_token_id": begin, "eos_token_id": stop[0] if len(stop) == 1 else list(stop), "pad_token_id": pad}
    return {name: value for name, value in ids.items() if value is not None}


def write_model_folder(folder: Path, path: Path, tokenizer: Tokenizer) -> None:
    """Make a checkpoint a model folder: weights, configuration, tokenizer and ``palmtop.json``.

    An older folder is replaced in one step. However the checkpoint is sharded, one process reads it; it
    needs host memory for the fp32 weights. ``palmtop.json`` is the ``record`` in the checkpoint's state, with
    all data that the weights have seen, so that it can be told later whether a model stayed within a competition's
    rules, and how the run went.
    """
    state, architecture = checkpoint.read_state(path), Architecture.of(path)
    record = {
        **state["record"],
        "command": command(),
        "git": git_commit(),
        "tokens": state["tokens"],
        "steps": state["step"],
        "damaged_shards_passed_over": state["loader"].get("bad_shards", []),
        "settings": state["settings"],
    }
    weights = checkpoint.read_weights(path)
    if state.get("lora") is not None:
        lora.check_base(Path(state["lora"]["base"]), state["lora"]["digest"])
        weights = lora.merge(weights, Path(state["lora"]["base"]), state["lora"]["scale"])
    named = {name: tensor.to(architecture.dtype) for name, tensor in architecture.hugging_face(weights).items()}
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", architecture.values)
        write_json(temporary / "generation_config.json", state["generation"])
        save_weights(named, temporary)
        tokenizer.copy_to(temporary)
        write_json(temporary / "palmtop.json", record)
