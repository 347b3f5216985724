"""``python -m submit leaderboard RUNS…``: runs and published entries in one table and on one page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from statistics import fmean

from common.console import Console, aligned
from common.errors import UserError
from common.files import gigabytes, write_text
from common.settings import to_dict
from models.budget import PHONE_MEMORY
from scoring.results import Means, means
from submit import page
from submit.footprint import footprint
from submit.plots import Dot, compact, scatter_plot
from submit.published import PUBLISHED, Published, scores_of
from submit.ranking import MODELS, SIX, TASKS, Entry, Placed, Throughput, front, rank
from submit.rules import judge
from submit.run import Run, ScoreFile, data_of, lineage
from submit.settings import LeaderboardCommand
from submit.speeds import speeds

TRACKS = {1: "Track 1: compressed models, mean of three", 2: "Track 2: trained from scratch"}


def leaderboard_command(command: LeaderboardCommand) -> None:
    """Rank runs and published entries, show both tracks, and write the page.

    Raises:
        UserError: a run is not there, has no scores of the competition's tasks, or is of another track than its entry.
    """
    console = Console()
    console.settings("leaderboard", to_dict(command))
    own = [entry_of(word) for word in command.runs]
    tables = standings([*own, *published()])
    for track, title in TRACKS.items():
        console.say(f"\n{title}\n{text_table(tables[track])}")
    others = [one for one in tables[None] if not one.entry.published]
    for one in others:
        console.say(f"\n{one.entry.name} is in no track: {', '.join(one.entry.unranked)}")
    write_text(Path(command.out), leaderboard(tables))
    console.say(f"\nleaderboard: {command.out}")


def standings(entries: Sequence[Entry]) -> dict[int | None, list[Placed]]:
    """The entries of each track, placed; under None those that are shown for comparison."""
    return {track: rank([entry for entry in entries if entry.track == track]) for track in (1, 2, None)}


def entry_of(word: str) -> Entry:
    """The entry that a word of the command names: a run, or NAME=RUN,RUN,RUN."""
    name, equals, runs = word.partition("=")
    if not equals:
        return run_entry(Run(Path(word)))
    found = [run_entry(Run(Path(run))) for run in runs.split(",") if run]
    if len(found) != MODELS:
        raise UserError(
            f"{name} names {len(found)} runs; an entry of track 1 is the mean of {MODELS} compressed models"
        )
    wrong = [one.name for one in found if one.track != 1]
    if wrong:
        raise UserError(f"{wrong[0]} was trained from scratch, so it is an entry of track 2 by itself; leave it out")
    return together(name, found)


def run_entry(run: Run) -> Entry:
    """A run as an entry: its best comparable score, speed, size, and whether its data stayed within the rules."""
    scored = run.score
    if scored is None:
        command = f"python -m scoring {run.path / 'model'}"
        if any(score.stale for score in run.scores):
            raise UserError(f"the scores of {run.path} are of other weights than its model has now; {command}")
        raise UserError(f"{run.path} has no scores of the competition's tasks; {command}")
    verdict = judge(data_of(lineage(run)))
    track = None if verdict is None else verdict.track
    remarks = (verdict.text,) if verdict is not None and not verdict.within else ()
    reasons = [mark.partition(":")[0] for mark in scored.marks]
    if track == 1:
        reasons.append(f"one model of {MODELS}")
    elif track is None:
        reasons.append("its palmtop.json says of no data, so its track is not known")
    size, found = footprint(run.path / "model"), speeds(run)
    peaks = [one.peak_memory for one in found if one.phone and one.peak_memory]
    memory: float | None = max(peaks) if peaks else None if size is None else float(size.phone.total)
    return Entry(
        run.name,
        track,
        scored.scores,
        _source(scored),
        parameters=None if size is None else float(size.parameters),
        memory=memory,
        memory_is="measured on the phone" if peaks else "by the plan",
        throughput=found[0].throughput if found else None,
        unranked=tuple(reasons),
        remarks=remarks,
    )


def _source(scored: ScoreFile) -> str:
    return f"scores/{scored.path.parent.name}, {scored.found['asked']['form']} form"


def together(name: str, entries: Sequence[Entry]) -> Entry:
    """Several models as one entry: the mean of what all of them have, the largest of their memories."""
    scores = {task: _mean([one.scores.get(task) for one in entries]) for task in TASKS}
    memories = [one.memory for one in entries]
    speeds_of = [one.throughput for one in entries]
    where = {one.where for one in speeds_of if one is not None}
    known = [one for one in speeds_of if one is not None]
    alike = len(where) == 1 and len(known) == len(entries)
    marks = [mark for one in entries for mark in one.unranked if mark != f"one model of {MODELS}"]
    return Entry(
        name,
        1,
        {task: score for task, score in scores.items() if score is not None},
        f"mean of {', '.join(one.name for one in entries)}",
        published=entries[0].published,
        parameters=_mean([one.parameters for one in entries]),
        memory=None if None in memories else max(memory for memory in memories if memory is not None),
        memory_is=entries[0].memory_is,
        throughput=Throughput(fmean(one.value for one in known), known[0].where, known[0].phone) if alike else None,
        models=len(entries),
        unranked=tuple(dict.fromkeys(marks)),
        remarks=tuple(dict.fromkeys(remark for one in entries for remark in one.remarks)),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean where all are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def published() -> list[Entry]:
    """What others have published, as entries; three models of one team are one entry of track 1 besides."""
    single = [published_entry(one) for one in PUBLISHED]
    teams = dict.fromkeys(one.part_of for one in PUBLISHED if one.part_of is not None)
    groups = {
        team: [entry for entry, one in zip(single, PUBLISHED, strict=True) if one.part_of == team] for team in teams
    }
    return [*single, *(replace(together(team, models), unranked=()) for team, models in groups.items())]


def published_entry(one: Published) -> Entry:
    """A published line as an entry."""
    remarks = (one.note,) if one.note else ()
    return Entry(
        one.name, one.track, scores_of(one), one.source, published=True, parameters=one.parameters, remarks=remarks
    )


def mean_of(entry: Entry) -> Means | None:
    """The means of the six tasks; None where one was not run."""
    scores = [entry.scores.get(task) for task in SIX]
    return means([score for score in scores if score is not None]) if None not in scores else None


def text_table(placed: Sequence[Placed]) -> str:
    """The entries of a track for the terminal: score and place of each task, and below what must be known."""
    head = ["", "points", "mean", *_columns(placed).values(), "decode", "params", "memory"]
    lines = [head]
    for one in placed:
        entry, mean = one.entry, mean_of(one.entry)
        cells = [_with_place(entry.scores.get(task), one.places.get(task)) for task in _columns(placed)]
        speed = "-" if entry.throughput is None else f"{entry.throughput.value:,.1f}"
        lines.append([
            f"{one.place or '-'}  {entry.name}",
            "-" if one.place is None else f"{one.points}",
            "-" if mean is None else f"{mean.geometric:.2f}",
            *cells,
            _with_place(speed, one.places.get("throughput")),
            "-" if entry.parameters is None else compact(entry.parameters),
            "-" if entry.memory is None else gigabytes(entry.memory),
        ])  # fmt: skip
    said = [f"{one.entry.name}: {'; '.join(found)}" for one in placed if (found := notes(one.entry))]
    return "\n".join([*aligned(lines), *said])


def _columns(placed: Sequence[Placed]) -> dict[str, str]:
    """The tasks that any entry has; LongBench is rarely there."""
    return {task: name for task, name in TASKS.items() if any(task in one.entry.scores for one in placed)}


def _with_place(value: float | str | None, place: int | None) -> str:
    shown = "-" if value is None else value if isinstance(value, str) else f"{value:.2f}"
    return shown if place is None else f"{shown} ({place})"


def notes(entry: Entry) -> list[str]:
    """What must be seen beside an entry's name."""
    found = list(entry.unranked)
    if entry.disqualified:
        found.append(f"disqualified: over {gigabytes(PHONE_MEMORY)}")
    if entry.track is not None:
        missing = [name for task, name in TASKS.items() if entry.scores.get(task) is None and task in SIX]
        if entry.throughput is None or not entry.throughput.phone:
            missing.append("throughput on a phone")
        if missing:
            found.append(f"not measured: {', '.join(missing)}")
    return [*found, *entry.remarks]


