"""On-disk index of prepared datasets for the audit: ids, digests, mask measurements, signatures.

One pass writes the rows to an SQLite file, so that duplicates, quantiles and counts are queries,
and memory holds only a batch of images. For the near-duplicate search, two files receive one record
per image: the signatures of `near_duplicates` (86 kB each) and plain 64 x 64 thumbnails.
"""

import sqlite3
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from maskloom.pipeline.dataset.audit.pixels import Pixels, is_blank, pixel_digest, without_padding
from maskloom.pipeline.dataset.components import count_components
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.near_duplicates.search import signature
from maskloom.pipeline.progress import progress

PLAIN_SIDE = 64

SCHEMA = """
CREATE TABLE images (
    id INTEGER PRIMARY KEY,  -- position of its records in the two files
    dataset INTEGER, split TEXT, sample TEXT, grp TEXT, label TEXT,
    image BLOB, mask BLOB,   -- digests of the pixels; no mask: NULL
    flat INTEGER,            -- one value only, but for padding
    foreground REAL,         -- share of the mask's area; no mask: NULL
    text TEXT, grey_mean REAL, grey_std REAL
);
CREATE TABLE regions (       -- one row for each mask and each foreground class in it
    dataset INTEGER, split TEXT, label TEXT, class INTEGER, share REAL, components INTEGER
);
"""


class AuditIndex:
    """Index of the rows of one or several datasets.

    Attributes:
        rows: connection to the SQLite file; see `SCHEMA`.
        signatures, thumbnails: files with one record per image, in the order of `id`; only with
            `near`.
        size: number of images so far.
    """

    def __init__(self, folder: Path, near: bool) -> None:
        """Create an empty index.

        Args:
            folder: an existing, empty folder for its files.
            near: whether to write signatures and thumbnails.
        """
        self.rows = sqlite3.connect(folder / "rows.sqlite")
        self.rows.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {SCHEMA}")
        self.signatures, self.thumbnails = folder / "signatures.bin", folder / "thumbnails.bin"
        self.near, self.size = near, 0

    def add(self, number: int, dataset: MaskPromptDataset) -> None:
        """Read a dataset whole and keep its rows under its number."""
        columns = ["image", "mask", "text", "label", "sample_id", "group_id"]
        with (
            self.signatures.open("ab") as signatures,
            self.thumbnails.open("ab") as thumbnails,
            progress("auditing", dataset.num_rows, "rows") as advance,
            self.rows,
        ):
            for split in dataset.contract.split_names:
                for row in dataset.rows(split, columns):
                    image = png_array(row["image"]["bytes"])
                    mask = None if row["mask"] is None else png_array(row["mask"]["bytes"])
                    self._add_row(number, split, row, dataset.description.label_name(row["label"]), image, mask)
                    if self.near:
                        _write_signatures(image, signatures, thumbnails)
                    self.size += 1
                    advance()

    def close_pass(self) -> None:
        """Finish after all datasets have been added: creates the database index for duplicates."""
        self.rows.execute("CREATE INDEX images_by_pixels ON images (image)")

    def _add_row(
        self, dataset: int, split: str, row: dict[str, Any], label: str | None, image: Pixels, mask: Pixels | None
    ) -> None:
        foreground = None if mask is None else float((mask > 0).mean())
        values = (
            self.size, dataset, split, row["sample_id"], row["group_id"], label, pixel_digest(image),
            None if mask is None else pixel_digest(mask), is_blank(image), foreground, row["text"],
            float(image.mean()), float(image.std()),
        )  # fmt: skip
        self.rows.execute(f"INSERT INTO images VALUES ({', '.join('?' * len(values))})", values)
        if foreground and mask is not None:
            self.rows.executemany(
                "INSERT INTO regions VALUES (?, ?, ?, ?, ?, ?)",
                [(dataset, split, label, *region) for region in mask_regions(mask)],
            )


def mask_regions(mask: Pixels) -> list[tuple[int, float, int]]:
    """Return (class, area fraction, components) of each foreground class of a mask (H, W)."""
    counts = np.bincount(mask.ravel())
    return [
        (int(value), float(counts[value] / mask.size), count_components(mask == value))
        for value in np.flatnonzero(counts)
        if value > 0
    ]


def _write_signatures(image: Pixels, signatures: BinaryIO, thumbnails: BinaryIO) -> None:
    grey = without_padding(np.asarray(Image.fromarray(image).convert("L")))
    signatures.write(signature((grey / np.float32(255)).astype(np.float32)))
    small = Image.fromarray(grey).resize((PLAIN_SIDE, PLAIN_SIDE), Image.Resampling.BOX)
    thumbnails.write(np.asarray(small).tobytes())
