"""The near-duplicate groups of BUSI: their number, a check, and sample sheets for inspection.

    python -m benchmarks.near_duplicates RAW_BUSI [--sheet sheet.png --groups 40 --seed 0]

The check is independent of `pipeline.dataset.near_duplicates`: every pair of raw images whose
64 x 64 reductions (Pillow, four filters) correlate above 0.98 must lie in one group. The sheets
show the raw images of sampled groups side by side.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from maskloom.data_prep.adapter import RawItem
from maskloom.data_prep.datasets.busi import Adapter, BusiOptions
from maskloom.pipeline.dataset.near_duplicates.search import CORRELATION, near_duplicate_clusters, signature

FILTERS = (Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
PLAIN_SIDE, PLAIN_CORRELATION = 64, 0.98
GROUPS_PER_PAGE = 8
HEIGHT, CAPTION = 230, 18  # heights in pixels of an image and of the text above it


def main(
    raw: Annotated[Path, typer.Argument(help="folder of the raw dataset BUSI")],
    sheet: Annotated[Path | None, typer.Option(help="PNG file; its pages are numbered: sheet-1.png, …")] = None,
    groups: Annotated[int, typer.Option(min=1, help="number of groups on the sheet")] = 40,
    seed: Annotated[int, typer.Option(help="seed of the sample")] = 0,
    correlation: Annotated[
        float | None, typer.Option(help="threshold from which images are joined; default: calibrated, as prepare does")
    ] = None,
) -> None:
    """Group the raw images, check the groups, and draw a sample of them."""
    items = [entry for entry in Adapter(raw, BusiOptions()).scan() if isinstance(entry, RawItem)]
    start = time.perf_counter()
    clusters = found_clusters(items, correlation)
    seconds = time.perf_counter() - start
    members: dict[int, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    several = [group for group in members.values() if len(group) > 1]
    console = Console()
    console.print(groups_table(items, several, correlation, seconds))
    console.print(plain_table(items, clusters))
    if sheet:
        chosen = np.random.default_rng(seed).permutation(len(several))[:groups]
        for path in drawn_pages(items, [several[number] for number in sorted(chosen)], sheet):
            console.print(f"written: {path}", soft_wrap=True)


def found_clusters(items: Sequence[RawItem], correlation: float | None) -> list[int]:
    """Return the near-duplicate cluster of each image, as `prepare` finds it.

    Byte-identical files are compared like any others.
    """
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "signatures.bin"
        with path.open("wb") as file:
            for item in items:
                file.write(signature(np.asarray(grey_image(item), dtype=np.float32) / np.float32(255)))
        return near_duplicate_clusters(path, [item.sample_id for item in items], correlation)


def plain_pairs(items: Sequence[RawItem], filter_: Image.Resampling) -> list[tuple[int, int]]:
    """Return the pairs of images whose reductions to 64 x 64 correlate above 0.98."""
    small = [grey_image(item).resize((PLAIN_SIDE, PLAIN_SIDE), filter_) for item in items]
    correlations = np.corrcoef(np.stack([np.asarray(one, dtype=np.float64).ravel() for one in small]))
    return [(int(i), int(j)) for i, j in np.argwhere(np.triu(correlations > PLAIN_CORRELATION, k=1))]


def groups_table(
    items: Sequence[RawItem], several: Sequence[Sequence[int]], correlation: float | None, seconds: float
) -> Table:
    """Return the table of groups."""
    mixed = [group for group in several if len({items[index].label for index in group}) > 1]
    table = Table(
        title=f"near-duplicate groups of {len(items)} images, aligned correlation from {correlation or CORRELATION}"
    )
    for column in ("groups", "images in them", "largest", "with several labels", "seconds"):
        table.add_column(column, justify="right")
    sizes = [len(group) for group in several]
    table.add_row(
        *map(str, (len(several), sum(sizes), max(sizes, default=0), len(mixed))), f"{seconds:.1f} (with decoding)"
    )
    return table


def plain_table(items: Sequence[RawItem], clusters: Sequence[int]) -> Table:
    """Return the table of the check against plain correlation."""
    table = Table(title=f"pairs with plain {PLAIN_SIDE} x {PLAIN_SIDE} correlation above {PLAIN_CORRELATION}")
    for column in ("filter", "pairs", "images in them", "pairs not in one group"):
        table.add_column(column, justify="left" if column == "filter" else "right")
    for filter_ in FILTERS:
        pairs = plain_pairs(items, filter_)
        missed = [(i, j) for i, j in pairs if clusters[i] != clusters[j]]
        names = ", ".join(f"{items[i].sample_id} / {items[j].sample_id}" for i, j in missed)
        images = {index for pair in pairs for index in pair}
        table.add_row(filter_.name.lower(), str(len(pairs)), str(len(images)), f"{len(missed)} {names}".strip())
    return table


def drawn_pages(items: Sequence[RawItem], groups: Sequence[Sequence[int]], sheet: Path) -> list[Path]:
    """Draw the groups, one per row, and return the pages' paths."""
    sheet.parent.mkdir(parents=True, exist_ok=True)
    pages = [groups[start : start + GROUPS_PER_PAGE] for start in range(0, len(groups), GROUPS_PER_PAGE)]
    paths = []
    for number, page in enumerate(pages):
        rows = [
            drawn_group(items, group, number * GROUPS_PER_PAGE + place) for place, group in enumerate(page, start=1)
        ]
        whole = np.zeros((sum(len(row) for row in rows), max(row.shape[1] for row in rows)), dtype=np.uint8)
        top = 0
        for row in rows:
            whole[top : top + len(row), : row.shape[1]] = row
            top += len(row)
        paths.append(sheet.with_name(f"{sheet.stem}-{number + 1}.png"))
        Image.fromarray(whole).save(paths[-1])
    return paths


def drawn_group(items: Sequence[RawItem], group: Sequence[int], number: int) -> NDArray[np.uint8]:
    """Return the images of a group side by side with their ids above, (height, width) uint8."""
    images = [grey_image(items[index]) for index in group]
    scaled = [image.resize((round(image.width * HEIGHT / image.height), HEIGHT)) for image in images]
    row = Image.new("L", (sum(image.width + 6 for image in scaled), HEIGHT + CAPTION), 40)
    pen = ImageDraw.Draw(row)
    left = 0
    for place, (index, image) in enumerate(zip(group, scaled, strict=True)):
        row.paste(image, (left, CAPTION))
        pen.text((left + 2, 3), f"{f'#{number}  ' if place == 0 else ''}{items[index].sample_id}", fill=255)
        left += image.width + 6
    return np.asarray(row)


def grey_image(item: RawItem) -> Image.Image:
    """Return the raw image in mode L."""
    with Image.open(item.path) as image:
        return image.convert("L")


if __name__ == "__main__":
    typer.run(main)
