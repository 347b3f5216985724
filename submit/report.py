"""``python -m submit report RUN``: everything about a run and the models before it, on one page."""

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from common.console import Console
from common.files import gigabytes, write_text
from common.settings import to_dict
from models.budget import OPENCL_GATE, PHONE_MEMORY
from scoring.settings import ScoreSettings
from submit import page
from submit.curves import curves, story
from submit.footprint import Footprint, footprint
from submit.plots import Bar, Span, bar_plot, compact, span_plot
from submit.published import PUBLISHED, scores_of
from submit.ranking import SIX, TASKS
from submit.rules import judge
from submit.run import STAGES, Made, Run, ScoreFile, data_of, lineage
from submit.settings import ReportCommand
from submit.speeds import speeds

FILE = "report.html"
"""In the run folder."""


def report_command(command: ReportCommand) -> None:
    """Write the page of a run, or serve it.

    Raises:
        UserError: there is no run, one of its files cannot be read, or the port is taken.
    """
    assert command.run is not None
    console, run = Console(), Run(Path(command.run))
    console.settings("report", to_dict(command))
    if command.serve:
        from submit.serve import serve

        serve(run.path, command.host, command.port, console)
        return
    out = Path(command.out) if command.out else run.path / FILE
    write_text(out, report(run))
    console.say(f"report: {out}\nnext: python -m submit leaderboard {command.run}")


def report(run: Run, **served: str) -> str:
    """The page of a run as it is now; ``served`` are arguments of :func:`submit.page.page`."""
    line = lineage(run)
    parts = {
        "training": ("Training", _training(line)),
        "samples": ("What it writes", _samples(line)),
        "scores": ("Scores", _scores(line)),
        "pruning": ("Before and after pruning", _pruning(line)),
        "speed": ("Speed", _speed(run)),
        "memory": ("Memory on a phone", _memory(line)),
        "data": ("Data", _data(line)),
        "commands": ("Commands", _commands(line)),
        "settings": ("Settings and environment", _settings(line)),
    }
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, (title, body) in parts.items() if body)
    head = f"<h1>{escape(run.name)}</h1>{_path(line)}<nav>{links}</nav>{page.tiles(_tiles(run, line))}"
    sections = "".join(page.section(name, title, body) for name, (title, body) in parts.items())
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    foot = f"<p><small>Written by palmtop, {written}, from {escape(str(run.path))}</small></p>"
    return page.page(f"{run.name} · palmtop", head + sections + foot, **served)


def _path(line: Sequence[Made]) -> str:
    """The stages, the first one first."""
    words = [f"{STAGES.get(one.kind, 'From elsewhere')} <b>{escape(one.name)}</b>" for one in line]
    return f'<p class="soft">{" → ".join(words)}</p>'


def _tiles(run: Run, line: Sequence[Made]) -> dict[str, tuple[str, str]]:
    """The figures that are asked for first."""
    tiles: dict[str, tuple[str, str]] = {}
    size = footprint(line[-1].folder)
    if size is not None:
        tiles["parameters"] = (compact(size.parameters), f"{size.parameters:,}")
    steps = run.steps()
    if steps:
        tiles["loss"] = (f"{steps[-1]['loss']:.3f}" if steps[-1]["loss"] is not None else "none", "last step, training")
    titles = {"val/loss": "validation loss", "val/bpb": "bits per byte", "val/perplexity": "perplexity"}
    for name, title in titles.items():
        values = [(one[name], one["step"]) for one in run.evaluations() if one.get(name) is not None]
        if values:
            tiles[title] = (f"{values[-1][0]:.3f}", f"after step {values[-1][1]:,}")
    if run.score is not None:
        means = run.score.found.get("means")
        marked = ", ".join(_short(run.score.caveats)) or "the six tasks"
        tiles["geometric mean"] = (f"{means['geometric']:.2f}" if means else "none", marked)
    found = speeds(run)
    if found:
        tiles["decode, tok/s"] = (f"{found[0].decode['median']:,.1f}", f"{found[0].where}, {found[0].engine}")
    if size is not None:
        tiles["on a phone"] = (gigabytes(size.phone.total), f"of {gigabytes(PHONE_MEMORY)}, by the plan")
    return tiles


def _training(line: Sequence[Made]) -> str:
    """The curves of every run on the way, the last one open."""
    runs = [one for one in line if one.run is not None]
    found = []
    for number, one in enumerate(runs, 1):
        assert one.run is not None
        body = f"<p>{escape(story(one.run))}</p>{curves(one.run)}"
        title = f"{STAGES.get(one.kind, one.kind)}: {one.name}"
        opened = " open" if number == len(runs) or len(runs) <= 3 else ""
        found.append(f"<details{opened}><summary><b>{escape(title)}</b></summary>{body}</details>")
    return "".join(found)


