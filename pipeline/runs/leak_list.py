"""The first leaked images in words, and all of them in a file: `logs/audit/DIGEST-leaked.jsonl` of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskloom.pipeline.dataset.audit.pixels import decoded_image, pixel_digest
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.files.atomic import write_text
from maskloom.pipeline.runs.sample_files import files_in_words, sample_files

MAX_SHOWN = 3  # leaks in an error
ENDS = ("image", "shows")  # the image that leaks, and the one that it shows


def leaks_in_words(record: Path, texts: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """Return the first leaks in words, and write all of them to a file, which is named where there are more.

    The file states the digest of the pixels of each image that leaks: what leaves a run is looked up in it
    (`pipeline.dataset.listed_leaks`).

    Args:
        record: where the check keeps its record if it finds nothing; the file lies beside it.
        texts: one per leak.
        rows: the same leaks, for the file.
    """
    path = record.with_name(f"{record.stem}-leaked.jsonl")
    folders = {Path(str(row[f"{end}_dataset"])) for row in rows for end in ENDS}
    files = {str(folder): sample_files(folder) for folder in folders}
    pixels = {str(folder): _pixel_digests(folder, rows) for folder in folders}
    named = []
    for row in rows:
        more: dict[str, object] = {f"{end}_file": files[str(row[f"{end}_dataset"])].get(str(row[end])) for end in ENDS}
        named.append({**row, **more, "image_pixels": pixels[str(row["image_dataset"])][str(row["image"])]})
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in named))
    if len(texts) <= MAX_SHOWN:
        return "; ".join(texts)
    return "; ".join([*texts[:MAX_SHOWN], f"and {len(texts) - MAX_SHOWN} more; all are listed in {path}"])


def _pixel_digests(folder: Path, rows: Sequence[Mapping[str, object]]) -> dict[str, str]:
    """Return the digest of the pixels of each image of a dataset that leaks, by sample id."""
    leaking = {str(row["image"]) for row in rows if Path(str(row["image_dataset"])) == folder}
    read = MaskPromptDataset.open(folder).rows(columns=["sample_id", "image"]) if leaking else []
    return {
        row["sample_id"]: pixel_digest(decoded_image(folder, row)).hex() for row in read if row["sample_id"] in leaking
    }


def files_of_leaks(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the raw files of the first leaks in words; empty where none is known."""
    return files_in_words((Path(str(row[f"{end}_dataset"])), str(row[end])) for row in rows[:MAX_SHOWN] for end in ENDS)
