"""The page of a sweep, `sweep.html`, and what it says of differences to real images, variant by variant.

No metric is known here by its name: the forest plots are those that each answer's verdict is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from maskloom.pipeline.files.formatting import MISSING, markdown_table, number_text
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.report.forest import figures_text
from maskloom.pipeline.report.page import template_environment
from maskloom.pipeline.results import Evaluation, Forest, Table
from maskloom.pipeline.sweep.table import NOTE, Row, columns_of, row_names

PAGE = "sweep.html"
COLUMNS = ["arm", "difference", "finding", "smallest effect", "rests on"]


def merged_forests(answers: Mapping[str, Sequence[Evaluation]]) -> list[Forest]:
    """Return the forest plots that verdicts are about, each with the rows of all variants.

    Args:
        answers: by variant; the empty name stands for a sweep of one run, whose rows keep their groups.
    """
    merged: dict[tuple[str, str], Forest] = {}
    for variant, found in answers.items():
        for one in found:
            for forest in (forest for forest in one.forests if forest.primary):
                rows = [row.model_copy(update={"group": variant or row.group}) for row in forest.rows]
                known = merged.setdefault((one.metric, forest.title), forest.model_copy(update={"rows": []}))
                known.rows.extend(rows)
    return list(merged.values())


def selection_warning(forest: Forest) -> str:
    """Return what the number of compared differences does to the largest; empty for a single one."""
    compared = sum(not row.reference for row in forest.rows)
    if compared < 2:
        return ""
    return (
        f"{compared} differences are compared here. The largest of so many is too good by chance (winner's curse): its "
        "true effect is likely to be smaller, and its interval does not allow for the choice. Findings are adjusted for "
        "the arms of one variant (Holm), not for the number of variants. Confirm a choice on test groups that had no "
        "part in it."
    )


def difference_table(forest: Forest) -> Table:
    """Return the rows of a forest plot as a table, what chance alone makes included."""
    return Table(
        title="",
        columns=COLUMNS,
        rows=[
            [
                row.name,
                figures_text(row),
                row.finding,
                MISSING if row.smallest is None else number_text(row.smallest),
                row.basis,
            ]
            for row in forest.rows
        ],
        groups=[row.group for row in forest.rows] if all(row.group for row in forest.rows) else [],
    )


def difference_lines(forest: Forest) -> list[str]:
    """Return a forest plot as a section of `table.md`."""
    lines = [[row.group, *cells] for row, cells in zip(forest.rows, difference_table(forest).rows, strict=True)]
    return [f"## {forest.title}", "", *markdown_table(["", *COLUMNS], lines), "", selection_warning(forest), ""]


def write_page(
    folder: Path, title: str, rows: Sequence[Row], forests: Sequence[Forest], failed: Mapping[str, str]
) -> None:
    """Write `sweep.html`: the differences to real images first, then the figures of every generator.

    Args:
        folder: the sweep's.
        title: the experiment's name.
        rows: of all variants.
        forests: see `merged_forests`.
        failed: name of a failed variant -> stage at which it failed.
    """
    columns = columns_of(rows)
    figures = Table(
        title="",
        note=NOTE,
        columns=["generator", *(f"{column.group}: {column.head}".replace("_", " ") for column in columns)],
        rows=[[row.of, *(row.cells.get(column) for column in columns)] for row in rows],
        groups=row_names(rows),
    )
    page = template_environment().get_template("sweep.html.j2")
    sections = [(forest, selection_warning(forest), difference_table(forest)) for forest in forests]
    text = page.render(title=title, sections=sections, figures=figures, failed=failed)
    OwnedFolder(folder).write_text(PAGE, text)