def _samples(line: Sequence[Made]) -> str:
    """Texts over time: at most six moments of each run, from the first to the last."""
    found = []
    for one in line:
        if one.run is None or not one.run.samples:
            continue
        by_step = {
            step: {str(sample["prompt"]): sample for sample in samples}
            for step, samples in groupby(one.run.samples, key=lambda sample: int(sample["step"]))
        }
        steps = _spread(sorted(by_step), 6)
        prompts = list(by_step[steps[-1]])
        rows = [[escape(prompt), *(_said(by_step[step].get(prompt)) for step in steps)] for prompt in prompts]
        table = page.table(["prompt", *(f"step {step:,}" for step in steps)], rows).replace("<td>", '<td class="said">')
        title = f"{STAGES.get(one.kind, one.kind)}: {one.name}, {len(prompts)} prompts at {len(steps)} moments"
        found.append(page.folded(title, table) if one is not line[-1] else f"<p>{escape(title)}</p>{table}")
    return "".join(found)


def _said(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return ""
    unended = " <small>(cut off)</small>" if sample.get("stopped") is False else ""
    return escape(str(sample["text"])) + unended


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of the values, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]


def _scores(line: Sequence[Made]) -> str:
    """The competition's tasks beside what was published, and everything else that was scored."""
    found = [(one, score) for one in reversed(line) if one.run is not None for score in one.run.scores]
    competition = [(one, score) for one, score in found if score.competition]
    return _competition(competition) + _quick(found)


def _competition(found: Sequence[tuple[Made, ScoreFile]]) -> str:
    if not found:
        return ""
    head = ["", *(TASKS[task] for task in SIX), "geometric mean"]
    rows = [[_scored_name(one, score), *_score_cells(score)] for one, score in found]
    mine = range(len(rows))
    one, score = found[0]
    chances = [f"{score.competition[task]['chance']:.1f}" if task in score.competition else "" for task in SIX]
    rows.append(["guessing, in the right form", *chances, ""])
    for other in PUBLISHED:
        values = scores_of(other)
        rows.append([
            f"{escape(other.name)} <small>{escape(other.source)}</small>",
            *(f"{values[task]:.2f}" for task in SIX),
            f"{_geometric([values[task] for task in SIX]):.2f}",
        ])  # fmt: skip
    spans = []
    for task, result in score.competition.items():
        if result["score"] is not None:
            low, high = result["interval"] or (result["score"], result["score"])
            others = [(other.name, scores_of(other)[task] or 0.0) for other in PUBLISHED]
            spans.append(Span(TASKS[task], result["score"], low, high, result["chance"], others))
    title = f"{one.name} beside published entries"
    note = "0 to 100, 95% intervals; TruthfulQA is bleu_acc times 100. The mean is zero as soon as one task is."
    keys = {"this run": 1, "published": 7}
    if score.caveats:
        note = f"{score.caveats[0]}. {note}"
    plot = page.figure(title, span_plot(title, spans), "dotted: the level of guessing", keys)
    return f"<p>{escape(note)}</p>{page.plots([plot])}{page.table(head, rows, mine=list(mine))}"


def _scored_name(one: Made, score: ScoreFile) -> str:
    marks = dict.fromkeys([score.path.parent.name, *_short(score.caveats), str(score.found["asked"]["form"])])
    return f"{escape(one.name)} <small>{page.marks(list(marks))}</small>"


def _score_cells(score: ScoreFile) -> list[str]:
    cells = []
    for task in SIX:
        result = score.competition.get(task)
        if result is None or result["score"] is None:
            cells.append("not run")
            continue
        low, high = result["interval"] or (result["score"], result["score"])
        cells.append(f"{result['score']:.2f} <small>{low:.1f} to {high:.1f}</small>")
    means = score.found.get("means")
    return [*cells, f"{means['geometric']:.2f}" if means else "none: it needs all six"]


def _geometric(scores: Sequence[float | None]) -> float:
    from scoring.results import means

    return means([score or 0.0 for score in scores]).geometric


