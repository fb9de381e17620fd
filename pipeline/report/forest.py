"""Forest plots as SVG: differences with their intervals around zero."""

import io

from maskloom.pipeline.files.formatting import interval_text
from maskloom.pipeline.report.curves import COLOURS, STYLE, plain_text
from maskloom.pipeline.results import Forest, ForestRow

WIDTH_INCHES = 4.4  # small enough for its text to be readable at 400 px
ROW_INCHES = 0.46
MARGIN_INCHES = 0.75
CHANCE_COLOUR = "#6b6b6b"
MARK_COLOUR = "#b0922b"


def forest_plot(forest: Forest) -> str:
    """Return a forest plot as SVG text; the same forest gives the same text.

    Each row has its name and its figures above its interval. A row that shows what chance alone
    makes is grey. Small triangles mark the smallest true effect that would be found.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        height = MARGIN_INCHES + ROW_INCHES * len(forest.rows)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="#444444", linewidth=0.8)
        for place, row in enumerate(forest.rows):
            colour = CHANCE_COLOUR if row.reference else COLOURS[0]
            if row.smallest is not None:
                ends = [-row.smallest, row.smallest]
                axes.plot(ends, [place, place], "|", color=MARK_COLOUR, markersize=11, markeredgewidth=1.6)
            if row.value is not None:
                if row.low is not None and row.high is not None:
                    axes.plot([row.low, row.high], [place, place], color=colour, linewidth=1.6)
                axes.plot([row.value], [place], "D" if row.reference else "s", color=colour, markersize=5)
            label = f"{row.name}: {figures_text(row)}"
            axes.text(
                0,
                place - 0.3,
                plain_text(label),
                transform=axes.get_yaxis_transform(),
                fontsize=8.5,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.set_ylim(len(forest.rows) - 0.5, -0.85)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.08)
        axes.set_xlabel(plain_text(forest.x_label))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


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
