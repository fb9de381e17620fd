"""Progress of long steps: a bar with rate and time left on a terminal, one closing line elsewhere."""

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
    """Counts finished units; `note` replaces the text after the bar."""

    def __call__(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as finished."""


class _RateColumn(ProgressColumn):
    """Units a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f} {self.unit}/s")


def say(text: str) -> None:
    """Print one line of news to stderr (stdout belongs to results)."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0, show: bool = True) -> Iterator[Advance]:
    """Yield a function that counts finished units.

    Args:
        title: what is being done, such as `training`.
        total: number of units in all.
        unit: the unit's plural, such as `images`.
        done: units that an earlier, interrupted run finished.
        show: false on the processes that should stay silent (ranks other than 0).
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
