"""`busbra`: BUS-BRA, breast ultrasound of biopsied lesions with BI-RADS (Gómez-Flores et al. 2024).

Read from its root or from the folder above:

    BUSBRA/Images/bus_0001-l.png      -l, -r: two views of a case; -s: a single view
           Masks/mask_0001-l.png      the lesion
           bus_data.csv               ID, Case, Histology, Pathology, BIRADS, Device, Width, Height,
                                      Side, BBOX
           5-fold-cv.csv              ID, Pathology, kFold (1..5), valid_1..valid_5
           10-fold-cv.csv

1875 images of 1064 patients, 722 benign and 342 malignant cases. The group is `Case`, the patient.
`Side` (left, right, single) is not documented as the side of the body, and the two views of a case
show similar lesions in similar positions, so prompts call it a view, and only if `attributes`
includes it. Labels, classes and colours are those of `busi`, so it can serve as external test set
for that dataset.

`folds: 5` (or 10) and `test_fold: 1` use the published split: images with `kFold` 1 form the test
split; of the others, those with `valid_1` 0 form the validation split and those with 1 the training
split (as in the authors' code). With `validation_fold: 2`, the images with `kFold` 2 form the
validation split instead. `kFold` keeps cases together. The columns `valid_…` are drawn per image,
so a case may have one view with 0 and one with 1. The first view (in the order of the IDs: `-l`
before `-r`) then decides for the whole case, which preserves the validation share and loses no
image. If `kFold` of a copy splits a case that is partly test, its other views are left out and
listed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject, unread_folders
from maskloom.data_prep.processing.breast_ultrasound import (
    LABELS,
    MASK_CLASSES,
    MODALITY,
    PALETTE,
    PROMPT_TEMPLATES,
    image_with_lesion,
)
from maskloom.data_prep.readers.common import files_in, portable_id, reject_as_error
from maskloom.data_prep.readers.file_names import Names, entry_named, folder_named, subfolders
from maskloom.data_prep.readers.tables import TableRow, csv_rows, whole_number, wrong_value
from maskloom.pipeline.errors import MaskLoomError, RejectedSample, one_line

GROUPS = "patients"
RESTORE = "restore the file from the dataset"
ROOT, TABLE = "BUSBRA", "bus_data.csv"
IMAGE_NAME = re.compile(r"bus_(.+\.png)", re.IGNORECASE)
FOLD_TITLES = ("kfold", "fold", "k fold", "k-fold", "k_fold")
BIRADS, SIDES = ("2", "3", "4", "5"), ("left", "right", "single")
LONGEST_WORDS = 60
Attribute = Literal["birads", "device", "histology", "side"]
COLUMN_OF: Mapping[Attribute, str] = {
    "birads": "BIRADS", "device": "Device", "histology": "Histology", "side": "Side"
}  # fmt: skip
TEMPLATES_WITH: Mapping[Attribute, tuple[str, ...]] = {
    "birads": (
        "BI-RADS {birads} {modality} image, {label} lesion",
        "{modality}, BI-RADS {birads}: {size} {shape} {label} lesion, {place}",
    ),
    "device": ("{modality} image of a {label} lesion, {device} scanner",),
    "histology": ("{modality} image of a {label} lesion, histology: {histology}",),
    "side": ("{modality} image of a {label} lesion, {side} view",),
}


class BusbraOptions(Options):
    """Published split, and attributes in prompts."""

    folds: Literal[5, 10] | None = Field(
        None, description="use the splits of 5-fold-cv.csv or 10-fold-cv.csv; null: data.splits"
    )
    test_fold: int | None = Field(None, description="fold that is the test split")
    validation_fold: int | None = Field(
        None, description="fold that is the validation split; null: as the file says for this test fold"
    )
    attributes: list[Attribute] = Field(
        default=["birads", "device"], description="columns of bus_data.csv to use in prompts"
    )

    @model_validator(mode="after")
    def _folds_exist(self) -> "BusbraOptions":
        if self.folds is None:
            if self.test_fold is not None or self.validation_fold is not None:
                raise ValueError("test_fold and validation_fold need folds=5 or folds=10")
            return self
        if self.test_fold is None:
            raise ValueError(f"folds={self.folds} needs test_fold, 1..{self.folds}")
        for fold in (self.test_fold, self.validation_fold):
            if fold is not None and not 1 <= fold <= self.folds:
                raise ValueError(f"there is no fold {fold}: folds={self.folds} has 1..{self.folds}")
        if self.test_fold == self.validation_fold:
            raise ValueError(f"test_fold and validation_fold are both {self.test_fold}; they must differ")
        return self


class Adapter(DatasetAdapter):
    """Breast ultrasound images of biopsied lesions with masks, pathology and BI-RADS."""

    Options = BusbraOptions
    options: BusbraOptions

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are folders Images and Masks and the table bus_data.csv."""
        root = _root_of(raw_dir)
        return root is not None and folder_named(root, TABLE).is_file()

    def info(self) -> DatasetInfo:
        """Return what is true of every image."""
        return DatasetInfo(
            modality=MODALITY,
            channels=1,
            mask_classes=MASK_CLASSES,
            palette=PALETTE,
            labels=LABELS,
            prompt_templates=(
                *PROMPT_TEMPLATES, *(text for name in dict.fromkeys(self.options.attributes) for text in TEMPLATES_WITH[name])
            ),
            licence="CC-BY-4.0",
            citation="Gómez-Flores, Gregorio-Calas, Coelho de Albuquerque Pereira: BUS-BRA: A breast ultrasound dataset for assessing "
            "computer-aided diagnosis systems, Medical Physics 51(4), 3110-3123, 2024",
            homepage="https://doi.org/10.5281/zenodo.8231412",
            duplicates="identical",
        )  # fmt: skip

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the images in natural order, and rejects for masks and table rows without an image.

        Raises:
            MaskLoomError: a folder or a table is missing, or a table is malformed.
        """
        root = self._root()
        rows = _rows_by_id(
            folder_named(root, TABLE),
            ("ID", "Case", "Pathology", *(COLUMN_OF[name] for name in self.options.attributes)),
        )
        splits = self._splits_by_id(root, rows)
        images = files_in(folder_named(root, "Images"))
        masks = {file.name: file for file in files_in(folder_named(root, "Masks"))}
        mask_names, identities = Names(masks), Names(rows)
        for image in images:
            of_mask, identity = mask_names.find(_mask_name(image)), identities.find(image.stem)
            try:
                yield self._item(image, masks.pop(of_mask or "", None), rows.pop(identity or "", None), splits)
            except RejectedSample as error:
                yield Reject(str(image), str(error))
        for mask in masks.values():
            yield Reject(str(mask), "a mask without an image")
        for name in ("Images", "Masks"):
            yield from unread_folders(folder_named(root, name))
        for identity in rows:
            yield Reject(str(root / "Images" / f"{identity}.png"), f"listed in {TABLE}, but there is no such image")

    def load(self, item: RawItem) -> RawImage:
        """Decode an image (H, W) uint8 and its mask.

        Raises:
            RejectedSample: a file is unreadable, or the mask has another size or is empty.
        """
        return image_with_lesion(Path(item.path), Path(item.mask_paths[0]))

    def _item(
        self, image: Path, mask: Path | None, row: TableRow | None, splits: Mapping[str, str | None] | None
    ) -> RawItem:
        """Return the item of one image.

        Raises:
            RejectedSample: the image has no mask, no row, no fold, or unknown values.
        """
        if not IMAGE_NAME.fullmatch(image.name):
            raise RejectedSample("not named bus_CASE-VIEW.png")
        if mask is None:
            raise RejectedSample(f"there is no Masks/{_mask_name(image)}")
        if row is None:
            raise RejectedSample(f"{TABLE} has no row for this image")
        if splits is not None and image.stem not in splits:
            raise RejectedSample(f"{self.options.folds}-fold-cv.csv has no row for this image")
        if not row["Case"]:
            raise RejectedSample(f"{TABLE} names no Case for this image, so nothing says whose it is")
        words = {name: _words(row, name) for name in self.options.attributes}
        return RawItem(
            sample_id=portable_id(image.stem),
            path=str(image),
            mask_paths=(str(mask),),
            label=_one_of(LABELS, row, "Pathology"),
            group=f"case-{row['Case']}",
            split=None if splits is None else splits[image.stem],
            attributes={name: word for name, word in words.items() if word},
        )

    def _splits_by_id(self, root: Path, cases: Mapping[str, TableRow]) -> dict[str, str | None] | None:
        """Return the split of each image by the chosen folds, None if left open; None without
        folds.

        Args:
            root: folder of the tables.
            cases: rows of the table of cases by image id.

        Raises:
            MaskLoomError: the file of the folds is missing or malformed.
        """
        options = self.options
        if options.folds is None:
            return None
        path = root / f"{options.folds}-fold-cv.csv"
        rows = _rows_by_id(path, ("ID",))
        titles = {title.lower(): title for row in rows.values() for title in row}
        title = next((titles[title] for title in FOLD_TITLES if title in titles), None)
        if title is None:
            raise MaskLoomError(f"{path}: no column kFold; it has {', '.join(titles.values()) or 'no rows'}")
        folds = {identity: _number_in(row, title, range(1, options.folds + 1), path) for identity, row in rows.items()}
        absent = {options.test_fold, options.validation_fold} - {None, *folds.values()}
        if absent:
            raise MaskLoomError(f"{path}: no image is in fold {absent.pop()}; {RESTORE}")
        valid_title = titles.get(f"valid_{options.test_fold}")
        splits = {identity: self._split(folds[identity], row, valid_title, path) for identity, row in rows.items()}
        return _whole_cases(splits, {identity: row["Case"] for identity, row in cases.items()})

    def _split(self, fold: int, row: TableRow, valid_title: str | None, path: Path) -> str | None:
        if fold == self.options.test_fold:
            return "test"
        if self.options.validation_fold is not None:
            return "validation" if fold == self.options.validation_fold else "train"
        if valid_title is None:
            return None
        return "train" if _number_in(row, valid_title, range(2), path) else "validation"

    def _root(self) -> Path:
        assert self.raw_dir is not None
        root = _root_of(self.raw_dir)
        if root is None:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not BUS-BRA: no folders Images and Masks with {TABLE} here or in {ROOT}; "
                "give the folder that holds them"
            )
        return root


def _root_of(raw_dir: Path) -> Path | None:
    folders = (raw_dir, raw_dir / ROOT, *subfolders(raw_dir))
    return next(
        (f for f in folders if all(entry_named(f, name) is not None for name in ("Masks", "Images", TABLE))), None
    )


def _mask_name(image: Path) -> str:
    return IMAGE_NAME.sub(r"mask_\1", image.name)


def _rows_by_id(path: Path, columns: Sequence[str]) -> dict[str, TableRow]:
    """Return the rows of a table by image id.

    Raises:
        MaskLoomError: the table is missing, unreadable, lacks a column, or names an image twice.
    """
    with reject_as_error(path, RESTORE):
        rows = csv_rows(path, columns)
    of_id: dict[str, TableRow] = {}
    for row in rows:
        identity = row["ID"].removesuffix(".png")
        if not identity:
            raise wrong_value(path, row, "ID", "the name of an image", RESTORE)
        first = of_id.setdefault(identity, row)
        if first is not row:
            raise MaskLoomError(
                f"{path}: row {row.number}: ID {identity!r} is listed more than once (first in row {first.number}); {RESTORE}"
            )
    return of_id


def _whole_cases(splits: Mapping[str, str | None], case_of: Mapping[str, str]) -> dict[str, str | None]:
    """Return the splits with every case entirely in train or validation, as its first view.

    Args:
        splits: split of each image.
        case_of: case of each image.
    """
    drawn: dict[str, str | None] = {}
    for identity in sorted(splits):
        if splits[identity] != "test":
            drawn.setdefault(case_of.get(identity, identity), splits[identity])
    return {
        identity: split if split == "test" else drawn[case_of.get(identity, identity)]
        for identity, split in splits.items()
    }


def _number_in(row: TableRow, title: str, allowed: range, path: Path) -> int:
    """Return an integer of a table, also when written as `1.0` (MATLAB).

    Raises:
        MaskLoomError: the value is not an integer, or not allowed.
    """
    number = whole_number(row[title])
    if number is None or number not in allowed:
        raise wrong_value(path, row, title, f"{allowed[0]}..{allowed[-1]}", RESTORE, of=row["ID"])
    return number


def _words(row: TableRow, name: Attribute) -> str:
    """Return the prompt text of a column; empty for an empty cell.

    Raises:
        RejectedSample: the value is unknown, or not a short text.
    """
    column = COLUMN_OF[name]
    text = one_line(row[column])
    if not text:
        return ""
    if name == "birads":
        return _one_of(BIRADS, row, column, str(whole_number(text)))
    if name == "side":
        return _one_of(SIDES, row, column)
    if len(text) > LONGEST_WORDS or not text.isprintable():
        raise RejectedSample(f"{column} in row {row.number} of {TABLE} is no short text: {text[:20]!r}")
    return text.lower() if name == "histology" else text


def _one_of(known: Sequence[str], row: TableRow, column: str, value: str | None = None) -> str:
    """Return a value in lower case, after checking it against the known values.

    Args:
        known: the known values.
        row: row of the table of cases.
        column: column of the value.
        value: the value, if it differs from the cell.

    Raises:
        RejectedSample: the value is unknown.
    """
    found = (row[column] if value is None else value).lower()
    if found not in known:
        raise RejectedSample(
            f"unknown {column} {row[column]!r} in row {row.number} of {TABLE}; known: {', '.join(known)}"
        )
    return found
