"""What ``python -m pruning`` does after its plan: try, cut, measure, recover, score, report."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from common import signals
from common.console import duration
from common.errors import UserError
from common.settings import Count
from data.tokenizer import Tokenizer
from pruning.calibration import Documents, read_test
from pruning.outline import Outline
from pruning.perplexity import Measured, measure
from pruning.plan import Candidate, summary
from pruning.prune import Report, prune
from pruning.recover import recover
from pruning.report import FILE, Stage, rank_table, stage_table, write_report
from pruning.shapes import Shape
from scoring.fingerprint import fingerprint
from scoring.score import score
from scoring.settings import ScoreSettings
from scoring.settings import out_folder as scores_folder
from train.stage import known


def prune_command(outline: Outline) -> None:
    """Cut a model folder as its outline says.

    Raises:
        UserError: anything that the user can put right; no folder is left half-written.
    """
    _Pruning(outline).run(outline.tried)


TRIED_ON = 4
"""Shapes are compared after a cut by so small a part of the calibration text: which is best shows early."""


class _Pruning:
    """One run of the command."""

    def __init__(self, outline: Outline) -> None:
        self.command, self.folder, self.out = outline.command, outline.folder, outline.out
        self.console = outline.console
        command = self.command
        self.device = _device(command.device)
        tokenizer = Tokenizer(self.folder)
        self.texts = [read_test(name, tokenizer, command.measure_tokens) for name in command.texts]
        self.trials: list[dict[str, Any]] = []

    def run(self, tried: Sequence[Candidate]) -> None:
        """Everything that was asked for."""
        command, console = self.command, self.console
        stages = [self._stage("before", self.folder, self._losses("the model as it is", self.folder, self.texts))]
        losses, report = self._cut(tried)
        stages.append(self._stage("after", self.out, losses))
        models = [self.folder, self.out]
        self._report(models, stages)
        if command.recover:
            console.say(stage_table(stages))
            signals.install()  # the training saves and stops by them
            models.append(recover(self.out, self.folder, command.recovery, console.say, device=command.device))
            signals.clear()
            stages.append(
                self._stage("recovered", models[-1], self._losses("the recovered model", models[-1], self.texts))
            )
            self._report(models, stages)
        if command.score is not None:
            console.say(stage_table(stages))  # scoring may fail, and this is not to be lost by it
            stages = [replace(stage, scores=self._scores(model)) for stage, model in zip(stages, models, strict=True)]
            self._report(models, stages)
        console.say(stage_table(stages))
        console.say(_cost(report))
        console.say(f"report: {models[-1] / FILE}\nmodel: {models[-1]}\nnext: python -m scoring {models[-1]}")

    def _report(self, models: Sequence[Path], stages: Sequence[Stage]) -> None:
        """Write the stages so far into every model that was made."""
        for model in models[1:]:
            write_report(model, stages, {"trials": self.trials})

    def _cut(self, tried: Sequence[Candidate]) -> tuple[list[Measured], Report]:
        """Write the model, of several shapes the best one.

        Returns:
            Its losses, and what was done to it.
        """
        shape = tried[0].shape if len(tried) == 1 else self._best(tried)
        report = self._prune(shape, self.out, self.command.tokens)
        return self._losses("the pruned model", self.out, self.texts), report

    def _best(self, tried: Sequence[Candidate]) -> Shape:
        """The shape with the fewest bits per byte of the first text, after a cut by a part of the calibration text."""
        tokens = max(known(self.command.seq_len), known(self.command.tokens) // TRIED_ON)
        trial, bits = self.out.with_name(f".{self.out.name}.trial.tmp"), []
        try:
            for number, one in enumerate(tried):
                self.console.say(f"trying shape {number + 1} of {len(tried)}: {summary(one.shape)}")
                self._prune(one.shape, trial, tokens)
                (found,) = self._losses(f"shape {number + 1}", trial, self.texts[:1])
                bits.append(found.bits_per_byte)
        finally:
            shutil.rmtree(trial, ignore_errors=True)
        self.console.say(rank_table(tried, bits))
        self.trials = [
            {
                "shape": asdict(one.shape),
                "parameters": one.parameters,
                "tokens": tokens,
                "text": self.texts[0].name,
                "bits_per_byte": found,
            }
            for one, found in zip(tried, bits, strict=True)
        ]
        return tried[bits.index(min(bits))].shape

    def _prune(self, shape: Shape, out: Path, tokens: int | None) -> Report:
        command = self.command
        return prune(
            self.folder,
            out,
            shape,
            replace(command, tokens=None if tokens is None else Count(tokens)),
            self.device,
            chinese_tokens=command.chinese_tokens,
            console=self.console,
        )

    def _losses(self, what: str, folder: Path, texts: Sequence[Documents]) -> list[Measured]:
        """The losses on some texts, with progress."""
        self.console.start(1, 0)
        try:
            return measure(
                folder,
                texts,
                self.device,
                progress=lambda done, total: self._progress(what, done, total),
            )
        finally:
            self.console.stop()

    def _progress(self, what: str, done: int, total: int) -> None:
        if done == total or done % max(1, total // 4) == 0:
            self.console.progress(done, total, {"measuring": what, "block": f"{done} of {total}"})

    def _stage(self, name: str, folder: Path, losses: Sequence[Measured]) -> Stage:
        return Stage.of(name, folder, known(self.command.context), losses)

    def _scores(self, folder: Path) -> dict[str, float | None]:
        """The scores of a model folder by task, their mean, and its throughput on this machine."""
        assert self.command.score is not None
        settings = ScoreSettings(
            suite=self.command.score,
            data=self.command.score_data,
            limit=self.command.score_limit,
            device=self.command.device,
        )
        found = score(folder, replace(settings, out=str(_by_weights(folder, settings))), self.console)
        scores = {one.name: one.score for one in [*found.competition, *found.quick]}
        if found.means is not None:
            scores["geometric mean"] = found.means.geometric
        marks = f" ({', '.join(mark.partition(':')[0] for mark in found.marks)})" if found.marks else ""
        speed = {} if found.speed is None else {"throughput, passes/s": found.speed["throughput"]}
        return {name + marks: value for name, value in scores.items()} | speed


def _by_weights(folder: Path, settings: ScoreSettings) -> Path:
    """Where a model's scores go: other weights under the same name get another folder, for answers are kept there."""
    usual = scores_folder(folder, settings)
    return usual.with_name(f"{usual.name}-{fingerprint(folder)[:8]}")


def _cost(report: Report) -> str:
    """What the cut was decided by, and its time, in a line."""
    took = f"cut in {duration(report.seconds)}"
    if report.calibration is None:
        return f"{took}, without calibration"
    found = report.calibration
    sources = ", ".join(f"{one['documents']:,} documents of {one['source']}" for one in found["sources"])
    outside = " (not C4 alone, so outside track 1's rules)" if found["outside_track_1"] else ""
    return f"calibrated on {found['tokens']:,} tokens, seed {found['seed']}: {sources}{outside}; {took}"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here that torch can use")
    return torch.device(name)
