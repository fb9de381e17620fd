"""Tiny Hugging Face datasets on disk: Parquet files with images, masks, classes and patients."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.writers import Flaw
from tests.writers.udiat import drawn, label_of

COUNTS = {"train": 12, "validation": 4, "test": 4}
NAMES = ["benign", "malignant"]
FEATURES = {"label": {"names": NAMES, "_type": "ClassLabel"}}


def png(pixels: np.ndarray) -> bytes:
    """Return an image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def file_of(split: str) -> str:
    """Return the path of a split's file."""
    return f"data/{split}-00000-of-00001.parquet"


def rows_of(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split."""
    first = sum(COUNTS[name] for name in list(COUNTS)[: list(COUNTS).index(split)])
    rows = []
    for number in range(first + 1, first + COUNTS[split] + 1):
        image, mask = drawn(number)
        label, patient = NAMES.index(label_of(number)), f"p{number:02d}"
        cells = {"image": image, "mask": mask * np.uint8(255)}
        encoded = {name: {"bytes": png(pixels), "path": None} for name, pixels in cells.items()}
        rows.append({**encoded, "label": label, "patient": patient})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], features: dict[str, Any] | None = None) -> None:
    """Write rows as `datasets` does: with its features in the schema, and small row groups."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    kinds = {"image": image, "mask": image, "label": pa.int64(), "patient": pa.string()}
    stated = {"huggingface": json.dumps({"info": {"features": FEATURES if features is None else features}})}
    schema = pa.schema({name: kinds[name] for name in kinds if name in rows[0]}, metadata=stated)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=5)


def write_raw(folder: Path) -> list[Path]:
    """Write 20 rows in three files, and return the files."""
    for split in COUNTS:
        write_rows(folder / file_of(split), rows_of(split))
    return [folder / file_of(split) for split in COUNTS]


def write_metadata(folder: Path, table: str) -> None:
    """Write the same as image files with a table per split: `metadata.jsonl` or `metadata.csv`."""
    for split in COUNTS:
        lines = []
        for number, row in enumerate(rows_of(split)):
            label = NAMES[row["label"]]
            for name, suffix in (("image", ""), ("mask", "_mask")):
                path = folder / split / label / f"{number}{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(row[name]["bytes"])
            file = f"{label}/{number}"
            lines.append(
                {
                    "file_name": f"{file}.png",
                    "mask_file_name": f"{file}_mask.png",
                    "label": label,
                    "patient": row["patient"],
                }
            )
        if table.endswith(".csv"):
            text = "\n".join(",".join(values) for values in (lines[0].keys(), *(line.values() for line in lines)))
        else:
            text = "\n".join(map(json.dumps, lines))
        (folder / split / table).write_text(text + "\n")


def _changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return what changes the third row of the train split."""

    def damage(folder: Path) -> None:
        rows = rows_of("train")
        change(rows[2])
        write_rows(folder / file_of("train"), rows)

    return damage


def _without(column: str) -> Callable[[Path], None]:
    """Return what leaves a column out of the train split."""

    def damage(folder: Path) -> None:
        rows = [{name: value for name, value in row.items() if name != column} for row in rows_of("train")]
        write_rows(folder / file_of("train"), rows)

    return damage


def _set(column: str, value: Any) -> Callable[[Path], None]:
    return _changed(lambda row: row.update({column: value}))


def _cell(pixels: np.ndarray) -> dict[str, Any]:
    return {"bytes": png(pixels), "path": None}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _as_metadata(table: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shutil.rmtree(folder / "data")
        write_metadata(folder, table)

    return damage


def _metadata_damaged(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        _as_metadata("metadata.jsonl")(folder)
        change(folder / "train" / "metadata.jsonl")

    return damage


def _names_a_file_outside(path: Path) -> None:
    (path.parents[2] / "outside.png").write_bytes(rows_of("train")[0]["image"]["bytes"])
    path.write_text(path.read_text().replace("benign/0.png", "../../outside.png", 1))


def _class_column_twice_in_csv(folder: Path) -> None:
    _as_metadata("metadata.csv")(folder)
    table = folder / "train" / "metadata.csv"
    header, *body = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},label", *(f"{row},benign" for row in body)]) + "\n")


def _class_column_twice_in_parquet(folder: Path) -> None:
    table = pq.read_table(folder / file_of("train"))
    pq.write_table(table.append_column(table.schema.field("label"), table["label"]), folder / file_of("train"))


FLAWS = {
    "truncated image": Flaw(
        _changed(lambda row: row["image"].update(bytes=row["image"]["bytes"][:200])),
        "image of row 2 of train-.* cannot be decoded",
    ),
    "truncated mask": Flaw(
        _changed(lambda row: row["mask"].update(bytes=row["mask"]["bytes"][:60])),
        "mask of row 2 of train-.* cannot be decoded",
    ),
    "no image": Flaw(_set("image", None), "image of row 2 of train-.* holds no image"),
    "no mask": Flaw(_set("mask", None), "mask of row 2 of train-.* holds no image"),
    "mask of another size": Flaw(_set("mask", _cell(np.zeros((5, 7), np.uint8))), "is 7x5, the image"),
    "mask of several colours": Flaw(
        _set("mask", _cell(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64))), "mask of row 2"
    ),
    "no class": Flaw(_set("label", None), "the row has no class"),
    "a class without a name": Flaw(_set("label", 7), "the row has no class"),
    "no patient": Flaw(_set("patient", None), "the row has no patient"),
    "no column of images": Flaw(_without("image"), "no column image or img or file_name among mask, label, patient"),
    "truncated file": Flaw(lambda f: _truncate(f / file_of("train")), "it is not a Parquet file"),
    "nothing there": Flaw(lambda f: shutil.rmtree(f / "data"), "no Parquet file, and no metadata"),
    "metadata that is not JSON": Flaw(_metadata_damaged(lambda path: path.write_text("{")), "it is not JSON"),
    "metadata that is a list": Flaw(
        _metadata_damaged(lambda path: path.write_text("[]\n")), "a line is no JSON object"
    ),
    "metadata that names no image": Flaw(
        _metadata_damaged(lambda path: path.write_text(path.read_text().replace("benign/0.png", "", 1))),
        "names no image",
    ),
    "metadata that leads out": Flaw(_metadata_damaged(_names_a_file_outside), "leads out of data.raw_dir"),
    "metadata of a file that is not there": Flaw(
        _metadata_damaged(lambda path: (path.parent / "benign" / "0.png").unlink()), "no such file"
    ),
    "a column twice in a CSV": Flaw(_class_column_twice_in_csv, "more than one column 'label'"),
    "a column twice in Parquet": Flaw(_class_column_twice_in_parquet, "more than one column 'label'"),
    "image files with lines of JSON": Flaw(_as_metadata("metadata.jsonl"), None),
    "image files with a CSV": Flaw(_as_metadata("metadata.csv"), None),
}
