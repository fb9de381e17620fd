"""`busi_tree`: the layout of curated BUSI copies, one folder per class, and a table.

    benign/image/synthetic_benign_001.png
    benign/mask/synthetic_benign_001_mask.png
    synthetic_dataset.csv   image_path, mask_path, class, class_label
    samples.csv             ids, group, split, origin and prompt of each image

Real rows are named `real_…` and numbered separately. The first table is named after the dataset's
origin (`real_dataset.csv`, `combined_dataset.csv`). The layout has no splits: `samples.csv` lists
the split of each row. `data_prep` can read the result: as `busi` if the classes are those of BUSI,
otherwise as `folder` with `samples.csv` as its table.
"""

import csv
from collections import Counter
from pathlib import Path

from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.exporter import (
    DatasetExporter,
    ExportSource,
    Row,
    safe_name,
    visible_mask,
    visible_values,
    write_new,
)
from maskloom.pipeline.errors import MaskLoomError

TABLE_COLUMNS = ("image_path", "mask_path", "class", "class_label")
SAMPLE_COLUMNS = ("image_path", "mask_path", "class", "split", "group_id", "sample_id", "origin", "text")
LEAST_DIGITS = 3


class Exporter(DatasetExporter):
    """Writes one folder per class with images and masks, numbered by origin and class."""

    needs_labels = True

    def mask_values(self, about: Description) -> str:
        """Return in words what the pixels of the exported masks mean."""
        return visible_values(about)

    def check(self, source: ExportSource) -> None:
        """Check that no two classes would share a folder.

        Raises:
            MaskLoomError: two classes differ in capital letters only.
        """
        folders = Counter(safe_name(label).lower() for label in source.about.labels)
        for label in source.about.labels:
            if folders[safe_name(label).lower()] > 1:
                raise MaskLoomError(
                    f"{source.folder}: the class {label!r} and another one would share a folder; rename one of them"
                )

    def write(self, source: ExportSource, folder: Path) -> None:
        """Write images, masks and both tables."""
        about = source.about
        totals: Counter[tuple[str, str | None]] = Counter()
        for (_, origin, label), count in source.counts.items():
            totals[origin, label] += count
        seen: Counter[tuple[str, str | None]] = Counter()
        with (
            (folder / f"{about.origin}_dataset.csv").open("w", encoding="utf-8", newline="") as table,
            (folder / "samples.csv").open("w", encoding="utf-8", newline="") as samples,
        ):
            rows, details = csv.writer(table, lineterminator="\n"), csv.writer(samples, lineterminator="\n")
            rows.writerow(TABLE_COLUMNS)
            details.writerow(SAMPLE_COLUMNS)
            for split in source.splits:
                for row in source.rows(split):
                    seen[row.origin, row.label] += 1
                    digits = max(LEAST_DIGITS, len(str(totals[row.origin, row.label])))
                    image, mask = _write_pair(row, f"{seen[row.origin, row.label]:0{digits}d}", about, folder)
                    assert row.label is not None  # needs_labels
                    rows.writerow((image, mask, row.label, about.labels.index(row.label)))
                    details.writerow((image, mask, row.label, split, row.group_id, row.sample_id, row.origin, row.text))


def _write_pair(row: Row, number: str, about: Description, folder: Path) -> tuple[str, str]:
    """Write an image and its mask; return their paths relative to `folder`."""
    assert row.label is not None  # needs_labels
    assert row.mask is not None  # needs_masks
    label = safe_name(row.label)
    stem = f"{row.origin}_{label}_{number}"
    image, mask = f"{label}/image/{stem}.png", f"{label}/mask/{stem}_mask.png"
    write_new(folder / image, row.image)
    write_new(folder / mask, visible_mask(row.mask, about))
    return image, mask
