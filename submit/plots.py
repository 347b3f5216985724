"""Plots as SVG of our own: text in, text out, nothing to load.

Colours are CSS variables of the page (``--s1`` …), so a plot is readable in light and dark. Every plot is drawn
:data:`WIDTH` units wide, about what a column of the page measures on a phone, so that its text has the size of the
page's text there; wider screens get more columns, not larger plots. Figures under the pointer are SVG's own
``<title>``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 216
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 38

EDGE = 6
"""Room for half a dot beside the axes."""

BUCKETS = 240
"""Points of a line; a longer run is averaged over as many equal spans."""

STRIPS = 80
"""Spans of a plot that show their figures under the pointer."""

EARLY = 0.02
"""Share of a run, from its start, whose steep fall may leave the plot at the top so that the rest can be read."""

MANY = 50
"""Points that a line has at least for that."""


@dataclass(frozen=True)
class Series:
    """A line."""

    name: str
    points: Sequence[tuple[float, float | None]]
    """By x; None where there is no value, which breaks the line."""
    slot: int = 1
    """Of the page's colours, from 1 to 6."""
    dots: bool = False
    """Mark every point: for figures that are measured now and then."""


@dataclass(frozen=True)
class Mark:
    """Something that happened at one moment of a run."""

    x: float
    text: str
    kind: str = "restart"
    """restart: a line from top to bottom; skipped: a triangle at the top."""


@dataclass(frozen=True)
class Bar:
    """A horizontal bar of parts laid end to end."""

    name: str
    parts: Sequence[tuple[str, float, int]]
    """Name, length, colour slot."""
    note: str


@dataclass(frozen=True)
class Span:
    """A score with its interval, the level of guessing, and others' scores."""

    name: str
    value: float
    low: float
    high: float
    chance: float
    others: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Dot:
    """A point of a scatter plot."""

    name: str
    x: float
    y: float
    slot: int
    hollow: bool = False
    label: bool = False
    """Write the name beside it, where there is room."""


def line_plot(
    title: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    x_label: str = "tokens",
    show: Callable[[float], str] | None = None,
    zero: bool = False,
    log: bool = False,
    falls: bool = False,
) -> str:
    """Lines over a common x that begins at 0; empty text where there is nothing to draw.

    Args:
        title: what a screen reader is told.
        series: the lines. Those longer than :data:`BUCKETS` become means, in a band from lowest to highest.
        marks: what happened on the way.
        x_label: under the axis.
        show: a value as text; by default :func:`compact`.
        zero: the axis begins at 0.
        log: a logarithmic axis where values span more than a factor of 30.
        falls: the values fall steeply at first, see :data:`EARLY`.
    """
    show = show or compact
    drawn = [(one, thinned(one.points)) for one in series]
    drawn = [(one, points) for one, points in drawn if any(point[1] is not None for point in points)]
    if not drawn:
        return ""
    last = max(point[0] for _, points in drawn for point in points) or 1.0
    across = _Scale(0, last, 0, WIDTH - LEFT - RIGHT)
    low, high = _limits([points for _, points in drawn], EARLY * last if falls else 0)
    ratio = high / low if low > 0 else 0
    up = _Scale(0 if zero else low, high, HEIGHT - TOP - BOTTOM, 0, log=log and ratio > 30, margin=0.06)
    body = [_grid(up, show), _x_axis(across, x_label)]
    inner = [_band(points, across, up, one.slot) for one, points in drawn]
    inner += [_line(one, points, across, up) for one, points in drawn]
    inner += [_mark(mark, across) for mark in marks if mark.x <= last]
    inner += _strips(drawn, across, x_label, show)
    body.append(_inside(inner))
    return _svg(title, HEIGHT, body)


def thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None, float, float]]:
    """At most :data:`BUCKETS` of (x, mean, lowest, highest); the mean is None where no point has a value."""
    if not points:
        return []
    size = -(-len(points) // BUCKETS)
    found: list[tuple[float, float | None, float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part if value is not None and math.isfinite(value)]
        mean = math.fsum(values) / len(values) if values else None
        found.append((part[-1][0], mean, min(values, default=0.0), max(values, default=0.0)))
    return found


def span_plot(title: str, spans: Sequence[Span]) -> str:
    """Scores of 0 to 100 as points in their intervals, one line a task; empty where there are none."""
    if not spans:
        return ""
    left, row = 118, 30
    height = TOP + row * len(spans) + BOTTOM
    top = max([5.0, *(max(one.high, one.chance, *(value for _, value in one.others), 0.0) for one in spans)])
    across = _Scale(0, top, 0, WIDTH - left - RIGHT, margin=0.04, keep_low=True)
    body = [_x_axis(across, "score, 0 to 100", left=left, bottom=height - BOTTOM)]
    for number, one in enumerate(spans):
        y = TOP + row * number + row / 2
        at = [left + across(value) for value in (one.low, one.value, one.high, one.chance)]
        body.append(f'<text class="name" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(one.name)}</text>')
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for name, value in one.others:
            x, said = left + across(value), escape(f"{name}: {value:.2f}")
            body.append(f'<circle class="other" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{said}</title></circle>')
        said = escape(f"{one.name}: {one.value:.2f}, 95% {one.low:.2f} to {one.high:.2f}, chance {one.chance:.1f}")
        body.append(
            f'<g><title>{said}</title><line class="chance" x1="{at[3]:.1f}" x2="{at[3]:.1f}" y1="{y - 9:.1f}" '
            f'y2="{y + 9:.1f}"/><line class="l1 thick" x1="{at[0]:.1f}" x2="{at[2]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="f1 ring" cx="{at[1]:.1f}" cy="{y:.1f}" r="5"/></g>'
        )
    return _svg(title, height, body)


def bar_plot(title: str, bars: Sequence[Bar], limits: Sequence[tuple[str, float]], show: Callable[[float], str]) -> str:
    """Horizontal bars against named limits; empty where there are none."""
    if not bars:
        return ""
    row, head = 46, 30
    height = head + row * len(bars) + BOTTOM
    top = max([*(sum(length for _, length, _ in bar.parts) for bar in bars), *(limit for _, limit in limits)])
    across = _Scale(0, top, 0, WIDTH - 2 * RIGHT, margin=0.06, keep_low=True)
    body = [_x_axis(across, "", left=RIGHT, bottom=height - BOTTOM, show=show)]
    for number, bar in enumerate(bars):
        y, x = head + row * number, float(RIGHT)
        note = f'<tspan class="soft" dx="8">{escape(bar.note)}</tspan>'
        body.append(f'<text class="name" x="{RIGHT}" y="{y + 14}">{escape(bar.name)}{note}</text>')
        for name, length, slot in bar.parts:
            wide = max(across(length), 1.5)
            said = escape(f"{bar.name}, {name}: {show(length)}")
            body.append(
                f'<rect class="f{slot}" x="{x:.1f}" y="{y + 20}" width="{max(wide - 1, 1):.1f}" height="14" rx="2">'
                f"<title>{said}</title></rect>"
            )
            x += wide
    for name, limit in limits:
        x = RIGHT + across(limit)
        body.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{head - 8}" y2="{height - BOTTOM}"/>')
        body.append(f'<text x="{x + 4:.1f}" y="{head - 14}" text-anchor="end">{escape(name)}</text>')
    return _svg(title, height, body)


def scatter_plot(
    title: str, dots: Sequence[Dot], front: Sequence[tuple[float, float]], *, x_label: str, y_label: str
) -> str:
    """Points over a logarithmic x, with the front that none of them dominates; empty where there are none."""
    if not dots:
        return ""
    height = 300
    xs, ys = [dot.x for dot in dots], [dot.y for dot in dots]
    across = _Scale(min(xs) / 1.5, max(xs) * 1.5, 0, WIDTH - LEFT - RIGHT, log=True)
    up = _Scale(min(0, *ys), max(1.0, *ys), height - TOP - BOTTOM, 0, margin=0.08)
    body = [_grid(up, compact), _x_axis(across, x_label, bottom=height - BOTTOM)]
    if front:
        path = [f"{LEFT + across(x):.1f},{TOP + up(y):.1f}" for x, y in front]
        body.append(f'<polyline class="front" points="{" ".join(path)}"/>')
    taken = [(LEFT + across(x) - 6, LEFT + across(x) + 6, TOP + up(y)) for x, y in zip(xs, ys, strict=True)]
    for dot in sorted(dots, key=lambda dot: not dot.label):
        x, y = LEFT + across(dot.x), TOP + up(dot.y)
        kind = f"l{dot.slot} hollow" if dot.hollow else f"f{dot.slot} ring"
        said = escape(f"{dot.name}: {y_label} {dot.y:.2f}, {x_label} {compact(dot.x)}")
        body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{said}</title></circle>')
        wide = 6.2 * len(dot.name)
        start = x + 9 if x + 9 + wide < WIDTH else x - 9 - wide
        free = all(abs(y - other) > 13 or start > to or start + wide < begin for begin, to, other in taken)
        if dot.label and free and start > 0:
            taken.append((start, start + wide, y))
            body.append(f'<text class="name" x="{start:.1f}" y="{y + 4:.1f}">{escape(dot.name)}</text>')
    return _svg(title, height, body)


def compact(value: float) -> str:
    """A number for an axis: ``1.2M``, ``30k``, ``0.25``, ``3e-05``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about ``count`` of them, that lie between two others."""
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * scale for factor in (1, 2, 2.5, 5, 10) if factor * scale >= raw * 0.999)
    found = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [0.0 if abs(value) < step * 1e-6 else value for value in found]


class _Scale:
    """Values to places on the drawing."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False, margin: float = 0.0,
        keep_low: bool = False,
    ) -> None:  # fmt: skip
        self.log = log
        low, high = (math.log10(low), math.log10(high)) if log else (low, high)
        room = (high - low or abs(high) or 1.0) * margin
        self.low = low if keep_low or (low == 0 and not log) else low - room
        self.high = high + room if high + room > self.low else self.low + 1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        """Where a value is, in units of the drawing."""
        value = math.log10(value) if self.log else value
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round values on the scale."""
        if not self.log:
            return ticks(self.low, self.high)
        powers = range(math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9) + 1)
        if len(powers) >= 2:
            every = -(-len(powers) // 5)
            return [10.0**power for power in powers if power % every == 0]
        return [value for value in ticks(10**self.low, 10**self.high) if value > 0]


def _limits(lines: Sequence[Sequence[tuple[float, float | None, float, float]]], settled: float) -> tuple[float, float]:
    """Lowest and highest value, of a line with many points the highest among those from ``settled`` on."""
    there = [[point for point in line if point[1] is not None] for line in lines]
    late = [[point for point in line if len(line) < MANY or point[0] >= settled] or line for line in there]
    return min(point[2] for line in there for point in line), max(point[3] for line in late for point in line)


def _svg(title: str, height: float, body: Sequence[str]) -> str:
    shown = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{shown}" xmlns="http://www.w3.org/2000/svg">'
        f"{''.join(body)}</svg>"
    )


