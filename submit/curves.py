"""The curves of a training run: what its ``metrics.jsonl`` says over tokens and time."""

from collections.abc import Sequence
from typing import Any

from common.console import duration
from common.files import gigabytes
from submit import page
from submit.plots import BUCKETS, Mark, Series, compact, line_plot
from submit.run import Run

UNITS = {"hours": 3600, "minutes": 60}
"""Of time axes, in seconds."""


def curves(run: Run) -> str:
    """Every curve of a run, side by side; empty before its first step."""
    steps, marks = run.steps(), moments(run)
    if not steps:
        return ""
    tokens = [float(step["tokens"]) for step in steps]
    restarts = [mark for mark in marks if mark.kind == "restart"]
    drawn = [_losses(run, steps, tokens, marks)]
    drawn += _validations(run, restarts)
    rates = Series("learning rate", _column(steps, tokens, "lr"), 1)
    drawn.append(page.figure("Learning rate", line_plot("learning rate over tokens", [rates], restarts, zero=True)))
    norms = Series("gradient norm", _column(steps, tokens, "grad_norm"), 3)
    plot = line_plot("gradient norm over tokens", [norms], marks, log=True)
    drawn.append(page.figure("Gradient norm", plot, "before clipping" + _banded(steps)))
    times, unit = _over_time(steps)
    for title, name, show in (("Tokens a second", "tokens_per_s", compact), ("MFU", "mfu", _percent)):
        series = Series(title, _column(steps, times, name), 2)
        plot = line_plot(f"{title} over time", [series], x_label=unit, show=show, zero=True)
        drawn.append(page.figure(title, plot, "all devices together" if name == "tokens_per_s" else ""))
    drawn.append(_memory(run))
    return page.plots(drawn)


def moments(run: Run) -> list[Mark]:
    """Restarts and skipped steps, by tokens."""
    again = [line for line in run.starts() if line["step"] > 0]
    found = [Mark(float(line["tokens"]), f"went on after step {line['step']:,}") for line in again]
    skipped = [step for step in run.steps() if step.get("skipped")]
    return found + [Mark(float(step["tokens"]), f"step {step['step']:,} skipped", "skipped") for step in skipped]


def story(run: Run) -> str:
    """How a run went, in a sentence or two."""
    steps = run.steps()
    if not steps:
        return "No step has been taken yet."
    last, planned = steps[-1], run.settings.get("tokens")
    times, unit = _over_time(steps)
    text = f"{last['tokens']:,} tokens in {_count(last['step'], 'step')}"
    if planned and last["tokens"] < planned:
        text += f" of {planned:,} tokens ({last['tokens'] / planned:.0%})"
    text += f", {duration(times[-1] * UNITS[unit])} of training"
    skipped = sum(bool(step.get("skipped")) for step in steps)
    restarts = sum(line["step"] > 0 for line in run.starts())
    return f"{text}; {_count(skipped, 'step')} skipped, {_count(restarts, 'restart')}."


def _count(number: int, what: str) -> str:
    return f"{f'{number:,}' if number else 'no'} {what}{'' if number == 1 else 's'}"


def _losses(run: Run, steps: Sequence[dict[str, Any]], tokens: Sequence[float], marks: Sequence[Mark]) -> str:
    series = [Series("training", _column(steps, tokens, "loss"), 1)]
    validation = _evaluated(run, "val/loss")
    keys = {"training": 1}
    if validation:
        series.append(Series("validation", validation, 2, dots=True))
        keys["validation"] = 2
    plot = line_plot("loss over tokens", series, marks, falls=True)
    shown = [name for kind, name in (("skipped", "▾ skipped step"), ("restart", "┆ restart")) if _any(marks, kind)]
    caption = ", ".join(["nats a token" + _banded(steps), *shown])
    return page.figure("Loss", plot, caption, keys)


def _any(marks: Sequence[Mark], kind: str) -> bool:
    return any(mark.kind == kind for mark in marks)


def _validations(run: Run, marks: Sequence[Mark]) -> list[str]:
    """Bits per byte, losses by source or language, and what else is measured at evaluations."""
    groups: dict[str, list[str]] = {}
    for line in run.evaluations():
        for name in line:
            if name.startswith(("val/", "score/")) and name != "val/loss":
                group = "/".join(name.split("/")[:2]) if name.startswith("val/") else "score"
                if name not in groups.setdefault(group, []):
                    groups[group].append(name)
    titles = {
        "val/bpb": ("Bits per byte", "held-out text; no tokenizer changes it"),
        "val/perplexity": ("Perplexity", "held-out text, a document a row; only of this tokenizer"),
        "val/loss": ("Validation loss by part", "nats a token"),
        "val/kl": ("Divergence from the teacher", "nats a token"),
        "val/stopped": ("Answers that end", "share of the fixed questions"),
        "score": ("Scores while training", "likelihood tasks, 0 to 100"),
    }
    found = []
    for group, names in groups.items():
        title, caption = titles.get(group, (group, ""))
        shown = names[:6]
        series = [Series(name, _evaluated(run, name), slot, dots=True) for slot, name in enumerate(shown, 1)]
        keys = {_short(name): slot for slot, name in enumerate(shown, 1)} if len(shown) > 1 else None
        plot = line_plot(f"{title} over tokens", series, marks, falls=group != "score")
        found.append(page.figure(title, plot, caption, keys))
    return found


def _short(name: str) -> str:
    """A figure's name without its group."""
    return name.split("/", 2)[-1] if name.count("/") > 1 else {"val/bpb": "mean", "val/loss": "mean"}.get(name, name)


def _memory(run: Run) -> str:
    """Peak memory of the fullest rank."""
    ranks = [line for line in run.metrics if line.get("event") == "ranks"]
    series = Series("peak memory", [(float(line["step"]), float(line["peak_memory_bytes"])) for line in ranks], 4)
    plot = line_plot("peak memory over steps", [series], x_label="steps", zero=True, show=gigabytes)
    return page.figure("Peak memory", plot, "of the fullest device; on a CPU the process's own")


def _evaluated(run: Run, name: str) -> list[tuple[float, float | None]]:
    lines = [line for line in run.evaluations() if name in line]
    return [(float(line["tokens"]), line[name]) for line in lines]


def _column(steps: Sequence[dict[str, Any]], xs: Sequence[float], name: str) -> list[tuple[float, float | None]]:
    return [(x, step.get(name)) for x, step in zip(xs, steps, strict=True)]


def _over_time(steps: Sequence[dict[str, Any]]) -> tuple[list[float], str]:
    """Time in training after each step, evaluations and checkpoints left out, and its unit."""
    seconds, total, before = [], 0.0, 0
    for step in steps:
        if step.get("tokens_per_s"):
            total += (step["tokens"] - before) / step["tokens_per_s"]
        before = step["tokens"]
        seconds.append(total)
    unit = "hours" if total > 7200 else "minutes"
    return [value / UNITS[unit] for value in seconds], unit


def _banded(steps: Sequence[Any]) -> str:
    size = -(-len(steps) // BUCKETS)
    return f"; mean of {size} steps, in a band from the lowest to the highest" if size > 1 else ""


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"
