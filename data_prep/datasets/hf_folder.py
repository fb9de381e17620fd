"""`hf_folder`: a folder of Hugging Face `datasets`, as downloaded or written by `save_to_parquet`.

Parquet files with images in them:

    data/train-00000-of-00002.parquet     columns `image`, and `mask`, `label`, `patient` if there are
    data/test-00000-of-00001.parquet      the split is in the name of the file or of a folder

or image files with one table of metadata per folder (`imagefolder`):

    train/metadata.jsonl                  or metadata.csv: `file_name`, and `mask_file_name`, `label`, …
    train/benign/1.png

Columns are found by the usual names (`COLUMNS`), or named by the options. Classes are those of a
`ClassLabel`, or the words of the column. Masks are black with one bright colour, or label maps whose
values `mask_values` names. Class folders without metadata are read by `folder`. Where all files are
of one split, such as `train`, splits are drawn.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pydantic import Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from maskloom.data_prep.adapter import Options as BaseOptions
from maskloom.data_prep.processing.label_maps import BACKGROUND, MaskValues, distinct_palette, label_map, read_mask
from maskloom.data_prep.readers.common import portable_id, reject_as_error, require_same_size
from maskloom.data_prep.readers.file_names import as_seen, is_visible, names_a_mask, printable
from maskloom.data_prep.readers.file_patterns import Confined, FilePool
from maskloom.data_prep.readers.image_files import READ_SUFFIXES, image_pixels, read_picture
from maskloom.data_prep.readers.tables import csv_table
from maskloom.pipeline.errors import MaskLoomError, RejectedSample, one_line

METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
COLUMNS = {
    "image": ("image", "img", "file_name"),
    "mask": ("mask", "mask_file_name", "segmentation", "mask_path"),
    "label": ("label", "labels", "class", "diagnosis", "target"),
    "group": ("group_id", "patient", "patient_id", "subject_id", "case_id"),
}
MAX_BYTES = 2**28  # of a table of metadata
MAX_SHOWN, NOT_PLAIN = 80, re.compile(r"[^\w .()+-]", re.ASCII)  # of names that temporary files get
TRIED = 8  # images that are looked at for colour
FIX = "write the dataset again, or name the columns with data.options.image_column and so on"


class HfOptions(BaseOptions):
    """The columns, where they have other names, and the meaning of masks."""

    modality: str = Field("medical image", min_length=1, description="name of the imaging method in prompts")
    image_column: str | None = Field(None, description="column of the image, or of its path")
    mask_column: str | None = Field(None, description="column of the mask, or of its path")
    label_column: str | None = Field(None, description="column of the class")
    group_column: str | None = Field(None, description="column of the patient")
    mask_values: MaskValues | None = Field(
        None, description="class of each mask value (0: background, 128: liver); null: black, and one bright colour"
    )
    keep_incomplete: bool = Field(
        False, description="keep rows without a mask, a class or a patient; false: leave them out"
    )


class Cell(NamedTuple):
    """The place of an image: a file, or a cell of a Parquet file."""

    file: str
    column: str = ""
    row: int = -1


@dataclass(frozen=True)
class Table:
    """A Parquet file or a table of metadata.

    Attributes:
        file: path in the raw folder.
        columns: names of its columns.
        rows: the values of all columns but images, by row.
        names: class names by column, of `ClassLabel` columns.
        pictures: columns that hold pictures, of a Parquet file.
    """

    file: str
    columns: list[str]
    rows: list[dict[str, Any]]
    names: dict[str, list[str]] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)

    @property
    def is_parquet(self) -> bool:
        """Whether the images are in the table itself."""
        return self.file.endswith(".parquet")

    @property
    def split(self) -> str | None:
        """The split that a part of the path names, or None."""
        words = re.split(r"[-_./]", self.file.lower())
        return next((SPLITS[word] for word in words if word in SPLITS), None)


class Adapter(DatasetAdapter):
    """Images, masks and classes of a Hugging Face dataset on disk."""

    Options = HfOptions
    options: HfOptions
    states_layout = True

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are Parquet files, or metadata beside images."""
        return bool(_tables_in(raw_dir))

    def info(self) -> DatasetInfo:
        """Return what is true of every image.

        Raises:
            MaskLoomError: a table is damaged, or has no column of images.
        """
        values = self.options.mask_values
        classes = (
            (BACKGROUND,) if not self._has("mask") else label_map(values).classes if values else (BACKGROUND, "lesion")
        )
        labels = self._labels
        subject = "{modality}, {label}" if labels else "{modality}"
        return DatasetInfo(
            modality=self.options.modality,
            channels=self._channels,
            mask_classes=classes,
            palette=distinct_palette(len(classes)),
            labels=labels,
            prompt_templates=(subject, f"image of {subject}", f"{subject} with {{mask_classes}}, {{size}}, {{place}}"),
            licence="not stated",
            citation="not stated",
            homepage="",
            duplicates="identical" if self._has("group") else "near",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the rows of all tables, in the order of the files.

        Raises:
            MaskLoomError: a table is damaged, or has no column of images.
        """
        confined = Confined(self._root)
        for table in self._tables:
            for number, row in enumerate(table.rows):
                place = f"{self._root / table.file}#row={number}"
                try:
                    yield self._item(table, number, row, place, confined)
                except RejectedSample as error:
                    yield Reject(place, str(error))
        yield from self._unlisted()

    def _unlisted(self) -> Iterator[Reject]:
        """Yield the pictures that are not read: in further columns, or files that no table names and no mask's name."""
        for table in self._tables:
            read = {self._column(table, meaning) for meaning in ("image", "mask")}
            for column in table.pictures:
                if column not in read:
                    why = "its pictures are not read: choose a column with data.options.image_column"
                    yield Reject(f"{self._root / table.file}#column={printable(column)}", why)
        tables = [table for table in self._tables if not table.is_parquet]
        cells = (
            self._cell(table, number, row, meaning)
            for table in tables
            for number, row in enumerate(table.rows)
            for meaning in ("image", "mask")
        )
        named = {as_seen(cell.file) for cell in cells if cell is not None}
        for file in FilePool(self._root, "**/*").files:
            if file.lower().endswith(READ_SUFFIXES) and as_seen(file) not in named and not names_a_mask(file):
                yield Reject(str(self._root / file), f"no {' or '.join(METADATA)} names this image")

    def load(self, item: RawItem) -> RawImage:
        """Decode an image and its mask.

        Raises:
            RejectedSample: one of them is unreadable, or the mask has another size or an unknown value.
        """
        image_cell, mask_cell = item.key
        with _file_of(self._root, image_cell) as path:
            image, darkened = read_picture(path)
        if mask_cell is None or (self.options.keep_incomplete and _is_empty(self._root, mask_cell)):
            return RawImage(image, None, darkened=darkened)
        values = self.options.mask_values
        with _file_of(self._root, mask_cell) as path:
            mask = read_mask(path, None if values is None else label_map(values))
        require_same_size(f"mask {path.name}", mask, image)
        return RawImage(image, mask, darkened=darkened)

    def _item(self, table: Table, number: int, row: Mapping[str, Any], place: str, confined: Confined) -> RawItem:
        image = self._cell(table, number, row, "image")
        if image is None:
            raise RejectedSample("the row names no image")
        mask = self._cell(table, number, row, "mask")
        complete = not self.options.keep_incomplete
        if mask is None and self._has("mask") and complete:
            raise RejectedSample("the row has no mask")
        for cell in (image, mask):
            if cell is not None:
                confined.check(cell.file)
        name = (
            str(Path(table.file).with_suffix("")) + f"-{number:06d}"
            if table.is_parquet
            else str(Path(image.file).with_suffix(""))
        )
        label = self._label(table, row)
        if self._labels and label is None and complete:
            raise RejectedSample("the row has no class")
        group = row.get(self._column(table, "group") or "")
        group = None if group == "" else group
        if self._has("group") and group is None and complete:
            raise RejectedSample("the row has no patient")
        return RawItem(
            sample_id=portable_id(name.replace("/", "-")),
            path=place if table.is_parquet else str(self._root / image.file),
            label=label,
            group=None if group is None else str(group),
            split=table.split if self._is_divided else None,
            key=(image, mask),
        )

    def _cell(self, table: Table, number: int, row: Mapping[str, Any], meaning: str) -> Cell | None:
        """Return the place of a row's image or mask; None if it has none."""
        column = self._column(table, meaning)
        if column is None:
            return None
        if table.is_parquet:
            return Cell(table.file, column, number)
        file = row.get(column)
        return Cell((Path(table.file).parent / str(file)).as_posix()) if file else None

    def _label(self, table: Table, row: Mapping[str, Any]) -> str | None:
        column = self._column(table, "label")
        value = None if column is None else row.get(column)
        if value is None or value == "":
            return None
        names = table.names.get(column or "")
        if names is None:
            return str(value)
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else None

    def _column(self, table: Table, meaning: str) -> str | None:
        """Return the column of a table with a meaning: the one that an option names, or one of the usual names."""
        named: str | None = getattr(self.options, f"{meaning}_column")
        usual = {column.lower(): column for column in reversed(table.columns)}
        return named if named is not None else next((usual[one] for one in COLUMNS[meaning] if one in usual), None)

    def _has(self, meaning: str) -> bool:
        return any(self._column(table, meaning) is not None for table in self._tables)

    @cached_property
    def _is_divided(self) -> bool:
        """Whether the files name several splits: a single one divides nothing."""
        return len({table.split for table in self._tables}) > 1

    @property
    def _root(self) -> Path:
        assert self.raw_dir is not None
        return self.raw_dir

    @cached_property
    def _tables(self) -> list[Table]:
        files = _tables_in(self._root)
        if not files:
            raise MaskLoomError(f"data.raw_dir={self._root}: no Parquet file, and no {' or '.join(METADATA)}")
        tables = [_read_table(self._root, file) for file in files]
        for table in tables:
            for meaning in COLUMNS:
                column = self._column(table, meaning)
                if column not in (None, *table.columns) or (column is None and meaning == "image"):
                    raise MaskLoomError(
                        f"{self._root / table.file}: no column {column or ' or '.join(COLUMNS[meaning])} among "
                        f"{', '.join(table.columns)}; {FIX}"
                    )
        return tables

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        """The classes: of a `ClassLabel` in its order, else those found, sorted."""
        stated = [table.names.get(self._column(table, "label") or "") for table in self._tables]
        if stated[0] is not None and all(names == stated[0] for names in stated):
            return tuple(stated[0])
        return tuple(
            sorted({label for table in self._tables for row in table.rows if (label := self._label(table, row))})
        )

    @cached_property
    def _channels(self) -> Any:
        """3 if one of the first images is coloured, else 1."""
        cells = (
            self._cell(table, number, row, "image")
            for table in self._tables
            for number, row in enumerate(table.rows[:TRIED])
        )
        return 3 if any(_is_coloured(self._root, cell) for cell in cells if cell is not None) else 1

    def __getstate__(self) -> dict[str, object]:
        """Exclude the tables, which worker processes do not need."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_tables", "_labels", "_channels")}


def _tables_in(root: Path) -> list[str]:
    """Return the Parquet files of a folder and of its subfolders, or else the tables of metadata, sorted."""
    for pattern in ("*.parquet", "metadata.*"):
        found = [path for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}{pattern}")]
        files = [path for path in found if is_visible(path, root) and path.is_file()]
        files = [path for path in files if pattern == "*.parquet" or path.name in METADATA]
        if files:
            return sorted(path.relative_to(root).as_posix() for path in files)
    return []


def _read_table(root: Path, file: str) -> Table:
    """Return a table without its images.

    Raises:
        MaskLoomError: it is damaged.
    """
    path = root / file
    with reject_as_error(path, FIX):
        Confined(root).check(file)
        if file.endswith(".parquet"):
            return _parquet_table(path, file)
        if path.stat().st_size > MAX_BYTES:
            raise RejectedSample(f"more than {MAX_BYTES} bytes")
        if file.endswith(".csv"):
            header, *body = csv_table(path)
            _check_columns(header)
            return Table(file, header, [dict(zip(header, row, strict=False)) for row in body if any(row)])
        rows = _json_lines(path)
        return Table(file, list(dict.fromkeys(key for row in rows for key in row)), rows)


def _check_columns(names: Sequence[str]) -> None:
    """Refuse a column that stands there twice, as after a join: which one counts is unknown."""
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise RejectedSample(f"it has more than one column {repeated[0]!r}")


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise RejectedSample(f"it is not JSON ({one_line(error)})") from None
    if not all(isinstance(row, dict) for row in rows):
        raise RejectedSample("a line is no JSON object")
    return rows


def _parquet_table(path: Path, file: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as stored:
            schema = stored.schema_arrow
            _check_columns(schema.names)
            plain = [one.name for one in schema if not (pa.types.is_nested(one.type) or _is_binary(one.type))]
            rows = stored.read(columns=plain).to_pylist() if plain else [{}] * stored.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise RejectedSample(f"it is not a Parquet file ({one_line(error)[:200]})") from None
    pictures = [one.name for one in schema if pa.types.is_struct(one.type) and one.type.get_field_index("bytes") >= 0]
    return Table(file, schema.names, rows, _class_names(schema.metadata or {}), pictures)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of each `ClassLabel` column, from what `datasets` writes into the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        found = {column: one["names"] for column, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {column: [str(name) for name in names] for column, names in found.items() if isinstance(names, list)}


@contextmanager
def _file_of(root: Path, cell: Cell) -> Iterator[Path]:
    """Yield a file with the bytes of an image: its own, or a temporary copy of a cell of a Parquet file."""
    path = root / cell.file
    if cell.row < 0:
        yield path
        return
    content = _cell_bytes(path, cell)
    with TemporaryDirectory(prefix="maskloom-cell-") as folder:
        column, table = (NOT_PLAIN.sub("_", name)[-MAX_SHOWN:] for name in (cell.column, path.name))
        copy = Path(folder) / f"{column} of row {cell.row} of {table}"
        copy.write_bytes(content)
        yield copy


def _cell_bytes(path: Path, cell: Cell) -> bytes:
    """Return the encoded image in a cell.

    Raises:
        RejectedSample: the cell is empty, or holds no bytes.
    """
    value = _cell_value(path, cell)
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        raise RejectedSample(f"{cell.column} of row {cell.row} of {path.name} holds no image")
    return content


def _is_empty(root: Path, cell: Cell) -> bool:
    """Whether a cell of a Parquet file holds nothing."""
    return cell.row >= 0 and _cell_value(root / cell.file, cell) is None


def _cell_value(path: Path, cell: Cell) -> Any:
    group, offset = _row_group(path, cell.row)
    return _column_of_group(path, group, cell.column, path.stat().st_mtime_ns)[offset].as_py()


def _row_group(path: Path, row: int) -> tuple[int, int]:
    """Return the row group of a row, and its place in it."""
    import pyarrow.parquet as pq

    with path.open("rb") as opened:  # pyarrow takes no name that is not UTF-8
        metadata = pq.read_metadata(opened)
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < rows:
            return group, row
        row -= rows
    raise RejectedSample(f"{path.name} has no row {row}")


@lru_cache(maxsize=2)
def _column_of_group(path: Path, group: int, column: str, changed: int) -> Any:
    """Return a column of a row group; images and masks of one group are kept. `changed`: of the file, in ns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as stored:
            return stored.read_row_group(group, columns=[column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise RejectedSample(f"{path.name} cannot be decoded ({one_line(error)[:200]})") from None


def _is_coloured(root: Path, cell: Cell) -> bool:
    try:
        with _file_of(root, cell) as path:
            pixels = image_pixels(path)
    except (RejectedSample, OSError):
        return False
    return pixels.ndim == 3 and bool((pixels != pixels[..., :1]).any())
