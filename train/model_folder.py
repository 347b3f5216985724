"""The model folder at the end of a run, with the record of where it came from."""

import json
from pathlib import Path
from typing import Any

from common.files import new_folder, write_json
from common.run_folder import command, git_commit
from common.settings import to_dict
from data.sources import Corpus
from data.tokenizer import Tokenizer
from models.hf import write_model
from models.sizes import ModelConfig
from models.transformer import Transformer
from train.settings import TrainSettings


def write_model_folder(
    folder: Path,
    model: Transformer,
    config: ModelConfig,
    tokenizer: Tokenizer,
    settings: TrainSettings,
    corpus: Corpus,
    steps: int,
    tokens: int,
    bad_shards: list[str],
) -> None:
    """Write weights, configuration, tokenizer and ``palmtop.json``, replacing an older folder in one step.

    ``palmtop.json`` names every source that the weights have seen, the parents' included, so that it
    can be told later whether a model's data stayed within a competition's rules.
    """
    parent = _parent_record(settings.init)
    sources = [
        {"source": source.origin, "weight": weight}
        for source, weight in zip(corpus.sources, corpus.weights, strict=True)
    ]
    record = {
        "stage": "pretrain",
        "command": command(),
        "git": git_commit(),
        "tokens": tokens,
        "steps": steps,
        "data": [*parent.get("data", []), {"stage": "pretrain", "tokens": tokens, "sources": sources}],
        "damaged_shards_passed_over": bad_shards,
        "parent": settings.init,
        "settings": to_dict(settings),
    }
    with new_folder(folder) as temporary:
        write_model(model.state_dict(), config, temporary, bos=tokenizer.begin, eos=tokenizer.end, pad=tokenizer.pad)
        tokenizer.copy_to(temporary)
        write_json(temporary / "palmtop.json", record)


def _parent_record(init: str | None) -> dict[str, Any]:
    """The ``palmtop.json`` of the weights that the run began with; empty where there is none."""
    path = Path(init or "") / "palmtop.json"
    if init is None or not path.exists():
        return {} if init is None else {"data": [{"stage": "unknown", "from": init}]}
    return dict(json.loads(path.read_text(encoding="utf-8")))
