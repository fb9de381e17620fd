"""`imagefolder`: one folder per class, for `datasets` (imagefolder) and torchvision (ImageFolder).

    train/benign/ID.png        an image; `unlabelled` holds those without a class
    train/ID_mask.png          its mask, outside the class folders: torchvision walks these only
    train/metadata.jsonl       one line per image: file_name, mask_file_name, label, text and ids

`load_dataset("imagefolder", data_dir=FOLDER)` gives the columns `image`, `mask`, `label` (the
name), `text`, …; torchvision reads one split, `ImageFolder("FOLDER/train")`. An external test set
is a folder beside train, and is loaded with its own `data_dir`. If some image has no mask, the
column `mask_path` names the mask files, and there is no column `mask` of images.
"""

import json
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

UNLABELLED = "unlabelled"
METADATA_FILE = "metadata.jsonl"
SPLIT_WORDS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")


class Exporter(DatasetExporter):
    """Writes folders of splits and classes, with `metadata.jsonl`."""

    needs_masks = False

    def mask_values(self, about: Description) -> str:
        """Return in words what the pixels of the exported masks mean."""
        return visible_values(about)

    def write(self, source: ExportSource, folder: Path) -> None:
        """Write images, masks and one `metadata.jsonl` per split."""
        for split in source.splits:
            (folder / split).mkdir()
            with (folder / split / METADATA_FILE).open("w", encoding="utf-8", newline="\n") as metadata:
                for row in source.rows(split):
                    values = _write_row(row, source, folder / split)
                    metadata.write(json.dumps(values, ensure_ascii=False) + "\n")


def _write_row(row: Row, source: ExportSource, folder: Path) -> dict[str, str]:
    """Write an image and its mask; return its line of metadata.

    No value is null, because `datasets` infers the types from the first lines.
    """
    name = safe_name(row.sample_id)
    image = f"{class_folder(row.label)}/{name}.png"
    write_new(folder / image, row.image)
    mask = "" if row.mask is None else f"{name}_mask.png"
    if row.mask is not None:
        write_new(folder / mask, visible_mask(row.mask, source.about))
    # `datasets` opens every `*_file_name` as an image, so all rows need one.
    mask_key = "mask_file_name" if source.without_mask is None else "mask_path"
    return {
        "file_name": image,
        mask_key: mask,
        "label": row.label or "",
        "text": row.text,
        "sample_id": row.sample_id,
        "group_id": row.group_id,
        "source": row.source,
        "origin": row.origin,
        "parent_id": row.parent_id,
        "generator": row.generator,
    }


def class_folder(label: str | None) -> str:
    """Return the folder of a class, or of images without a class.

    A class with the name of a split gets a prefix, because `datasets` would read it as that split.
    """
    if label is None:
        return UNLABELLED
    return f"class-{safe_name(label)}" if label.lower() in (*SPLIT_WORDS, UNLABELLED) else safe_name(label)
