"""What scoring found: intervals, means, ``score.json``, ``Results.csv`` and the table that is shown."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.files import gigabytes, write_json, write_text

COLUMNS = {
    "CommonsenseQA": "commonsense_qa",
    "BIG-Bench-Hard": "bbh",
    "GSM8K": "gsm8k",
    "LongBench": "longbench",
    "HumanEval": "humaneval",
    "CHID": "chid",
    "TruthfulQA": "truthfulqa",
}
"""The score columns of the starting kit's Results.csv, and our tasks; Throughput and Memory-Usage follow them."""

SIX = [task for task in COLUMNS.values() if task != "longbench"]
"""The tasks whose mean is the score."""

UNITS = {
    "scores": "0-100; TruthfulQA is bleu_acc x 100 here and bleu_acc (0-1) in Results.csv, as the starting kit has it",
    "Throughput": "forward passes a second, batch 1, 2,000 tokens or the whole context where that is shorter",
    "Memory-Usage": "GB (1e9 bytes) at the peak of those passes",
}

RESAMPLES = 2_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class TaskResult:
    """A task's score with what is needed to judge it."""

    name: str
    score: float | None
    """0-100; None where it was not run."""
    interval: tuple[float, float] | None
    """Bootstrap, 95%."""
    chance: float
    """The score of guessing in the right format."""
    items: int
    """Rows that count."""
    extras: dict[str, float] = field(default_factory=dict)
    """Further figures, or the scores of subtasks."""


@dataclass(frozen=True)
class Means:
    """The six tasks in one number."""

    geometric: float
    """Zero as soon as one task is."""
    shifted_geometric: float
    """exp(mean(log(score + 1))) - 1, which tells weak models apart."""
    arithmetic: float


@dataclass
class Score:
    """All that was found of a model."""

    model: str
    marks: list[str]
    """What keeps the scores from comparison with full ones, ``sample: …``, ``limit: …``; shown wherever they are."""
    asked: dict[str, Any]
    """The settings, engine and versions that they were made with."""
    competition: list[TaskResult] = field(default_factory=list)
    means: Means | None = None
    quick: list[TaskResult] = field(default_factory=list)
    c4: dict[str, Any] | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of lm-evaluation-harness's own tasks, as it gives them."""
    parameters: dict[str, int] | None = None
    speed: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Write ``score.json`` and ``Results.csv`` into a folder; the name of a marked or incomplete table says so."""
        write_json(folder / "score.json", asdict(self) | {"missing": self.missing, "units": UNITS})
        write_text(folder / self.csv_name, self.csv())
        for table in folder.glob("Results*.csv"):
            if table.name != self.csv_name:  # of before, such as when programs could not be run
                table.unlink()

    @property
    def csv_name(self) -> str:
        """``Results.csv``, which only full scores are called."""
        return "-".join(["Results", *self._short_marks, *["incomplete"] * bool(self.missing)]) + ".csv"

    @property
    def missing(self) -> list[str]:
        """The competition's tasks that have no score, where any was asked for."""
        return missing({result.name: result.score for result in self.competition})

    @property
    def _short_marks(self) -> list[str]:
        """The marks' first words."""
        return [mark.partition(":")[0] for mark in self.marks]

    def csv(self) -> str:
        """The starting kit's table: a heading and a line, empty where nothing was measured."""
        scores = {result.name: result.score for result in self.competition} | {"longbench": self._longbench()}
        truthful = scores.get("truthfulqa")
        scores["truthfulqa"] = None if truthful is None else truthful / 100
        values: list[float | None] = [scores.get(name) for name in COLUMNS.values()]
        values += [self.speed["throughput"], self.speed["peak_memory"] / 1e9] if self.speed else [None, None]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "Throughput", "Memory-Usage"])
        writer.writerow(["" if value is None else f"{value:.4g}" for value in values])
        return file.getvalue()

    def _longbench(self) -> float | None:
        """The score of lm-evaluation-harness's group, where it was asked for."""
        found = self.tasks.get("longbench", {}).get("score,none")
        return 100 * found if isinstance(found, float) else None

    def rows(self) -> dict[str, str]:
        """What is shown, in two columns."""
        mark = f"  ({', '.join(self._short_marks)})" if self.marks else ""
        rows = {result.name: _shown(result) + mark for result in self.competition}
        if self.means is not None:
            rows["geometric mean"] = f"{self.means.geometric:.2f}{mark}"
            rows["of score + 1, less 1"] = f"{self.means.shifted_geometric:.2f}{mark}"
            rows["arithmetic mean"] = f"{self.means.arithmetic:.2f}{mark}"
        elif self.competition:
            rows["geometric mean"] = f"none: it needs all six tasks, and there is no score of {', '.join(self.missing)}"
        rows |= {result.name: _shown(result) + mark for result in self.quick}
        for name, values in self.tasks.items():
            figures = {key: value for key, value in values.items() if isinstance(value, float) and "stderr" not in key}
            rows[name] = ", ".join(f"{key.removesuffix(',none')} {value:.4f}" for key, value in figures.items()) + mark
        if self.c4 is not None:
            rows["C4, packed"] = (
                f"perplexity {self.c4['packed_perplexity']:.2f}, {self.c4['bits_per_byte']:.4f} bits/byte"
            )
            rows["C4, GaLore's protocol"] = f"perplexity {self.c4['galore_perplexity']:.2f}"
        if self.parameters is not None:
            counts = self.parameters
            rows["parameters"] = f"{counts['non_duplicate']:,}, {counts['without_embeddings']:,} without embeddings"
        if self.speed is not None:
            rows |= _speed_rows(self.speed)
        return rows


