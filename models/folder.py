"""What a model folder must have, looked at before torch is imported and before anything is written."""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from models.hf_config import read_values

WEIGHTS = "model.safetensors"
"""In a folder whose weights are in one file."""

INDEX = "model.safetensors.index.json"
"""In a folder whose weights are in several: which tensor is in which."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
"""Weights in files that can run code when they are read."""


def check_model(folder: Path) -> None:
    """Raise a UserError that says so where a folder is no model folder with weights that are safe to read."""
    read_values(folder)
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with a model's weights, by their index in its order; as transformers chooses them.

    Raises:
        UserError: there are none, one that the index names is missing, or the weights are pickles.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    files = list(dict.fromkeys(weight_index(folder).values())) or sorted(folder.glob("model*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} has no {missing[0]}, which its {INDEX} names; copy it there")
    if files:
        return files
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has its weights only as pickle ({pickles[0]}), which can run code when it is read, so it is "
            "refused. Convert it to safetensors first, where you trust it: load it with transformers and call "
            "save_pretrained(NEW_FOLDER)"
        )
    raise UserError(f"{folder} has no weights: {WEIGHTS} is missing")


def weight_index(folder: Path) -> dict[str, Path]:
    """The file of each tensor by the folder's index; empty where it has none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / Path(file).name for name, file in names.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error!r}") from error


def check_out(out: Path, folder: Path, *, own: bool) -> None:
    """Raise a UserError where writing ``out`` would destroy something that the command has not made.

    Args:
        out: the folder to write, in place of one that is there.
        folder: the model, which stays as it is.
        own: whether the command has made what is at ``out``.
    """
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(f"--out {out} is the model's own folder; choose another")
    if out.exists() and not own:
        raise UserError(f"{out} is there already and was not made by this command; choose another --out")


def stage_of(folder: Path) -> Any:
    """The stage that made a model folder; None where it does not tell."""
    try:
        return json.loads((folder / "palmtop.json").read_text(encoding="utf-8"))["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
