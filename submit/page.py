"""The parts of a page: one HTML file with its style inside, in light and dark, for a desk and for a phone.

Every text that comes from outside passes through :func:`html.escape` here or in submit/plots.py; a page's content
security policy lets nothing be loaded from anywhere.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")

MINE, WRAP = ' class="mine"', ' class="wrap"'

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Of a page that is a file: it has no script, and nothing is loaded."""


def page(title: str, body: str, *, policy: str = POLICY, script: str = "") -> str:
    """A whole page; ``body`` is HTML, everything else plain text."""
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>{body}</main>{script}</body></html>\n"
    )


def section(name: str, title: str, body: str) -> str:
    """A part of the page with a heading and a name to link to; empty where it has no body."""
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{body}</section>\n' if body else ""


def tiles(figures: Mapping[str, tuple[str, str]]) -> str:
    """Large figures: name to (value, what must be known of it)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
            for name, (value, note) in figures.items()
        )
        + "</div>"
    )


def figure(title: str, plot: str, caption: str = "", keys: Mapping[str, int] | None = None) -> str:
    """A plot with its heading, caption and, for several lines, colours; empty where there is no plot."""
    if not plot:
        return ""
    shown = "".join(
        f'<span class="key"><i class="k{slot}"></i>{escape(name)}</span>' for name, slot in (keys or {}).items()
    )
    below = f"<figcaption>{shown}{escape(caption)}</figcaption>" if shown or caption else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{plot}{below}</figure>'


def plots(figures: Sequence[str]) -> str:
    """Figures side by side, as many as there is room for."""
    drawn = "".join(figures)
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def beside(plot: str, shown: str) -> str:
    """A figure and a table next to each other, or below where there is no room."""
    return f'<div class="beside">{plot}{shown}</div>' if plot and shown else plot + shown


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, mine: Sequence[int] = ()) -> str:
    """A table that scrolls by itself where it is too wide; cells are HTML. ``mine`` are rows to tell apart."""
    if not rows:
        return ""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        f"<tr{MINE if number in mine else ''}><th>{row[0]}</th>"
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(values: Mapping[str, str]) -> str:
    """Names and values in two columns; both plain text."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in values.items())
    return f'<div class="scroll"><table class="text">{rows}</table></div>' if rows else ""


def folded(summary: str, body: str) -> str:
    """Something that is opened on demand; ``body`` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>" if body else ""


def code(text: str, *, wrap: bool = False) -> str:
    """Text as it is."""
    return f"<pre{WRAP if wrap else ''}>{escape(text)}</pre>"


def marks(texts: Sequence[str], kind: str = "") -> str:
    """Short remarks in frames."""
    return "".join(f'<span class="mark {kind}">{escape(text)}</span>' for text in texts)