def leaderboard(tables: Mapping[int | None, Sequence[Placed]]) -> str:
    """The page."""
    every = [one for track in (2, 1, None) for one in tables[track]]
    body = "<h1>Leaderboard</h1>" + "".join(
        page.section(f"track{track}", title, _table(tables[track]))
        for track, title in sorted(TRACKS.items(), reverse=True)
    )
    body += page.section("fronts", "Score against size and speed", _fronts(every))
    body += page.section("others", "For comparison", _table(tables[None]))
    return page.page("Leaderboard · palmtop", body + f"<p><small>{escape(RULES)}</small></p>")


RULES = """\
Places 1 to 10 of each task give 10 to 1 points, places in throughput on a phone twice that; ties share the better
place; over 12 GB of memory disqualifies; LongBench and the hidden task count for nobody who has not measured them.
Figures in brackets are places. Scores made on samples or with a limit take no place. Throughput is ranked where all of
it was measured on one phone. Means are geometric, and zero as soon as one task is."""


def _table(placed: Sequence[Placed]) -> str:
    columns = _columns(placed)
    head = ["", "points", "mean<small>shifted</small>", *columns.values(), "decode, tok/s", "parameters", "memory"]
    rows = []
    for one in placed:
        entry, found = one.entry, mean_of(one.entry)
        place = f"{one.place}. " if one.place is not None else ""
        speed = entry.throughput
        rows.append([
            f"{place}{escape(entry.name)}<small>{escape(entry.source)}{_marks(entry)}</small>",
            "–" if one.place is None else f"<b>{one.points}</b>",
            "–" if found is None else f"{found.geometric:.2f}<small>{found.shifted_geometric:.2f}</small>",
            *(_cell(entry.scores.get(task), one.places.get(task)) for task in columns),
            "–" if speed is None else f"{speed.value:,.1f}<small>{escape(speed.where)}</small>",
            "–" if entry.parameters is None else compact(entry.parameters),
            "–" if entry.memory is None else f"{gigabytes(entry.memory)}<small>{escape(entry.memory_is)}</small>",
        ])  # fmt: skip
    return page.table(head, rows, mine=[number for number, one in enumerate(placed) if not one.entry.published])