def _shown(result: TaskResult) -> str:
    if result.score is None:
        return "not run"
    low, high = result.interval or (result.score, result.score)
    return f"{result.score:6.2f}   {low:.2f} to {high:.2f}, chance {result.chance:.1f}, {result.items:,} items"


def _speed_rows(speed: dict[str, Any]) -> dict[str, str]:
    def spread(value: dict[str, float]) -> str:
        return f"{value['median']:,.1f} tok/s ({value['lower']:,.1f} to {value['upper']:,.1f})"

    return {
        "throughput": f"{speed['throughput']:.3f} forward passes a second of {speed['forward_tokens']:,} tokens "
        f"({speed['device']}, {speed['dtype']})",
        "prefill": spread(speed["prefill"]),
        "decode": spread(speed["decode"]),
        "peak memory": f"{gigabytes(speed['peak_memory'])} ({speed['peak_memory_of']})",
    }


def interval(parts: Sequence[Sequence[float]], seed: int) -> tuple[float, float] | None:
    """The 95% bootstrap interval of the mean of several means; each part is resampled by itself.

    Args:
        parts: values of the items, of each subtask; a plain task is one part.
        seed: of the draws.

    Returns:
        The 2.5 and 97.5 percentiles; None where a part is empty.
    """
    if not parts or not all(parts):
        return None
    draw = np.random.default_rng(seed)
    means = np.zeros(RESAMPLES)
    for part in parts:
        values = np.asarray(part)
        chosen = draw.integers(len(values), size=(RESAMPLES, len(values)))
        means += values[chosen].mean(axis=1) / len(parts)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def missing(scores: Mapping[str, float | None]) -> list[str]:
    """Which of the six tasks lack in scores by task; none where there is no task at all."""
    return [task for task in SIX if scores.get(task) is None] if scores else []


def means(scores: Sequence[float]) -> Means:
    """Geometric, shifted geometric and arithmetic mean of scores of 0-100."""
    count = len(scores)
    geometric = math.exp(math.fsum(map(math.log, scores)) / count) if all(scores) else 0.0
    shifted = math.expm1(math.fsum(map(math.log1p, scores)) / count)
    return Means(geometric, shifted, math.fsum(scores) / count)
