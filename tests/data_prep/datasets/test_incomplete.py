"""Images without a mask or a class: left out, or kept with `keep_incomplete`, in each adapter of a layout."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from maskloom.data_prep.adapter import DatasetAdapter, RawItem, Reject
from maskloom.data_prep.sources import load_adapter
from tests.writers import folder, hf_folder, nnunet_folder


def opened(name: str, raw: Path, **options: Any) -> DatasetAdapter:
    return load_adapter(name, raw, options, "data.options")


def entries(adapter: DatasetAdapter) -> tuple[list[RawItem], list[Reject]]:
    found = list(adapter.scan())
    return [e for e in found if isinstance(e, RawItem)], [e for e in found if isinstance(e, Reject)]


def masks_of(adapter: DatasetAdapter) -> Counter[bool]:
    """Return how many images have a mask."""
    return Counter(adapter.load(item).mask is not None for item in entries(adapter)[0])


def test_a_folder(tmp_path: Path) -> None:
    folder.write_raw(tmp_path)
    (tmp_path / folder.MASK).unlink()
    assert len(entries(opened("folder", tmp_path, **folder.OPTIONS))[1]) == 1
    kept = opened("folder", tmp_path, **folder.OPTIONS, keep_incomplete=True)
    assert masks_of(kept) == {True: 17, False: 1} and not entries(kept)[1]


def test_a_table_with_an_empty_class(tmp_path: Path) -> None:
    folder.write_raw(tmp_path)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "images").rglob("*.png"))
    unlisted = sum(1 for path in (tmp_path / "images").rglob("*.*") if path.suffix != ".png")
    rows = [f"{file},{'' if number == 0 else 'ab'[number % 2]}" for number, file in enumerate(files)]
    (tmp_path / "t.csv").write_text("\n".join(["file,class", *rows]))
    options = {"modality": "x", "table": "t.csv", "image_column": "file", "label_column": "class"}
    assert [one.reason for one in entries(opened("folder", tmp_path, **options))[1]].count("not in t.csv") == unlisted
    assert len(entries(opened("folder", tmp_path, **options))[1]) == 1 + unlisted
    items, rejects = entries(opened("folder", tmp_path, **options, keep_incomplete=True))
    assert Counter(item.label for item in items)[None] == 1 and len(rejects) == unlisted
    (tmp_path / "t.csv").write_text("\n".join(["file,class", *(f"{file}," for file in files)]))
    assert opened("folder", tmp_path, **options, keep_incomplete=True).info().labels == ()


def test_nnunet(tmp_path: Path) -> None:
    nnunet_folder.write_raw(tmp_path)
    (tmp_path / nnunet_folder.LABEL).unlink()
    shutil.rmtree(tmp_path / nnunet_folder.FOLDER / "labelsTs")
    assert len(entries(opened("nnunet_folder", tmp_path))[0]) == nnunet_folder.CASES - 1
    kept = opened("nnunet_folder", tmp_path, keep_incomplete=True)
    assert masks_of(kept) == {True: nnunet_folder.CASES - 1, False: 1 + nnunet_folder.TEST} and not entries(kept)[1]


def test_hugging_face(tmp_path: Path) -> None:
    hf_folder.write_raw(tmp_path)
    rows = hf_folder.rows_of("train")
    for row, column in zip(rows, ("mask", "label", "patient"), strict=False):
        row[column] = None
    hf_folder.write_rows(tmp_path / hf_folder.file_of("train"), rows)
    kept = opened("hf_folder", tmp_path, keep_incomplete=True)
    items, rejects = entries(kept)
    assert not rejects and masks_of(kept) == {True: 19, False: 1}
    assert [item.label for item in items].count(None) == [item.group for item in items].count(None) == 1
    assert len(entries(opened("hf_folder", tmp_path))[1]) == 2  # the mask is missed when it is read


def test_metadata_without_masks_and_classes(tmp_path: Path) -> None:
    hf_folder.write_metadata(tmp_path, "metadata.csv")
    table = tmp_path / "train" / "metadata.csv"
    first, *others = table.read_text().splitlines()[1:]
    table.write_text("\n".join([table.read_text().splitlines()[0], f"{first.split(',')[0]},,,", *others]))
    assert len(entries(opened("hf_folder", tmp_path))[1]) == 1
    items, rejects = entries(opened("hf_folder", tmp_path, keep_incomplete=True))
    assert len(items) == 20 and not rejects
    assert all(Path(item.path).is_file() and Path(item.path).suffix == ".png" for item in items)
    shutil.copyfile(items[0].path, tmp_path / "train" / "unlisted.png")
    (reject,) = entries(opened("hf_folder", tmp_path, keep_incomplete=True))[1]
    assert reject.path.endswith("train/unlisted.png") and reject.reason.startswith("no metadata.jsonl or")
    assert [(item.label, item.group) for item in items if item.key[1] is None] == [(None, None)]


def test_files_of_a_single_split_divide_nothing(tmp_path: Path) -> None:
    hf_folder.write_rows(tmp_path / hf_folder.file_of("train"), hf_folder.rows_of("train"))
    assert {item.split for item in entries(opened("hf_folder", tmp_path))[0]} == {None}
    hf_folder.write_rows(tmp_path / hf_folder.file_of("test"), hf_folder.rows_of("test"))
    assert {item.split for item in entries(opened("hf_folder", tmp_path))[0]} == {"train", "test"}


def test_a_picture_beside_parquet_files_is_told(tmp_path: Path) -> None:
    hf_folder.write_raw(tmp_path)
    before = entries(opened("hf_folder", tmp_path))
    Image.new("L", (8, 8)).save(tmp_path / "data" / "stray.png")
    items, rejects = entries(opened("hf_folder", tmp_path))
    assert len(items) == len(before[0])
    assert [one.path for one in rejects if one not in before[1]] == [str(tmp_path / "data" / "stray.png")]


def test_pictures_of_further_columns_are_told(tmp_path: Path) -> None:
    hf_folder.write_raw(tmp_path)
    path = tmp_path / hf_folder.file_of("train")
    table = pq.read_table(path)
    pq.write_table(table.append_column("second", table["image"]), path)
    items, rejects = entries(opened("hf_folder", tmp_path, modality="x"))
    assert len(items) == sum(hf_folder.COUNTS.values())
    (told,) = [one for one in rejects if "#column=second" in one.path]
    assert told.reason == "its pictures are not read: choose a column with data.options.image_column"
    assert not any("#column=mask" in one.path or "#column=image" in one.path for one in rejects)
