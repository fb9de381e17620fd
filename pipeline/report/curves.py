"""Training curves and other line charts as SVG."""

import io
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskloom.pipeline.files.formatting import number_text
from maskloom.pipeline.results import Curve
from maskloom.pipeline.runs.training_log import readable_metrics

POINTS = 200  # longer series are averaged down to at most this many points
SIZE_INCHES = (4.6, 2.8)  # small enough for its text to be readable at 400 px
COLOURS = ("#1b5e9b", "#c25a1c", "#2f7d4f", "#8a3d8f", "#6b6b6b", "#b0922b", "#3aa0a8", "#a33a4a")
LINES = ("-", "--", ":", "-.")  # further series repeat the colours
LEGEND_INCHES = 0.18  # height of a line of the legend
LETTERS = 40  # longer names are cut
STYLE: Any = {
    "svg.hashsalt": "maskloom",  # keeps the ids in the drawing the same every time
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "axes.unicode_minus": True,
}


def line_chart(curve: Curve) -> str:
    """Return a line chart as SVG text; the same curve gives the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        (width, height), lines = SIZE_INCHES, len(curve.series) if len(curve.series) > 1 else 0
        figure = Figure(figsize=(width, height + LEGEND_INCHES * lines), layout="constrained")
        axes = figure.add_subplot()
        for index, (name, points) in enumerate(curve.series.items()):
            xs, ys = [x for x, _ in points], [math.nan if y is None else y for _, y in points]
            marker = "o" if len(points) <= POINTS // 10 else ""
            axes.plot(
                xs,
                ys,
                label=plain_text(shortened(name)),
                color=COLOURS[index % len(COLOURS)],
                linestyle=LINES[index // len(COLOURS) % len(LINES)],
                linewidth=1.5,
                marker=marker,
                markersize=3,
            )
            _draw_intervals(axes, xs, curve.intervals.get(name, []), COLOURS[index % len(COLOURS)])
        axes.set_xlabel(plain_text(shortened(curve.x_label)))
        axes.set_ylabel(plain_text(shortened(curve.y_label)))
        if lines:
            figure.legend(fontsize=8, loc="outside lower left")  # in the chart it may hide a line
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw_intervals(
    axes: Any, xs: Sequence[float], ends: Sequence[tuple[float | None, float | None]], colour: str
) -> None:
    """Draw a vertical line for each interval."""
    for x, (low, high) in zip(xs, ends, strict=False):
        if low is not None and high is not None:
            axes.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.6)


def curve_description(curve: Curve) -> str:
    """Return the content of a line chart in words, for those who cannot see it: where each line starts and ends."""
    lines = []
    for name, points in curve.series.items():
        known = [f"{number_text(y)} at {x:g}" for x, y in points if y is not None]
        lines.append(f"{name}: from {known[0]} to {known[-1]}" if known else f"{name}: no values")
    return f"line chart: {curve.title}. " + "; ".join(lines) + "."


def training_curves(path: Path) -> tuple[list[Curve], int]:
    """Return charts of every scalar in a `metrics.jsonl`, and the number of unreadable lines.

    Series of one kind share a chart: `loss` and `validation/loss`; `validation/loss_bin_0`,
    `validation/loss_bin_1`, …; a figure and its reference values, such as `adherence`,
    `adherence_shuffled` and `adherence_real`; the gradients of all networks. The losses of several
    networks differ in scale and get one chart each; the loss of a single network is the `loss`.
    """
    charts: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    lines, unreadable = readable_metrics(path)
    series = _series(lines)
    parts = {key for key in series if key.startswith("loss/")}
    for key in sorted(series.keys() - (parts if len(parts) == 1 else set())):
        charts.setdefault(_chart_title(key), {})[key] = averaged(sorted(series[key].items()))
    return [Curve(title=name, x_label="step", series=lines) for name, lines in charts.items()], unreadable


def _chart_title(key: str) -> str:
    kind, _, rest = key.partition("/")
    if kind == "loss" and rest:
        title = f"loss of {rest}"
    else:
        title = re.sub(r"_(\d+|shuffled|real|followed|ignored)$", "", rest if kind == "validation" else kind)
    return title.replace("_", " ")


def averaged(points: Iterable[tuple[float, float]]) -> list[tuple[float, float | None]]:
    """Return the points, or the means of consecutive points if there are more than `POINTS`."""
    kept = list(points)
    run = -(-len(kept) // POINTS)
    groups = [kept[start : start + run] for start in range(0, len(kept), run)] if kept else []
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _series(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """Return step -> value for every finite number.

    A step that was logged twice, by a resumed training, keeps the later value.
    """
    series: dict[str, dict[float, float]] = {}
    for line in lines:
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float) and abs(value) <= sys.float_info.max:
                series.setdefault(key, {})[line["step"]] = float(value)
    return series


def shortened(text: str) -> str:
    """Return a text of at most `LETTERS` letters, and an ellipsis where more were cut."""
    return text if len(text) <= LETTERS else f"{text[:LETTERS]}…"


def plain_text(text: str) -> str:
    """Return text that matplotlib does not interpret as mathematics or as a hidden legend entry."""
    return text.replace("$", r"\$").lstrip("_")
