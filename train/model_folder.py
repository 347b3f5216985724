"""The model folder at the end of a run, with the record of where it came from."""

import json
from pathlib import Path
from typing import Any

from common.files import new_folder, write_json
from common.run_folder import command, git_commit
from data.sources import Corpus
from data.tokenizer import Tokenizer
from models.hf import write_model
from models.hf_config import read_config
from train import checkpoint
from train.settings import TrainSettings


def data_seen(settings: TrainSettings, corpus: Corpus, state: dict[str, Any]) -> list[dict[str, Any]]:
    """Every source that the weights see: those of the weights before, then those of this run.

    Args:
        settings: of the run.
        corpus: its sources.
        state: of the checkpoint that the run goes on from; empty for a new run.
    """
    shares = zip(corpus.sources, corpus.weights, strict=True)
    own = {"stage": "pretrain", "sources": [{"source": source.origin, "weight": share} for source, share in shares]}
    return [*(state["data"][:-1] if state else _seen_before(settings.init)), own]


def _seen_before(init: str | None) -> list[dict[str, Any]]:
    """What the weights of ``--init`` had seen, as far as they tell."""
    for name in ("palmtop.json", "state.json"):
        record = Path(init or "") / name
        if init is not None and record.exists():
            return list(json.loads(record.read_text(encoding="utf-8"))["data"])
    return [] if init is None else [{"stage": "unknown", "from": init}]


def write_model_folder(folder: Path, path: Path, tokenizer: Tokenizer) -> None:
    """Make a checkpoint a model folder: weights, configuration, tokenizer and ``palmtop.json``.

    An older folder is replaced in one step. However the checkpoint is sharded, one process reads it; it
    needs host memory for the fp32 weights. ``palmtop.json`` names all of the data (see :func:`data_seen`),
    so that it can be told later whether a model stayed within a competition's rules.
    """
    state, config = checkpoint.read_state(path), read_config(path)
    record = {
        "stage": "pretrain",
        "command": command(),
        "git": git_commit(),
        "tokens": state["tokens"],
        "steps": state["step"],
        "data": state["data"],
        "damaged_shards_passed_over": state["loader"]["bad_shards"],
        "parent": state["settings"]["init"],
        "settings": state["settings"],
    }
    weights = checkpoint.read_weights(path)
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    with new_folder(folder) as temporary:
        write_model(weights, config, temporary, bos=tokenizer.begin, eos=tokenizer.end, pad=tokenizer.pad)
        tokenizer.copy_to(temporary)
        write_json(temporary / "palmtop.json", record)
