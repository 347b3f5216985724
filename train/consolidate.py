"""``python -m train consolidate``: a model folder from a checkpoint, however it is sharded."""

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.settings import parse

DESCRIPTION = """\
Make a model folder, which transformers loads, of a checkpoint, on one process and without a GPU.

examples:
  python train.py consolidate runs/my-run                                   its newest good checkpoint
  python train.py consolidate runs/my-run/checkpoints/step-0001000 --out model-1000
"""


@dataclass
class ConsolidateSettings:
    """What to make a model folder of, and where."""

    source: str
    """A run's folder, or one of its checkpoints."""
    out: str | None = None
    """Folder to write to. Default: the run's model folder."""


def consolidate_command(argv: list[str]) -> None:
    """Parse and consolidate."""
    prog = "python train.py consolidate"
    settings = parse(ConsolidateSettings, argv, prog=prog, description=DESCRIPTION, positional="source")
    made = consolidate(Path(settings.source), None if settings.out is None else Path(settings.out))
    print(f"model: {made}")


def consolidate(source: Path, out: Path | None = None) -> Path:
    """Write the model folder of a run's newest good checkpoint, or of a checkpoint; returns it.

    Raises:
        UserError: ``source`` is neither, or what is there is damaged.
    """
    from common.run_folder import RunFolder
    from data.tokenizer import Tokenizer
    from train import checkpoint
    from train.model_folder import write_model_folder

    if (source / "state.json").exists():
        path, run = source, RunFolder(source.absolute().parent.parent)
        damage = checkpoint.damaged(path)
        if damage is not None:
            raise UserError(f"the checkpoint {path} is damaged: {damage}")
    else:
        run = RunFolder(source)
        newest = checkpoint.newest_good(run.checkpoints, lambda text: print(f"warning: {text}"))
        if newest is None:
            raise UserError(f"{source} is neither a checkpoint nor a run with a good one in checkpoints/")
        path = newest
    if not (run.tokenizer / "tokenizer.json").exists():
        raise UserError(f"the tokenizer of {path} is not in {run.tokenizer}, beside the checkpoints, where it belongs")
    folder = out or run.model
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "palmtop.json").exists():
        raise UserError(f"{folder} is there already and holds no palmtop.json; choose another --out")
    write_model_folder(folder, path, Tokenizer(run.tokenizer))
    return folder