def _cell(score: float | None, place: int | None) -> str:
    if score is None:
        return "–"
    return f"{score:.2f}" + ("" if place is None else f"<small>({place})</small>")


def _marks(entry: Entry) -> str:
    """The notes on an entry, in frames those that keep it from a place or from the rules."""
    found = notes(entry)
    bad = [note for note in found if note.startswith(("disqualified", "data outside"))]
    framed = page.marks(list(entry.unranked)) + page.marks(bad, "bad")
    plain = "; ".join(escape(note) for note in found if note not in bad and note not in entry.unranked)
    return (f"; {plain}" if plain else "") + (f"<br>{framed}" if framed else "")


def _fronts(placed: Sequence[Placed]) -> str:
    """Score against parameters, and against decoding on each device that more than one entry was measured on."""
    entries = [one.entry for one in placed if mean_of(one.entry) is not None]
    sized = [(entry, entry.parameters) for entry in entries if entry.parameters is not None and entry.models == 1]
    found = [_front("Score against parameters", sized, "parameters", less_is_better=True)]
    devices = dict.fromkeys(entry.throughput.where for entry in entries if entry.throughput is not None)
    for device in devices:
        timed = [(one, one.throughput.value) for one in entries if one.throughput and one.throughput.where == device]
        found.append(_front(f"Score against decoding on {device}", timed, "decode, tok/s", less_is_better=False))
    return page.plots(found)


def _front(title: str, points: Sequence[tuple[Entry, float]], x_label: str, *, less_is_better: bool) -> str:
    """A plot with its Pareto front, which scores of samples and limits are kept out of."""
    scored = [(entry, x, found.geometric) for entry, x in points if (found := mean_of(entry)) is not None]
    full = [(entry, x, y) for entry, x, y in scored if not _partial(entry)]
    best = [full[number] for number in front([(x, y) for _, x, y in full], less_is_better=less_is_better)]
    named = {entry.name for entry, _, _ in best}
    dots = [
        Dot(
            entry.name, x, y, 7 if entry.published else 1, hollow=_partial(entry),
            label=entry.name in named or not entry.published,
        )
        for entry, x, y in scored
    ]  # fmt: skip
    plot = scatter_plot(title, dots, [(x, y) for _, x, y in best], x_label=x_label, y_label="geometric mean")
    keys = {"runs": 1, "published": 7}
    return page.figure(title, plot, "hollow: on a sample or with a limit; dashed: the Pareto front", keys)


def _partial(entry: Entry) -> bool:
    return any(mark in ("sample", "limit") for mark in entry.unranked)
