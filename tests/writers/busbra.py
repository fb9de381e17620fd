"""A tiny BUS-BRA: two views of eight phantoms and one of six, their masks, and the tables of cases
and folds.
"""

import csv
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.data_prep.datasets.phantom_bus import _render
from tests.writers import Flaw

ROOT = "BUSBRA"
CASES = 14
TWO_VIEWS = 8
SIDES = {"l": "left", "r": "right", "s": "single"}
DEVICES = ("GE Logiq 5", "Toshiba Xario", "U-Systems")
COLUMNS = ("ID", "Case", "Histology", "Pathology", "BIRADS", "Device", "Width", "Height", "Side", "BBOX")
Table = list[list[str]]


def label_of(case: int) -> str:
    """Return the pathology of a case."""
    return "malignant" if case % 3 == 1 else "benign"


def views_of(case: int) -> str:
    """Return the letters of a case's views."""
    return "lr" if case <= TWO_VIEWS else "s"


@cache
def drawn(case: int, view: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and mask of a view of case 1, 2, …; (64, W) each."""
    return _render(11, case, "lrs".index(view), label_of(case), 64)


def fold_of(case: int, folds: int) -> int:
    """Return the fold of a case."""
    return (case - 1) % folds + 1


def is_validation(case: int, folds: int, test_fold: int) -> bool:
    """Return whether a case is validation when a fold of other cases is the test split."""
    return fold_of(case, folds) == test_fold % folds + 1


def bus_data() -> Table:
    """Return the table of images with its header."""
    table = [list(COLUMNS)]
    for case, view in listed():
        image, mask = drawn(case, view)
        top, left = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        box = f"[{left[0]},{top[0]},{left.size},{top.size}]"
        histology, birads = (
            ("Invasive ductal carcinoma", "5") if label_of(case) == "malignant" else ("Fibroadenoma", "3")
        )
        row = [
            name_of(case, view),
            case,
            histology,
            label_of(case),
            birads,
            DEVICES[case % 3],
            image.shape[1],
            image.shape[0],
        ]
        table.append([*map(str, row), SIDES[view], box])
    return table


def fold_data(folds: int) -> Table:
    """Return the table of folds with its header: valid_K is 1 for train, 0 for validation, NaN for
    the test fold itself.
    """
    numbers = range(1, folds + 1)
    table = [["ID", "Pathology", "kFold", *(f"valid_{number}" for number in numbers)]]
    for case, view in listed():
        uses = ["NaN" if fold_of(case, folds) == n else str(int(not is_validation(case, folds, n))) for n in numbers]
        table.append([name_of(case, view), label_of(case), str(fold_of(case, folds)), *uses])
    return table


def listed() -> list[tuple[int, str]]:
    """Return case and view of every image."""
    return [(case, view) for case in range(1, CASES + 1) for view in views_of(case)]


def name_of(case: int, view: str) -> str:
    """Return an image's ID."""
    return f"bus_{case:04d}-{view}"


def write_raw(folder: Path) -> list[Path]:
    """Write 22 images of 14 cases and return their paths."""
    root = folder / ROOT
    for name in ("Images", "Masks"):
        (root / name).mkdir(parents=True)
    written = []
    for case, view in listed():
        image, mask = drawn(case, view)
        written.append(root / "Images" / f"{name_of(case, view)}.png")
        Image.fromarray(image).save(written[-1])
        Image.fromarray(mask * 255).convert("1").save(root / "Masks" / f"mask_{case:04d}-{view}.png")
    write_table(root / "bus_data.csv", bus_data())
    for folds in (5, 10):
        write_table(root / f"{folds}-fold-cv.csv", fold_data(folds))
    return written


def write_table(path: Path, table: Sequence[Sequence[str]]) -> None:
    """Write a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(table)


def with_value(table: Table, identity: str, column: str, value: str) -> Table:
    """Return a table with one cell changed."""
    place = table[0].index(column)
    return [[*row[:place], value, *row[place + 1 :]] if row[0] == identity else row for row in table]


def without_column(table: Table, column: str) -> Table:
    """Return a table less one column."""
    place = table[0].index(column)
    return [[*row[:place], *row[place + 1 :]] for row in table]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _redraw(path: Path, size: tuple[int, int], value: int) -> None:
    Image.new("L", size, value).save(path)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _rewrite(change: Callable[[Table], Table]) -> Callable[[Path], None]:
    return lambda folder: write_table(folder / ROOT / "bus_data.csv", change(bus_data()))


NAME = name_of(2, "r")
IMAGE, MASK = Path(ROOT, "Images", f"{NAME}.png"), Path(ROOT, "Masks", "mask_0002-r.png")
TABLE = Path(ROOT, "bus_data.csv")

FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(f / IMAGE), r"^bus_0002-r\.png cannot be decoded"),
    "truncated mask": Flaw(lambda f: _truncate(f / MASK), r"^mask_0002-r\.png cannot be decoded"),
    "mask of another size": Flaw(lambda f: _redraw(f / MASK, (5, 7), 255), r"is 5x7, the image \d+x64"),
    "empty mask": Flaw(lambda f: _redraw(f / MASK, _size(f / IMAGE), 0), r"mask mask_0002-r\.png is empty"),
    "deep image": Flaw(
        lambda f: Image.new("I;16", _size(f / MASK), 900).save(f / IMAGE), "holds uint16, expected 8 bits"
    ),
    "image without mask": Flaw(lambda f: (f / MASK).unlink(), r"there is no Masks/mask_0002-r\.png"),
    "mask without image": Flaw(lambda f: (f / IMAGE).unlink(), "a mask without an image"),
    "row without image": Flaw(lambda f: (f / IMAGE).unlink(), r"listed in bus_data\.csv, but there is no such image"),
    "another file": Flaw(
        lambda f: shutil.copy(f / IMAGE, f / ROOT / "Images" / "scan.png"), r"not named bus_CASE-VIEW\.png"
    ),
    "no table": Flaw(lambda f: (f / TABLE).unlink(), r"not BUS-BRA: no folders Images and Masks with bus_data\.csv"),
    "table that is no text": Flaw(
        lambda f: (f / TABLE).write_bytes(b"\xff\xfe\x00\x01"), r"bus_data\.csv cannot be decoded"
    ),
    "table without pathology": Flaw(
        _rewrite(lambda t: without_column(t, "Pathology")),
        r"has no column 'Pathology'; it has ID, Case, Histology, BIRADS",
    ),
    "image not in the table": Flaw(
        _rewrite(lambda t: [row for row in t if row[0] != NAME]), r"bus_data\.csv has no row"
    ),
    "row listed twice": Flaw(_rewrite(lambda t: [*t, t[1]]), r"row 24: ID 'bus_0001-l' is listed more than once"),
    "unknown pathology": Flaw(
        _rewrite(lambda t: with_value(t, NAME, "Pathology", "normal")),
        "unknown Pathology 'normal' .* known: benign, malignant",
    ),
    "unknown BI-RADS category": Flaw(
        _rewrite(lambda t: with_value(t, NAME, "BIRADS", "9")), "unknown BIRADS '9' .* known: 2, 3, 4, 5"
    ),
    "no case": Flaw(_rewrite(lambda t: with_value(t, NAME, "Case", "")), "names no Case for this image"),
    "a separator in a value": Flaw(
        lambda f: (f / TABLE).write_text((f / TABLE).read_text().replace("Invasive ductal", "Invasive, ductal")),
        r"bus_data\.csv has 11 values in row 2, but 10 columns",
    ),
    "titles in lower case": Flaw(_rewrite(lambda t: [[title.lower() for title in t[0]], *t[1:]]), None),
    "spaces and other scripts in the path": Flaw(
        lambda f: (f / ROOT).rename(f / "超音波 (Ultraschall) – données"), None
    ),
}
