"""Show progress: a bar with rate and remaining time on a terminal, otherwise one summary line."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)


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
        return Text(f"{task.finished_speed or task.speed or 0:.1f} {self.unit}/s")


def say(text: str) -> None:
    """Print a status message to stderr; stdout is for results."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


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
    start = time.monotonic()
    if not (show and sys.stderr.isatty()):
        counted = 0

        def count_only(count: int = 1, note: str = "") -> None:
            nonlocal counted
            counted += count

        yield count_only
        seconds = time.monotonic() - start
        if show:
            say(f"{title}: {counted} {unit} in {seconds:.1f} s ({counted / max(seconds, 1e-9):.1f} {unit}/s)")
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
