"""What ``python -m pruning`` shows before it begins, and all that ``--plan`` shows. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.console import Console
from common.errors import UserError
from common.settings import Count, to_dict
from models.folder import check_out, stage_of, weight_files
from models.hf_config import nearest_shape, read_values, taken_values
from pruning import qwen1
from pruning.plan import Candidate, cache_tokens, candidates, describe, shortlist
from pruning.report import plan_table
from pruning.settings import PruneCommand, out_folder, resolve
from pruning.shapes import Shape
from pruning.vocabulary import smallest_vocabulary
from scoring.settings import data_folder

LISTED = 12
"""Shapes of the plan that are shown; the others are counted."""


@dataclass(frozen=True)
class Outline:
    """What is about to be cut."""

    command: PruneCommand
    """Resolved."""
    folder: Path
    """The model."""
    out: Path
    """Where the new one goes."""
    tried: Sequence[Candidate]
    """The shapes to try, the likeliest first."""
    console: Console


def show_outline(command: PruneCommand) -> Outline:
    """Find the shapes that meet what is asked for, and show them.

    Raises:
        UserError: no such model, one that has to be imported first, ``out`` holds something else, or no shape meets
            the target.
    """
    assert command.model is not None
    folder, console = Path(command.model), Console()
    if qwen1.is_qwen1(read_values(folder)):
        raise UserError(
            f"{folder} is a first-generation Qwen, which runs code of its own; make it an equal Qwen2 first: "
            f"python -m pruning import {folder}"
        )
    values, out = taken_values(folder), out_folder(command.model, command.out, "pruned")
    if not command.plan:
        weight_files(folder)
        check_out(out, folder, own=stage_of(out) == "prune")
    data_folder(command.score_data, "--score-data")
    command = resolve(command, Shape.of(values).ffn, nearest_shape(values, folder).context)
    command = replace(command, context=Count(cache_tokens(values, command)))
    found = candidates(values, command, smallest_vocabulary(folder, command.chinese_tokens))
    tried = shortlist(values, found, command.rank)
    shown = to_dict(command) | {"out": str(out), "measure": ",".join(command.texts)}
    console.settings("pruning", shown if command.recover else {**shown, "recovery": None})
    _show_plan(console, values, command, found, tried)
    return Outline(command, folder, out, tried, console)


def _show_plan(
    console: Console,
    values: dict[str, Any],
    command: PruneCommand,
    found: Sequence[Candidate],
    tried: Sequence[Candidate],
) -> None:
    """The shapes that meet the target, the tried ones among them."""
    listed = [one for number, one in enumerate(found) if number < LISTED or one in tried]
    console.say(f"shapes for {describe(values, command)}, those to be tried numbered")
    console.say(plan_table(values, listed, tried))
    if len(found) > len(listed):
        console.say(f"and {len(found) - len(listed):,} more")
