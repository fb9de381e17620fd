"""Prints aligned plain text."""

from collections import Counter
from collections.abc import Sequence
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskloom.data_prep.readers.file_names import printable

WIDTH = 100  # upper limit, and the width if the output is not a terminal
MOST_COUNTED = 12


class Page:
    """Prints titles, sections, aligned facts, lines, commands; flushes at the end of a `with`."""

    def __init__(self) -> None:
        console = Console(highlight=False, markup=False, emoji=False)
        width = min(WIDTH, console.width) if console.is_terminal else WIDTH
        self._console = Console(highlight=False, markup=False, emoji=False, width=width)
        self._facts: list[tuple[str, str]] = []

    def __enter__(self) -> "Page":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def title(self, text: str) -> None:
        """Print a title, with an empty line before it."""
        self._flush()
        self._console.print()
        self._console.print(Text(printable(text), style="bold"), soft_wrap=True)

    def section(self, text: str) -> None:
        """Print the heading of what follows."""
        self.title(text)

    def fact(self, name: str, value: str) -> None:
        """Print a name and its value, aligned with the previous facts."""
        self._facts.append((printable(name), printable(value)))

    def line(self, text: str) -> None:
        """Print one indented paragraph."""
        self._row((" ", printable(text)))

    def bullet(self, text: str) -> None:
        """Print one list item."""
        self._row(("  -", printable(text)))

    def command(self, text: str) -> None:
        """Print a command line without line breaks, for copying."""
        self._flush()
        self._console.print(Text(f"  {printable(text)}"), soft_wrap=True)

    def block(self, text: str) -> None:
        """Print lines unchanged, for copying."""
        self._flush()
        self._console.print(Text(text), soft_wrap=True)

    def _row(self, cells: tuple[str, str]) -> None:
        self._flush()
        table = Table.grid(padding=(0, 1))
        table.add_row(*map(Text, cells))
        self._print(table)

    def _flush(self) -> None:
        if not self._facts:
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=0)
        table.add_column(max_width=WIDTH // 3, overflow="fold")
        table.add_column(overflow="fold")
        for name, value in self._facts:
            table.add_row("", Text(name), Text(value))
        self._print(table)
        self._facts.clear()

    def _print(self, table: Table) -> None:
        """Print a table without the trailing spaces of rich."""
        with self._console.capture() as captured:
            self._console.print(table)
        self._console.out("\n".join(line.rstrip() for line in captured.get().splitlines()))


def counted(counts: Counter[str]) -> str:
    """Return counts as text, most frequent first: `benign 12, malignant 3`."""
    shown = [f"{name} {count}" for name, count in counts.most_common(MOST_COUNTED)]
    more = f" and {len(counts) - MOST_COUNTED} more" if len(counts) > MOST_COUNTED else ""
    return ", ".join(shown) + more


def quantiles(values: Sequence[float]) -> str:
    """Return a range as text: `2 to 40, median 7`, or `7` for equal values."""
    low, median, high = np.quantile(values, (0, 0.5, 1))
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}, median {median:.3g}"


def share(part: float) -> str:
    """Return a fraction in per cent, with more digits for small ones."""
    return f"{part:.2%}" if 0 < part < 0.01 else f"{part:.1%}"
