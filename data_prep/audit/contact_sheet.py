"""A contact sheet of a dataset: an HTML page of sample images with mask outlines, by class.

The page is self-contained (images are data URIs, no network, no scripts) and limited to
`MOST_IMAGES` images of `SIDE` pixels.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from maskloom.data_prep.audit.index import AuditIndex
from maskloom.pipeline.dataset.contract import Description, split_order
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.masks import resize_mask

Pixels = NDArray[np.uint8]

TEMPLATE = "contact_sheet.html.j2"
SIDE = 192  # pixels of a picture's longer side
MOST_IMAGES = 480
LONGEST_TEXT = 300  # characters of a prompt
JPEG_QUALITY = 88
NO_CLASS = "no class"


@dataclass(frozen=True)
class Figure:
    """A figure of the sheet: image and outlines as data URIs, and its caption."""

    image: str
    outlines: str | None
    width: int
    height: int
    sample_id: str
    group_id: str
    split: str
    text: str


@dataclass(frozen=True)
class Section:
    """The figures of one class, with its number of rows and groups."""

    name: str
    rows: int
    groups: int
    figures: list[Figure]


def contact_sheet_page(dataset: MaskPromptDataset, index: AuditIndex, per_class: int) -> str:
    """Return the page.

    Args:
        dataset: what is shown.
        index: of the dataset, as its number 0.
        per_class: images of each class; fewer where all classes together would exceed
            `MOST_IMAGES`.
    """
    about, contract = dataset.description, dataset.contract
    counts = _class_counts(index, about.labels)
    shown = dict(list(counts.items())[:MOST_IMAGES])
    each = max(1, min(per_class, MOST_IMAGES // max(1, len(shown))))
    chosen = {label: spread_samples(index, label, each) for label in shown}
    figures = _figures(dataset, [sample for samples in chosen.values() for sample in samples])
    sections = [
        Section(NO_CLASS if label is None else label, *shown[label], [figures[sample] for sample in samples])
        for label, samples in chosen.items()
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(TEMPLATE).render(
        about=about,
        sections=sections,
        legend=list(zip(about.mask_classes, about.palette, strict=True))[1:],
        splits={split: contract.splits[split].rows for split in contract.split_names},
        rows=sum(rows for rows, _ in counts.values()),
        images=len(figures),
        side=SIDE,
        height=max((figure.height for figure in figures.values()), default=SIDE),
        left_out=len(counts) - len(shown),
    )


def spread_samples(index: AuditIndex, label: str | None, count: int) -> list[str]:
    """Return the ids of `count` images of a class, evenly spread over splits and groups.

    The first image of each group comes first: images of a group (patient, volume, near-duplicates)
    are often similar. All images are returned if there are fewer.
    """
    firsts, rows = index.rows.execute(
        "SELECT COUNT(DISTINCT grp), COUNT(*) FROM images WHERE dataset = 0 AND label IS ?", (label,)
    ).fetchone()
    places = _spread(0, firsts, count) + _spread(firsts, rows, count - firsts)
    ranked = (
        "WITH ranked AS (SELECT sample, split, grp, ROW_NUMBER() OVER (PARTITION BY grp ORDER BY sample) > 1 AS further"
        " FROM images WHERE dataset = 0 AND label IS ?),"
        " placed AS (SELECT sample, split, ROW_NUMBER() OVER (ORDER BY further, split, grp, sample) - 1 AS place FROM ranked)"
        f" SELECT split, sample FROM placed WHERE place IN ({', '.join('?' * len(places))})"
    )
    found = index.rows.execute(ranked, (label, *places)).fetchall()
    return [sample for _, sample in sorted(found, key=lambda row: (split_order(row[0]), row[1]))]


def outlines(mask: Pixels, palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Return a transparent PNG with the inner outlines of the foreground classes.

    Args:
        mask: (H, W) class indices.
        palette: RGB colour of each index.
    """
    from scipy.ndimage import binary_erosion

    drawn = np.zeros_like(mask)
    for value in np.unique(mask[mask > 0]):
        region = mask == value
        drawn[region & ~binary_erosion(region, np.ones((3, 3)), border_value=0)] = value
    image = Image.fromarray(drawn, mode="P")
    image.putpalette([level for colour in palette for level in colour])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", transparency=0, optimize=True)
    return buffer.getvalue()


def _class_counts(index: AuditIndex, labels: Sequence[str]) -> dict[str | None, tuple[int, int]]:
    """Return (rows, groups) of each class that occurs, in the contract's order; rows without a
    class last.
    """
    query = "SELECT label, COUNT(*), COUNT(DISTINCT grp) FROM images WHERE dataset = 0 GROUP BY label"
    counts = {label: (rows, groups) for label, rows, groups in index.rows.execute(query)}
    return {label: counts[label] for label in (*labels, None) if label in counts}


def _figures(dataset: MaskPromptDataset, samples: Iterable[str]) -> dict[str, Figure]:
    """Return the figures of some samples by id, read in one pass."""
    wanted = set(samples)
    columns = ["sample_id", "group_id", "text", "image", "mask"]
    return {
        row["sample_id"]: _figure(split, row, dataset.description)
        for split in dataset.contract.split_names
        for row in dataset.rows(split, columns)
        if row["sample_id"] in wanted
    }


def _figure(split: str, row: Mapping[str, Any], about: Description) -> Figure:
    image = Image.fromarray(png_array(row["image"]["bytes"]))
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    drawn = None
    if row["mask"] is not None:
        mask = resize_mask(png_array(row["mask"]["bytes"]), size[::-1]).mask
        if mask.any():
            drawn = _uri("png", outlines(mask, about.palette))
    text = row["text"]
    return Figure(
        image=_uri("jpeg", _jpeg(image.resize(size, Image.Resampling.LANCZOS))),
        outlines=drawn,
        width=size[0],
        height=size[1],
        sample_id=row["sample_id"],
        group_id=row["group_id"],
        split=split,
        text=text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…",
    )


def _spread(start: int, stop: int, count: int) -> list[int]:
    """Return `count` whole numbers (or all) from `start` to `stop - 1`, evenly spaced."""
    number = min(count, stop - start)
    return [] if number <= 0 else np.linspace(start, stop - 1, number).round().astype(int).tolist()


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
