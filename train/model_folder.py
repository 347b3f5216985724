"""The model folder at the end of a run, with the record of where it came from."""

from pathlib import Path

from common.files import new_folder, write_json
from common.run_folder import command, git_commit
from data.tokenizer import Tokenizer
from models.foreign import Architecture
from models.hf import save_weights
from train import checkpoint, lora
from train.records import read_state


def write_model_folder(folder: Path, path: Path, tokenizer: Tokenizer) -> None:
    """Make a checkpoint a model folder: weights, configuration, tokenizer and ``palmtop.json``.

    An older folder is replaced in one step. However the checkpoint is sharded, one process reads it; it
    needs host memory for the fp32 weights. ``palmtop.json`` is the ``record`` in the checkpoint's state, with
    all data that the weights have seen, so that it can be told later whether a model stayed within a competition's
    rules, and how the run went.
    """
    state, architecture = read_state(path), Architecture.of(path)
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
