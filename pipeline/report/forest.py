"""Forest plots as SVG: differences with their intervals around zero."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from maskloom.pipeline.files.formatting import interval_text
from maskloom.pipeline.report.curves import COLOURS, STYLE, plain_text
from maskloom.pipeline.results import Forest, ForestRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES = 4.4  # small enough for its text to be readable at 400 px
LINE_INCHES, INTERVAL_INCHES, GAP_INCHES, AXIS_INCHES = 0.17, 0.29, 0.09, 0.6  # heights
LETTERS = 56  # per line of text in the plot
CHANCE_COLOUR = "#6b6b6b"
MARK_COLOUR = "#b0922b"
HEADING_COLOUR = "#1d2329"


def forest_plot(forest: Forest) -> str:
    """Return a forest plot as SVG text; the same forest gives the same text.

    Each row has its name and its figures above its interval, and each group of rows a heading. A row
    that shows what chance alone makes is grey. Small upright marks show the smallest true effect that
    would be found.
    """
    import matplotlib
    from matplotlib.figure import Figure

    labels = [wrap(f"{row.name}: {figures_text(row)}", LETTERS) for row in forest.rows]
    headings = [
        wrap(row.group, LETTERS - 8) if number == 0 or row.group != forest.rows[number - 1].group else []
        for number, row in enumerate(forest.rows)
    ]
    height = sum(LINE_INCHES * len(lines) + INTERVAL_INCHES for lines in labels)
    height += sum(LINE_INCHES * len(lines) + GAP_INCHES for lines in headings if lines)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH_INCHES, height + AXIS_INCHES), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="#444444", linewidth=0.8)
        top = 0.0
        for row, lines, heading in zip(forest.rows, labels, headings, strict=True):
            if heading:
                _write(axes, top, heading, HEADING_COLOUR, fontweight="bold")
                top += LINE_INCHES * len(heading) + GAP_INCHES
            _write(axes, top, lines, CHANCE_COLOUR if row.reference else COLOURS[0])
            top += LINE_INCHES * len(lines) + INTERVAL_INCHES
            _draw_interval(axes, row, top - INTERVAL_INCHES / 2)
        axes.set_ylim(height, 0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.08)
        axes.set_xlabel(plain_text("\n".join(wrap(forest.x_label, LETTERS))))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _write(axes: Axes, top: float, lines: Sequence[str], colour: str, **style: Any) -> None:
    """Write lines of text from the left edge down, on white, so that the line at zero does not cross them."""
    for number, line in enumerate(lines):
        axes.text(
            0,
            top + LINE_INCHES * (number + 0.5),
            plain_text(line),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            **style,
        )


def _draw_interval(axes: Axes, row: ForestRow, place: float) -> None:
    colour = CHANCE_COLOUR if row.reference else COLOURS[0]
    if row.smallest is not None:
        ends = [-row.smallest, row.smallest]
        axes.plot(ends, [place, place], "|", color=MARK_COLOUR, markersize=11, markeredgewidth=1.6)
    if row.value is None:
        return
    if row.low is not None and row.high is not None:
        axes.plot([row.low, row.high], [place, place], color=colour, linewidth=1.6)
    axes.plot([row.value], [place], "D" if row.reference else "s", color=colour, markersize=5)


def forest_description(forest: Forest) -> str:
    """Return the content of a forest plot in words, for those who cannot see it."""
    rows = []
    for row in forest.rows:
        found = "" if row.smallest is None else f", smallest effect found {row.smallest:.3f}"
        rows.append(f"{row.name} {figures_text(row)}, {row.finding} ({row.basis}{found})")
    return f"forest plot: {forest.title}. " + "; ".join(rows) + "."


def figures_text(row: ForestRow) -> str:
    """Return the difference with its interval."""
    if row.value is None:
        return "not defined"
    sign = "+" if row.value > 0 else ""
    return sign + interval_text(row.value, row.low, row.high) + ("" if row.low is not None else " [no interval]")
