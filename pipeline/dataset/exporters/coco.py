"""`coco`: the object detection format of COCO (https://cocodataset.org/#format-data).

    annotations/instances_train.json    images/train/ID.png

There is one annotation per connected region (8 neighbours) of each mask class. Its `segmentation`
is an uncompressed run-length encoding, because a polygon would lose pixels: `counts` are the
lengths of runs down the columns, the first of them outside the region. `area` is in pixels, `bbox`
is [left, top, width, height]. Categories are the mask classes without the background. In addition
to COCO's keys, an image has `label`, `text`, `sample_id`, `group_id` and `origin`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.exporter import DatasetExporter, ExportSource, Row, index_values, safe_name, write_new


class Exporter(DatasetExporter):
    """Writes images, and one file of annotations per split."""

    def mask_values(self, about: Description) -> str:
        """Return in words what the category ids mean."""
        return f"category ids: {index_values(about)} (the background has no annotations)"

    def write(self, source: ExportSource, folder: Path) -> None:
        """Write images and annotations."""
        (folder / "annotations").mkdir()
        for split in source.splits:
            with (folder / "annotations" / f"instances_{split}.json").open("w", encoding="utf-8", newline="\n") as file:
                _write_split(source, split, folder / "images" / split, file)


def _write_split(source: ExportSource, split: str, images: Path, file: IO[str]) -> None:
    """Write a split row by row; buffer annotations on disk until the list of images is complete."""
    about, ids = source.about, count(1)
    head = json.dumps(_head(about), ensure_ascii=False)
    file.write(f'{head[:-1]}, "images": [')
    with tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n") as annotations:
        for image_id, row in enumerate(source.rows(split), start=1):
            assert row.mask is not None  # needs_masks
            name = f"{safe_name(row.sample_id)}.png"
            write_new(images / name, row.image)
            file.write(
                ("" if image_id == 1 else ",") + "\n" + json.dumps(_image(row, image_id, name), ensure_ascii=False)
            )
            for region in mask_regions(row.mask):
                annotation_id = next(ids)
                annotation = {"id": annotation_id, "image_id": image_id, **region, "iscrowd": 0}
                annotations.write(("" if annotation_id == 1 else ",") + "\n" + json.dumps(annotation))
        annotations.seek(0)
        file.write('\n], "annotations": [')
        shutil.copyfileobj(annotations, file)
    file.write("\n]}\n")


def mask_regions(mask: NDArray[np.uint8]) -> Iterator[dict[str, Any]]:
    """Yield the connected regions of every class but the background, as parts of annotations.

    Args:
        mask: (H, W) class indices, 0 = background.
    """
    from skimage.measure import label, regionprops

    for category in np.unique(mask[mask > 0]).tolist():
        regions = label(mask == category, connectivity=2)
        for region in regionprops(regions):
            top, left, bottom, right = region.bbox
            yield {
                "category_id": category,
                "segmentation": {"counts": run_lengths(regions == region.label), "size": list(mask.shape)},
                "area": int(region.num_pixels),
                "bbox": [left, top, right - left, bottom - top],
            }


def run_lengths(region: NDArray[np.bool_]) -> list[int]:
    """Return the lengths of runs of equal pixels, column by column.

    The first run is outside the region and may be empty.
    """
    pixels = region.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [pixels.size]])).tolist()
    return [0, *runs] if pixels[0] else runs


def _head(about: Description) -> dict[str, Any]:
    return {
        "info": {"description": f"{about.dataset}, {about.origin} images", "url": about.homepage, "version": "1"},
        "licenses": [{"id": 1, "name": about.licence, "url": about.homepage}],
        "categories": [
            {"id": index, "name": name, "supercategory": about.modality}
            for index, name in enumerate(about.mask_classes)
            if index > 0
        ],
    }


def _image(row: Row, image_id: int, name: str) -> dict[str, Any]:
    assert row.mask is not None  # needs_masks
    height, width = row.mask.shape
    return {
        "id": image_id,
        "file_name": name,
        "width": width,
        "height": height,
        "license": 1,
        "label": row.label,
        "text": row.text,
        "sample_id": row.sample_id,
        "group_id": row.group_id,
        "origin": row.origin,
    }