def _quick(found: Sequence[tuple[Made, ScoreFile]]) -> str:
    """Likelihood tasks, perplexity and lm-evaluation-harness's tasks, as one table of figures."""
    rows = []
    for one, score in found:
        named = _scored_name(one, score)
        for result in score.found.get("quick") or ():
            shown = "not run" if result["score"] is None else f"{result['score']:.2f}"
            low, high = result["interval"] or (None, None)
            span = "" if low is None else f"{low:.2f} to {high:.2f}"
            rows.append([named, escape(result["name"]), shown, span, f"{result['chance']:.1f}", f"{result['items']:,}"])
        c4 = score.found.get("c4")
        if c4:
            rows.append([named, "C4, packed: bits per byte", f"{c4['bits_per_byte']:.4f}", "", "", ""])
            rows.append([named, "C4, packed: perplexity", f"{c4['packed_perplexity']:.2f}", "", "", ""])
            rows.append([named, "C4, GaLore's protocol: perplexity", f"{c4['galore_perplexity']:.2f}", "", "", ""])
        for task, values in (score.found.get("tasks") or {}).items():
            rows += [
                [named, escape(f"{task}: {key.removesuffix(',none')}"), f"{value:.4f}", "", "", ""]
                for key, value in values.items()
                if isinstance(value, float) and "stderr" not in key
            ]
    return page.table(["", "task", "score", "95%", "chance", "items"], rows)


def _short(caveats: Sequence[str]) -> list[str]:
    """Their first words."""
    return [caveat.partition(":")[0] for caveat in caveats]


def _pruning(line: Sequence[Made]) -> str:
    """The stages of the newest cut on the way side by side."""
    cuts = [one.pruning for one in reversed(line) if one.pruning]
    found = next((cut for cut in cuts if cut.get("stages")), None)
    if found is None:
        return ""
    how = next((cut for cut in cuts if "method" in cut), {})  # a recovered model's file has the stages alone
    stages = found["stages"]
    first = stages[0]
    rows = [
        ["layers", *(f"{one['shape']['layers']}" for one in stages)],
        ["feed-forward width", *(f"{one['shape']['ffn']:,}" for one in stages)],
        ["query / key-value heads", *(f"{one['shape']['heads']} / {one['shape']['kv_heads']}" for one in stages)],
        ["vocabulary", *(f"{one['shape']['vocab']:,}" for one in stages)],
        ["parameters", *(_changed(one["parameters"], first["parameters"]) for one in stages)],
        ["weights on the disk", *(gigabytes(one["file_bytes"]) for one in stages)],
        [f"phone, fp16, {first['phone']['context']:,} tokens", *(gigabytes(one["phone"]["total"]) for one in stages)],
        ["decode ceiling, tok/s", *(f"{one['phone']['decode_ceiling']:,.1f}" for one in stages)],
    ]
    for number, text in enumerate(first["losses"]):
        for name, title, form in (("perplexity", "perplexity", ".4g"), ("bits_per_byte", "bits per byte", ".4f")):
            values = [format(one["losses"][number][name], form) for one in stages]
            rows.append([f"{title}, {escape(str(text['source']))}", *values])
    for task in first["scores"]:
        values = [one["scores"].get(task) for one in stages]
        rows.append([escape(task), *("not run" if value is None else f"{value:.2f}" for value in values)])
    notes = [f"Cut by {how['method']}, {'with' if how['repair'] else 'without'} repair."] if how else []
    if len({one["shape"]["vocab"] for one in stages}) > 1:
        notes.append("Perplexities of different vocabularies cannot be compared; bits per byte can.")
    return f"<p>{escape(' '.join(notes))}</p>{page.table(['', *(escape(one['name']) for one in stages)], rows)}"


def _changed(count: int, before: int) -> str:
    share = "" if count == before else f" <small>{count / before - 1:+.1%}</small>"
    return f"{count:,}{share}"


def _speed(run: Run) -> str:
    """Prefill and decode of every program that was timed."""
    found = speeds(run)
    rows = [
        [
            escape(one.where),
            escape(one.engine),
            f"{one.prompt:,}",
            _span(one.prefill),
            _span(one.decode),
            "" if one.peak_memory is None else gigabytes(one.peak_memory),
        ]
        for one in found
    ]
    head = ["device", "engine", "prompt, tokens", "prefill, tok/s", "decode, tok/s", "peak memory"]
    table = page.table(head, rows, mine=[number for number, one in enumerate(found) if one.phone])
    notes = [] if any(one.phone for one in found) else ["Not measured on a phone."]
    if run.results("phone.json").get("emulated"):
        notes = ["phone.json is of an emulator, whose speed means nothing: not measured on a phone."]
    notes.append("Medians, with quartiles; only figures of one device compare.")
    parity = run.results("export.json").get("parity")
    if parity:
        shown = parity["summary"] if isinstance(parity, dict) else parity
        notes.append(f"The exported library against transformers: {shown}.")
    if not found and not parity:
        return ""
    return f"<p>{escape(' '.join(notes))}</p>{table}"


