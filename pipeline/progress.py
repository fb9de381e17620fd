"""What commands show while they run, and the console on which they print tables.

Progress is a bar with rate and remaining time on a terminal, otherwise a line per minute and a last one.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)
WIDTH_OF_FILES = 180  # characters per line of a table, where the output is no terminal
SECONDS_BETWEEN_LINES = 60.0


class Advance(Protocol):
    """Counts finished units."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as finished; `note`, if any, replaces the text after the bar."""


class _RateColumn(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(_rate(task.finished_speed or task.speed or 0, self.unit))


def say(text: str) -> None:
    """Print a status message to stderr; stdout is for results."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def table_console() -> Console:
    """Return a console on stdout for tables, as wide as the terminal; a file gets wide tables."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_OF_FILES, highlight=False)


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0, show: bool = True) -> Iterator[Advance]:
    """Yield a function that counts finished units.

    Args:
        title: what is being done, such as `training`.
        total: total number of units.
        unit: plural name of the unit, such as `images`.
        done: number of units that an earlier, interrupted run finished.
        show: false on processes that print nothing (ranks other than 0).
    """
    if not (show and sys.stderr.isatty()):
        with _lines(title, total, unit, done, show) as count:
            yield count
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, completed=done, note="")
        yield lambda count=1, note="": bars.update(task, advance=count, **({"note": note} if note else {}))


@contextmanager
def _lines(title: str, total: int, unit: str, done: int, show: bool) -> Iterator[Advance]:
    """Yield a function that counts finished units, and prints a line now and then: a log is not silent for hours."""
    start = shown = time.monotonic()
    counted = 0

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal counted, shown
        counted += count
        if show and count and time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            say(f"{title}: {done + counted} of {total} {unit}{note and f', {note}'}")

    yield advance
    seconds = time.monotonic() - start
    if show:
        say(f"{title}: {counted} {unit} in {seconds:.1f} s ({_rate(counted / max(seconds, 1e-9), unit)})")


def _rate(speed: float, unit: str) -> str:
    """Return units per second in words; slow ones the other way round."""
    return f"{speed:.1f} {unit}/s" if speed >= 0.1 or speed == 0 else f"{1 / speed:.0f} s each"
