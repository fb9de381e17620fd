"""A tiny UDIAT dataset B: phantoms, their masks, and the spreadsheet of classes."""

import io
import re
import shutil
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import openpyxl
from numpy.typing import NDArray
from PIL import Image

from maskloom.data_prep.datasets.phantom_bus import _render
from tests.writers import Flaw

IMAGES = 16
MASK_MODES = ("L", "1", "RGB", "RGBA")
SHEET = "xl/worksheets/sheet1.xml"


def label_of(number: int) -> str:
    """Return the class of an image: two of three are benign, as in the dataset."""
    return "malignant" if number % 3 == 0 else "benign"


@cache
def drawn(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and mask of number 1, 2, …; (64, W) each."""
    return _render(7, number, 0, label_of(number), 64)


def rows() -> list[list[object]]:
    """Return the table: numbers as numbers, classes, and a column without a title."""
    body = [[number, label_of(number).capitalize(), "CYST" if number == 2 else None] for number in range(1, IMAGES + 1)]
    return [["Image", "Type", None], *body]


def write_raw(folder: Path) -> list[Path]:
    """Write 16 images (11 benign, 5 malignant) and return their paths."""
    written = []
    for name in ("original", "GT"):
        (folder / name).mkdir()
    for number in range(1, IMAGES + 1):
        image, mask = drawn(number)
        written.append(folder / "original" / f"{number:06d}.png")
        Image.fromarray(image).convert("RGB" if number % 2 else "L").save(written[-1])
        Image.fromarray(mask * 255).convert(MASK_MODES[number % 4]).save(folder / "GT" / f"{number:06d}.png")
    write_table(folder / "DatasetB.xlsx", rows())
    return written


def write_table(path: Path, table: Sequence[Sequence[object]]) -> None:
    """Write a spreadsheet as openpyxl does, less the times that would make its bytes differ."""
    book = openpyxl.Workbook()
    assert book.active is not None
    for row in table:
        book.active.append(list(row))
    buffer = io.BytesIO()
    book.save(buffer)
    with zipfile.ZipFile(buffer) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["docProps/core.xml"] = re.sub(
        rb"\d{4}-\d\d-\d\dT[\d:]+Z", b"2020-01-01T00:00:00Z", parts["docProps/core.xml"]
    )
    write_parts(path, parts)


def write_parts(path: Path, parts: dict[str, bytes]) -> None:
    """Write a zip of the parts, all of the same date."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED, 1)


def parts_of(path: Path) -> dict[str, bytes]:
    """Return the parts of a zip by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def expand_entities(path: Path) -> None:
    """Give the sheet entities that would expand to a gigabyte, and a cell that uses them."""
    parts = parts_of(path)
    levels = "".join(f'<!ENTITY e{level} "{f"&e{level - 1};" * 10}">' for level in range(1, 10))
    prolog = f'<?xml version="1.0"?><!DOCTYPE worksheet [<!ENTITY e0 "x">{levels}]>'.encode()
    sheet = re.sub(rb"<\?xml[^>]*\?>", b"", parts[SHEET])
    write_parts(path, parts | {SHEET: prolog + sheet.replace(b"<v>1</v>", b"<v>&e9;</v>", 1)})


def inflate(path: Path) -> None:
    """Add a part of 20 MB of nothing, which compresses to some kB."""
    write_parts(path, parts_of(path) | {"xl/media/image1.bin": bytes(20_000_000)})


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _table(change: dict[int, list[object]], header: list[object] | None = None) -> Sequence[Sequence[object]]:
    """Return the table with some rows, by their number, replaced."""
    table = rows()
    for number, row in change.items():
        table[number] = row
    return [header or table[0], *table[1:]]


def _redraw(path: Path, size: tuple[int, int], value: int, mode: str = "L") -> None:
    Image.new(mode, size, value).save(path)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _into_unicode_folder(folder: Path) -> None:
    inner = folder / "超音波 (Ultraschall) – données"
    inner.mkdir()
    for name in ("original", "GT", "DatasetB.xlsx"):
        (folder / name).rename(inner / name)


IMAGE, MASK, XLSX = Path("original/000003.png"), Path("GT/000003.png"), Path("DatasetB.xlsx")

FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(f / IMAGE), r"^000003\.png cannot be decoded"),
    "truncated mask": Flaw(lambda f: _truncate(f / MASK), r"^000003\.png cannot be decoded"),
    "mask of another size": Flaw(
        lambda f: _redraw(f / MASK, (5, 7), 255), r"mask 000003\.png is 5x7, the image \d+x64"
    ),
    "empty mask": Flaw(lambda f: _redraw(f / MASK, _size(f / IMAGE), 0), r"mask 000003\.png is empty"),
    "16-bit image": Flaw(lambda f: _redraw(f / IMAGE, _size(f / MASK), 900, "I;16"), "holds uint16, expected 8 bits"),
    "image without mask": Flaw(lambda f: (f / MASK).unlink(), "no mask in GT belongs to this image"),
    "mask without image": Flaw(lambda f: (f / IMAGE).unlink(), "a mask without an image"),
    "a number that is taken": Flaw(
        lambda f: shutil.copy(f / IMAGE, f / "original" / "3.png"),
        r"2 images have this number: original/000003\.png, original/3\.png",
    ),
    "two masks": Flaw(lambda f: shutil.copy(f / MASK, f / "GT" / "3.png"), "several masks belong to this image"),
    "another format": Flaw(lambda f: (f / "original" / "notes.txt").write_text("x"), "not a PNG file"),
    "no table": Flaw(lambda f: (f / XLSX).unlink(), r"no DatasetB\.xlsx .* put it beside original and GT"),
    "truncated table": Flaw(lambda f: _truncate(f / XLSX), r"DatasetB\.xlsx cannot be decoded"),
    "zip bomb": Flaw(lambda f: inflate(f / XLSX), r"DatasetB\.xlsx unpacks to 20\d+ bytes, more than"),
    "entity-expanding sheet": Flaw(
        lambda f: expand_entities(f / XLSX), r"DatasetB\.xlsx cannot be decoded \(EntitiesForbidden"
    ),
    "table without classes": Flaw(
        lambda f: write_table(f / XLSX, [row[:1] for row in rows()]),
        r"no column of classes among Image; name it 'type'",
    ),
    "image not in the table": Flaw(lambda f: write_table(f / XLSX, rows()[:-1]), "DatasetB has no row for this image"),
    "row without image": Flaw(
        lambda f: write_table(f / XLSX, [*rows(), [17, "Benign", None]]),
        "listed in the table, but there is no such image",
    ),
    "row listed twice": Flaw(
        lambda f: write_table(f / XLSX, [*rows(), ["000003", "Benign", None]]),
        r"row \d+: Image '000003' is listed more than once",
    ),
    "unknown class": Flaw(
        lambda f: write_table(f / XLSX, _table({3: [3, "Normal", None]})),
        r"unknown class 'Normal' in row \d+ of DatasetB\.xlsx; known: benign",
    ),
    "other column titles": Flaw(lambda f: write_table(f / XLSX, _table({}, ["Nº", "Clasificación", "x"])), None),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}
