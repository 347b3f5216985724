"""A model folder in, a smaller one out.

The vocabulary goes first, because the text is then calibrated on in the tokens that are left; then the blocks, one
after the other, written as they come.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import Console, duration
from common.errors import UserError
from common.files import new_folder, require_space, write_json
from common.run_folder import command, git_commit
from common.settings import to_dict
from data.packing import Batch
from data.sources import is_c4
from data.tokenizer import Tokenizer
from models.hf_config import nearest_shape
from pruning import taylor, temperature
from pruning.blocks import Blocks, Rows, parts_of
from pruning.calibration import Calibration, read_calibration
from pruning.cut import cut_rows
from pruning.fisher import information
from pruning.frequency import expected_tokens, frequencies
from pruning.importance import Scores, by_chance, by_weights, least_influential
from pruning.report import FILE
from pruning.settings import CutSettings, resolve
from pruning.shapes import Shape, check, parameters, resized
from pruning.shards import ShardWriter
from pruning.sweep import Sweep, Weighed, influence
from pruning.vocabulary import cut_vocabulary, renumbered
from train.records import data_seen, own_data, stored_generation

APART = 8
"""At most one row in so many of the calibration text is left to the temperature."""

VOCABULARY_ENDS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
"""Weights outside the blocks that have a row for each token."""


@dataclass(frozen=True)
class Report:
    """What was cut, and what it took."""

    before: Shape
    after: Shape
    layers: tuple[int, ...]
    """Of the parent, that stayed."""
    influence: tuple[float, ...]
    """Of every layer of the parent; empty where no layer went."""
    error: float
    """Of the hidden states after the last block, see :attr:`pruning.sweep.Sweep.error`; 0 without repair."""
    sharpness: float
    """What the last norm was scaled by, see :func:`pruning.temperature.sharpness`; 1 without repair."""
    calibration: dict[str, Any] | None
    """Sources, tokens and seed; None where nothing was read."""
    seconds: float


@torch.no_grad()
def prune(
    folder: Path,
    out: Path,
    shape: Shape,
    settings: CutSettings,
    device: torch.device,
    *,
    chinese_tokens: int = 0,
    console: Console | None = None,
) -> Report:
    """Cut a model to a shape and write the smaller model folder, with ``palmtop.json`` and ``pruning.json``.

    Args:
        folder: the model folder; it stays as it is.
        out: folder to write, whole or not at all; one that is there is replaced.
        shape: a legal one, see :func:`pruning.shapes.check`.
        settings: how units are chosen and repaired, and on which text.
        device: where blocks are run.
        chinese_tokens: tokens with Chinese characters that a smaller vocabulary keeps at least.
        console: where progress is shown; None shows none.

    Raises:
        UserError: the folder, the shape or the text is not fit for it, or the weights do not fit fp16.
    """
    console = console or Console(rank=1)
    blocks = Blocks(folder, device)
    settings = resolve(settings, Shape.of(blocks.values).ffn, nearest_shape(blocks.values, folder).context)
    check(blocks.values, shape)
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the model that is cut; choose another folder with --out")
    require_space(out, parameters(blocks.values, shape) * blocks.stored.itemsize, "the pruned model")
    with new_folder(out) as temporary:
        return _Pruning(blocks, shape, settings, console).write(temporary, chinese_tokens)


class _Pruning:
    def __init__(self, blocks: Blocks, shape: Shape, settings: CutSettings, console: Console) -> None:
        self.blocks, self.shape, self.settings, self.console = blocks, shape, settings, console
        self.now = Shape.of(blocks.values)

    def write(self, out: Path, chinese_tokens: int) -> Report:
        """Fill the folder."""
        start = time.perf_counter()
        calibration = self._calibration() if self._narrows_vocabulary or self._reads_hidden_states else None
        kept = self._vocabulary(out, calibration, chinese_tokens)
        rows = None
        if calibration is not None and self._reads_hidden_states:
            rows = _rows(calibration.batch(Tokenizer(out)), kept)
        turned = self._influence(rows)
        dropped = least_influential(turned, self.now.layers - self.shape.layers) if turned else []
        stay = [layer for layer in range(self.now.layers) if layer not in dropped]
        writer, norms = ShardWriter(out), self.blocks.last_norm()
        for name in self.blocks.ends():
            if name not in norms:
                writer.add(name, self._end(name, kept))
        sweep = self._blocks(writer, rows, stay)
        sharpness = sweep.sharpness(kept)
        for name, tensor in norms.items():
            writer.add(name, (tensor.float() * sharpness).to(tensor.dtype))
        writer.close()
        found = None if calibration is None else calibration.record()
        seconds = time.perf_counter() - start
        report = Report(self.now, self.shape, tuple(stay), tuple(turned), sweep.error, sharpness, found, seconds)
        write_configuration(self.blocks, self.shape, kept, out)
        write_records(self.blocks.folder, self.settings, report, out)
        scaled = "" if sharpness == 1 else f", last norm scaled by {sharpness:.3f}"
        self.console.say(f"cut in {duration(seconds)}{scaled}")
        return report

    def _end(self, name: str, kept: list[int] | None) -> Tensor:
        """A weight outside the blocks, of the tokens that stay."""
        tensor = self.blocks.end(name)
        return tensor if kept is None or name not in VOCABULARY_ENDS else cut_rows(tensor, kept)

    def _vocabulary(self, out: Path, calibration: Calibration | None, chinese_tokens: int) -> list[int] | None:
        """Write the tokenizer; returns the old id of every token where some went."""
        whole = Tokenizer(self.blocks.folder)
        if not self._narrows_vocabulary:
            whole.copy_to(out)
            return None
        assert calibration is not None
        with self._progress("layers asked for the vocabulary", self.now.layers) as progress:
            expected = expected_tokens(self.blocks, Rows.of(calibration.batch(whole)), progress)
        self.console.say("counting tokens for the smaller vocabulary")
        embedding = self.blocks.end("model.embed_tokens.weight")
        return cut_vocabulary(
            self.blocks.folder,
            out,
            self.shape.vocab,
            self.settings.calibration,
            frequencies=lambda counts: frequencies(counts, expected, embedding),
            chinese=chinese_tokens,
        )

    @property
    def _narrows_vocabulary(self) -> bool:
        return self.shape.vocab < self.now.vocab

    @property
    def _narrower(self) -> bool:
        """Whether units go, and not layers and tokens alone."""
        axes = ("ffn", "heads", "kv_heads")
        return any(getattr(self.shape, axis) != getattr(self.now, axis) for axis in axes)

    @property
    def _reads_hidden_states(self) -> bool:
        """Whether layers or units are chosen, or repaired, by what text makes of them."""
        by_text = self.settings.repair or self.settings.method in ("fisher", "energy", "taylor")
        return self.shape.layers < self.now.layers or (self._narrower and by_text)

    def _calibration(self) -> Calibration:
        s = self.settings
        assert s.tokens is not None
        assert s.seq_len is not None
        self.console.say(f"reading {s.tokens:,} calibration tokens from {s.calibration}")
        rows = s.tokens // s.seq_len
        return read_calibration(s.calibration, Tokenizer(self.blocks.folder), rows, s.seq_len, s.seed)

    def _influence(self, rows: Rows | None) -> list[float]:
        """Of every layer, where some are to go."""
        if self.shape.layers == self.now.layers:
            return []
        assert rows is not None
        with self._progress("layers measured", self.now.layers) as progress:
            return influence(self.blocks, rows, progress)

    def _weighed(self, rows: Rows | None) -> Weighed | None:
        """How units are scored by weights alone; None for energy, weighed or not."""
        method, parts = self.settings.method, parts_of(self.blocks.values)
        if method == "random":
            generator = torch.Generator().manual_seed(self.settings.seed)
            return lambda layer, tensors: by_chance(self.now, generator)
        if method == "l1":
            return lambda layer, tensors: by_weights(tensors, parts, self.now, lambda name, tensor: tensor.abs())
        if method in ("fisher", "energy") or not self._narrower:
            return None
        assert rows is not None
        with self._progress("rows gone back through", rows.count) as progress:
            slopes = taylor.gradients(self.blocks.folder, rows, self.blocks.device, progress)

        def weighed(layer: int, tensors: dict[str, Tensor]) -> Scores:
            def score(name: str, tensor: Tensor) -> Tensor:
                return (tensor * slopes[f"{taylor.PREFIX}{layer}.{name}"]).abs()

            return by_weights(tensors, parts, self.now, score)

        return weighed

    def _felt(self, rows: Rows | None) -> list[Tensor] | None:
        """What the energy of each block's units is weighed by; None for other methods."""
        if self.settings.method != "fisher" or not self._narrower:
            return None
        assert rows is not None
        with self._progress("layers felt", 2 * self.now.layers) as progress:
            return information(self.blocks, rows, self.settings.seed, progress)

    def _blocks(self, writer: ShardWriter, rows: Rows | None, stay: list[int]) -> Sweep:
        """Cut and write every block."""
        weighed, felt = self._weighed(rows), self._felt(rows)
        repair = self.settings.repair and rows is not None
        sweep = Sweep(self.blocks, rows, self.shape, weighed=weighed, felt=felt, repair=repair)
        with self._progress("layers cut", self.now.layers) as progress:
            for layer in range(self.now.layers):
                if layer in stay:
                    for name, tensor in sweep.cut(layer).items():
                        writer.add(f"model.layers.{stay.index(layer)}.{name}", tensor)
                else:
                    sweep.drop(layer)
                progress(layer + 1)
        return sweep

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows how many of something are done."""
        self.console.start(total, 0)
        try:
            yield lambda done: self.console.progress(done, total, {what: f"{done}/{total}"})
        finally:
            self.console.stop()


def _rows(batch: Batch, kept: list[int] | None) -> Rows:
    """The calibration text, some of it apart for the temperature, which weights fitted to a text hide from it."""
    rows, length = batch.inputs.shape
    return Rows.of(batch, kept, apart=min(max(1, temperature.TOKENS // length), rows // APART))


def write_configuration(blocks: Blocks, shape: Shape, kept: list[int] | None, out: Path) -> None:
    """Write ``config.json`` and ``generation_config.json`` of the smaller model."""
    values, generation = resized(blocks.values, shape), stored_generation(blocks.folder)
    if kept is not None:
        values, generation = renumbered(values, kept), renumbered(generation, kept)
    write_json(out / "config.json", values)
    if generation:
        write_json(out / "generation_config.json", generation)


def write_records(parent: Path, settings: CutSettings, report: Report, out: Path) -> None:
    """Write ``palmtop.json``, where the model came from, and ``pruning.json``, what was cut.

    Text was read where there is a calibration, and for a smaller vocabulary; a parent that saw other text than track 1
    of the competition allows when it was pruned itself hands that on.
    """
    mix = settings.calibration
    sources, weights = [name for name, _ in mix.parts], [weight for _, weight in mix.parts]
    read = report.calibration is not None or report.after.vocab < report.before.vocab
    outside = read and not all(map(is_c4, sources))
    record = {
        "stage": "prune",
        "parent": str(parent),
        "data": [*data_seen(parent), *([own_data("prune", sources, weights)] if read else [])],
        "outside_track_1": outside or outside_already(parent),
        "command": command(),
        "git": git_commit(),
        "settings": to_dict(settings),
    }
    write_json(out / "palmtop.json", record)
    write_json(
        out / FILE, {"parent": str(parent), "method": settings.method, "repair": settings.repair} | asdict(report)
    )


def outside_already(folder: Path) -> bool:
    """Whether a model folder says of itself that it was pruned by other text than track 1 allows."""
    path = folder / "palmtop.json"
    try:
        return path.exists() and bool(json.loads(path.read_text(encoding="utf-8")).get("outside_track_1", False))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; put it right, or remove it") from error
