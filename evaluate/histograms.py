"""Small histograms for the report."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.report.curves import COLOURS, STYLE, plain_text

COLUMNS = 3
PANEL_INCHES = (2.1, 1.25)
LEGEND_INCHES = 0.3
DOTS_PER_INCH = 150
BINS = 16


def histogram_grid(panels: Mapping[str, Mapping[str, NDArray[np.floating]]]) -> NDArray[np.uint8]:
    """Return one small histogram per panel, (H, W, 3) uint8, three beside each other.

    All sets of a panel have the same bins; heights are shares of a set, so that sets of different
    sizes can be compared.

    Args:
        panels: title of each panel -> name of each set -> its values, (N,).
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    size = (COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1] + LEGEND_INCHES)
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "font.size": 7}):
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for number, (title, sets) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, COLUMNS, number + 1)
            edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), BINS)
            for place, (name, values) in enumerate(sets.items()):
                shares = np.histogram(values, edges)[0] / len(values)
                axes.stairs(shares, edges, color=COLOURS[place % len(COLOURS)], label=plain_text(name), linewidth=1.1)
            axes.set_title(plain_text(title), fontsize=7)
            axes.set_yticks([])
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=7)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