def _span(one: Mapping[str, float]) -> str:
    return f"{one['median']:,.1f} <small>{one['lower']:,.1f} to {one['upper']:,.1f}</small>"


def _memory(line: Sequence[Made]) -> str:
    """What every model on the way takes on a phone, against the phone's memory."""
    sizes = [(one, size) for one in line if (size := footprint(one.folder)) is not None]
    if not sizes:
        return ""
    bars = [_bar(one, size) for one, size in sizes]
    limits = [("12 GB: the phone", PHONE_MEMORY), ("MLC's OpenCL gate", float(OPENCL_GATE))]
    plot = bar_plot("memory on a phone", bars, limits, gigabytes)
    keys = {"weights, fp16": 1, "KV cache": 2, "workspace, estimated": 4}
    fits, over = page.marks(["fits"], "good"), page.marks(["over 12 GB"], "bad")
    rows = [
        [
            escape(one.name),
            f"{size.parameters:,}",
            gigabytes(size.file_bytes) if size.file_bytes else "none",
            gigabytes(size.phone.weights),
            f"{gigabytes(size.phone.cache)} <small>{size.phone.context:,} tokens</small>",
            f"{gigabytes(size.phone.total)} <small>{fits if size.phone.total <= PHONE_MEMORY else over}</small>",
            "passes" if size.phone.passes_gate else "does not pass",
        ]
        for one, size in sizes
    ]
    head = ["model", "parameters", "on the disk", "weights, fp16", "KV cache", "on a phone", "OpenCL gate"]
    measured = _measured(line[-1].run)
    return page.beside(page.figure("Planned memory", plot, measured, keys), page.table(head, rows))


def _measured(run: Run | None) -> str:
    """The memory that was measured, in a sentence."""
    peaks = {one.where: one.peak_memory for one in (speeds(run) if run else ()) if one.phone and one.peak_memory}
    return "; ".join(f"measured on {where}: {gigabytes(peak)}" for where, peak in peaks.items())


def _bar(one: Made, size: Footprint) -> Bar:
    parts = [
        ("weights, fp16", size.phone.weights, 1),
        ("KV cache", size.phone.cache, 2),
        ("workspace, estimated", size.workspace, 4),
    ]
    return Bar(one.name, parts, f"{gigabytes(size.phone.total)}, {size.phone.context:,} tokens")


def _data(line: Sequence[Made]) -> str:
    """What the weights have seen, and whether the competition allows it."""
    verdict = judge(data_of(line))
    if verdict is None:
        return ""
    kind = "good" if verdict.within else "bad" if verdict.outside else ""
    listed = "".join(f"<li>{escape(source)}</li>" for source in verdict.sources)
    return f"<p>{page.marks([verdict.text], kind)}</p><ul>{listed}</ul>"


def _commands(line: Sequence[Made]) -> str:
    """What was typed, in order."""
    typed = []
    for one in line:
        if one.run is not None:
            typed.append(str(one.run.environment.get("command", "")))
            typed += [score_command(score.found) for score in reversed(one.run.scores)]
            typed.append(str(one.run.results("export.json").get("command", "")))
        else:
            typed.append(str(one.record.get("command", "")))
    return page.code("\n".join(filter(None, typed)), wrap=True)


def score_command(found: Mapping[str, Any]) -> str:
    """The command that gives a ``score.json``, from the settings in it."""
    asked = found["asked"]
    # "form" is the one that was taken; of an older file, which does not say what was asked, it gives the same score.
    asked = asked | {"form": asked.get("form_asked", asked["form"])}
    words = ["python", "-m", "scoring", found["model"]]
    for name, default in to_dict(ScoreSettings()).items():
        value = asked.get(name, default)
        if value is not None and value != default:
            words += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)


def _settings(line: Sequence[Made]) -> str:
    """Every setting and the environment of each stage."""
    found = []
    for one in line:
        title = f"{STAGES.get(one.kind, one.kind)}: {one.name}"
        settings = one.run.settings if one.run is not None else one.record.get("settings") or {}
        body = page.code(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)) if settings else ""
        if one.run is not None:
            body = page.pairs(_environment(one.run.environment)) + body
        found.append(page.folded(title, body))
    return "".join(found)


def _environment(values: Mapping[str, Any]) -> dict[str, str]:
    shown = {name: str(value) for name, value in values.items() if not isinstance(value, dict) and value is not None}
    return shown | {name: str(value) for name, value in (values.get("packages") or {}).items()}
