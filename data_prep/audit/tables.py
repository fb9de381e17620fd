"""Prints an audit as tables."""

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from maskloom.data_prep.audit.audit import SIGNIFICANT, Audit, RegionSizes, SplitContent
from maskloom.pipeline.dataset.audit.findings import Finding
from maskloom.pipeline.progress import table_console

SHOWN_FINDINGS, SHOWN_REGIONS, SHOWN_TEXT = 20, 60, 90
TITLES = {
    "splits": "The same picture in two splits",
    "datasets": "The same picture in both datasets",
    "labels": "The same picture with different labels",
    "masks": "Identical images with different masks",
}


def print_audit(audit: Audit) -> None:
    """Print all non-empty tables."""
    console = table_console()
    numbers = {dataset: f" [{number}]" for number, dataset in enumerate(audit.datasets)} if audit.datasets[1:] else {}
    for dataset, number in numbers.items():
        console.print(Text(f"{number.strip()} {dataset}"))
    for dataset in audit.datasets:
        contents = [content for content in audit.splits if content.dataset == dataset]
        console.print(_splits_table(f"Splits{numbers.get(dataset, '')}", contents))
        if any(content.labels for content in contents):
            console.print(_labels_table(f"Classes{numbers.get(dataset, '')}", contents))
    if audit.shifts:
        console.print(_shifts_table(audit))
    if regions := [one for one in audit.regions if one.dataset == audit.datasets[0]]:
        console.print(_regions_table(regions))
    for problem, title in TITLES.items():
        found = [finding for finding in audit.findings if finding.problem == problem]
        if found:
            console.print(_findings_table(title, found, sum(audit.counts[problem].values()), numbers))
    for note in audit.notes:
        console.print(Text(note))
    console.print(Text(f"duplicates and conflicts: {_verdict(audit)}"))


def _verdict(audit: Audit) -> str:
    total = sum(sum(kinds.values()) for kinds in audit.counts.values())
    if not total:
        return "none found"
    return f"{audit.failed} failed, {total - audit.failed} to look at"


def _splits_table(title: str, contents: Sequence[SplitContent]) -> Table:
    rows = (
        [
            one.split,
            f"{one.rows:,}",
            f"{one.groups:,}",
            f"{one.masks:,}",
            _share(one.empty_masks, one.masks),
            f"{one.flat_images:,}",
            f"{one.grey_mean:.1f} ± {one.grey_spread:.1f}",
            f"{one.grey_std:.1f}",
            f"{100 * one.texts / one.rows:.0f} %",
            f"{len(one.longest_text)} characters",
        ]
        for one in contents
    )
    columns = ["split", "rows", "groups", "masks", "empty masks", "flat images", "grey level", "contrast", "distinct prompts",
               "longest prompt"]  # fmt: skip
    return _table(title, columns, rows, left={0})


def _labels_table(title: str, contents: Sequence[SplitContent]) -> Table:
    names = list(dict.fromkeys(name for one in contents for name in one.labels))
    rows = (
        [
            one.split,
            *(f"{one.labels.get(name, 0):,} ({_share(one.labels.get(name, 0), one.rows)})" for name in names),
            f"{one.rows - sum(one.labels.values()):,}",
        ]
        for one in contents
    )
    return _table(title, ["split", *names, "no class"], rows, left={0})


def _shifts_table(audit: Audit) -> Table:
    rows = (
        [
            one.split,
            one.label,
            f"{100 * one.share:.1f} %",
            f"{100 * one.train_share:.1f} %",
            f"{one.p_value:.3g}",
            "differs" if one.differs else "",
        ]
        for one in audit.shifts
    )
    title = f"Classes against those of train (chi-square test; differs: p below {SIGNIFICANT})"
    return _table(title, ["split", "largest difference", "share", "in train", "p", ""], rows, left={0, 1, 5})


def _regions_table(regions: Sequence[RegionSizes]) -> Table:
    rows = (
        [
            one.label or "-",
            one.mask_class,
            one.split,
            _share(one.masks - one.present, one.masks),
            *(f"{100 * share:.2f} %" for share in (one.smallest, one.p5, one.median, one.p95, one.largest)),
            f"{one.components_median:g}",
            str(one.components_most),
        ]
        for one in regions[:SHOWN_REGIONS]
    )
    columns = [
        "class",
        "region",
        "split",
        "without it",
        "smallest",
        "5 %",
        "median",
        "95 %",
        "largest",
        "components",
        "most",
    ]
    title = "Mask regions: share of the area where the region occurs; connected components"
    return _table(title, columns, rows, left={0, 1, 2}, more=len(regions) - SHOWN_REGIONS)


def _findings_table(title: str, found: Sequence[Finding], total: int, numbers: Mapping[str, str]) -> Table:
    rows = (
        [
            "fails" if one.fails else "look",
            one.likeness,
            f"{one.correlation:.3f}",
            str(one.images),
            *(
                cell
                for place in (one.first, one.second)
                for cell in (
                    place.sample_id,
                    place.split + numbers.get(place.dataset, ""),
                    place.group_id,
                    place.label or "-",
                )
            ),
        ]
        for one in found[:SHOWN_FINDINGS]
    )
    place = ["image", "split", "group", "class"]
    columns = ["", "likeness", "correlation", "images alike", *place, *place]
    return _table(title, columns, rows, left={0, 1, *range(4, 12)}, more=total - SHOWN_FINDINGS)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: set[int], more: int = 0) -> Table:
    """Return a table; text from the dataset is never interpreted as markup or control codes."""
    caption = f"and {more} more; --json FILE lists up to 1000 of each kind" if more > 0 else None
    table = Table(
        title=_plain(title), caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    for number, column in enumerate(columns):
        table.add_column(_plain(column), justify="left" if number in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_plain, row))
    return table


def _plain(text: str) -> Text:
    shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return Text(shown if len(shown) <= SHOWN_TEXT else f"{shown[:SHOWN_TEXT]}…")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
