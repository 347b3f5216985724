"""What a run shows: a header, a progress bar or lines, warnings. Only rank 0 speaks."""

import sys
from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text


class Console:
    """The run's voice on standard output.

    On a terminal progress is one live line; in a file, such as a SLURM log, it is a line now and then.
    """

    def __init__(self, *, rank: int = 0) -> None:
        self._out = RichConsole(quiet=rank != 0, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._progress: Progress | None = None
        self._task: Any = None

    def settings(self, title: str, values: dict[str, Any]) -> None:
        """Show resolved settings."""
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()
        if self._out.is_terminal:
            self._out.print(Panel(Syntax(text, "yaml", background_color="default"), title=title, expand=False))
        else:
            self._out.print(f"{title}\n{text}", markup=False)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Show names and values in two columns."""
        grid = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            grid.add_row(Text(name), Text(value))
        self._out.print(f"[bold]{title}[/bold]" if title else "")
        self._out.print(grid)

    def say(self, text: str) -> None:
        """Print a line."""
        self._out.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a line that should not be missed."""
        self._out.print(f"warning: {text}", style="yellow", markup=False)

    def start(self, total: int, done: int) -> None:
        """Begin showing progress towards ``total`` tokens."""
        if self._out.is_terminal:
            columns = (
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=self._out)
            self._task = self._progress.add_task("", total=total, completed=done)
            self._progress.start()

    def progress(self, done: int, total: int, status: dict[str, str]) -> None:
        """Show how far a run is and its figures."""
        text = "  ".join(f"{name} {value}" for name, value in status.items())
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=escape(text))
        else:
            self._out.print(f"{done / total:5.1%}  {text}", markup=False)

    def stop(self) -> None:
        """End the progress line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Cells in columns: those of ``left`` to the left, the others, figures mostly, to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def duration(seconds: float) -> str:
    """A time span for people: ``3d 04h``, ``2h 05m``, ``4m 10s``, ``12s``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