def _inside(body: Sequence[str]) -> str:
    """The part of the drawing within the axes; what leaves it above or below is cut off."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return (
        f'<svg x="{LEFT - EDGE}" y="{TOP}" width="{wide + 2 * EDGE}" height="{high}" '
        f'viewBox="{-EDGE} 0 {wide + 2 * EDGE} {high}">{"".join(body)}</svg>'
    )


def _grid(up: _Scale, show: Callable[[float], str]) -> str:
    """Horizontal lines and their values."""
    drawn = []
    for value in up.ticks():
        y = TOP + up(value)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(show(value))}</text>')
    return "".join(drawn)


def _x_axis(
    across: _Scale,
    label: str,
    *,
    left: float = LEFT,
    bottom: float = HEIGHT - BOTTOM,
    show: Callable[[float], str] = compact,
) -> str:
    drawn = [f'<line class="axis" x1="{left:g}" x2="{WIDTH - RIGHT}" y1="{bottom:g}" y2="{bottom:g}"/>']
    for value in across.ticks():
        x = left + across(value)
        drawn.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>'
            f'<text x="{x:.1f}" y="{bottom + 17:g}" text-anchor="middle">{escape(show(value))}</text>'
        )
    if label:
        middle = (left + WIDTH - RIGHT) / 2
        drawn.append(f'<text x="{middle:g}" y="{bottom + 33:g}" text-anchor="middle">{escape(label)}</text>')
    return "".join(drawn)


def _line(one: Series, points: Sequence[tuple[float, float | None, float, float]], across: _Scale, up: _Scale) -> str:
    path, pen_down = [], False
    dots = []
    for number, (x, y, _, _) in enumerate(points):
        if y is None:
            pen_down = False
            continue
        place = f"{across(x):.1f},{up(y):.1f}"
        path.append(f"{'L' if pen_down else 'M'}{place}")
        alone = not pen_down and (number + 1 == len(points) or points[number + 1][1] is None)
        if one.dots or alone:
            dots.append(f'<circle class="f{one.slot} ring" cx="{across(x):.1f}" cy="{up(y):.1f}" r="4"/>')
        pen_down = True
    return f'<path class="l{one.slot} line" d="{"".join(path)}"/>{"".join(dots)}'


def _band(points: Sequence[tuple[float, float | None, float, float]], across: _Scale, up: _Scale, slot: int) -> str:
    """From the lowest to the highest of each span."""
    whole = [point for point in points if point[1] is not None]
    if all(low == high for _, _, low, high in whole):
        return ""
    there = [f"{across(x):.1f},{up(high):.1f}" for x, _, _, high in whole]
    back = [f"{across(x):.1f},{up(low):.1f}" for x, _, low, _ in reversed(whole)]
    return f'<polygon class="f{slot} band" points="{" ".join([*there, *back])}"/>'


def _mark(mark: Mark, across: _Scale) -> str:
    x, high = across(mark.x), HEIGHT - TOP - BOTTOM
    said = f"<title>{escape(mark.text)}</title>"
    if mark.kind == "skipped":
        return f'<path class="skipped" d="M{x - 4:.1f},0h8l-4,7z">{said}</path>'
    return f'<line class="restart" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{high}">{said}</line>'


def _strips(
    drawn: Sequence[tuple[Series, Sequence[tuple[float, float | None, float, float]]]],
    across: _Scale,
    x_label: str,
    show: Callable[[float], str],
) -> list[str]:
    """Invisible spans that say the figures of every line under the pointer."""
    wide, high = (WIDTH - LEFT - RIGHT) / STRIPS, HEIGHT - TOP - BOTTOM
    said: dict[int, dict[str, str]] = {}
    for one, points in drawn:
        for x, y, _, _ in points:
            if y is not None:
                strip = min(STRIPS - 1, int(across(x) / wide))
                said.setdefault(strip, {x_label: compact(x)})[one.name] = show(y)
    return [
        f'<rect class="strip" x="{strip * wide:.1f}" y="0" width="{wide:.1f}" height="{high}">'
        f"<title>{escape(', '.join(f'{name} {value}' for name, value in figures.items()))}</title></rect>"
        for strip, figures in sorted(said.items())
    ]
