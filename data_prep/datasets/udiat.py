"""`udiat`: breast ultrasound dataset B of the UDIAT Diagnostic Centre (Yap et al. 2018).

There is one lesion per image. Read from its root or from the folder above:

    original/000001.png
    GT/000001.png          lesion mask of the image with this number
    DatasetB.xlsx          one row per image: `Image` (1, 000001 or 000001.png), `Type` (Benign,
                           Malignant); or DatasetB.csv

163 images, 109 benign and 54 malignant. The columns of the table are found by title, or else by
content; classes may be abbreviated (`B`, `M`), Spanish or Portuguese (`Benigno`, `Maligna`). Copies
that sort the images into `original/benign` and `original/malignant` (and possibly the masks) need
no table. There are no patient ids, so groups are found by content
(`pipeline.dataset.near_duplicates`), and no official splits. Labels, classes and colours are
those of `busi`, so it can serve as external test set for that dataset.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject, unread_folders
from maskloom.data_prep.processing.breast_ultrasound import (
    LABELS,
    MASK_CLASSES,
    MODALITY,
    PALETTE,
    PROMPT_TEMPLATES,
    image_with_lesion,
)
from maskloom.data_prep.readers.common import files_in, portable_id, reject_as_error
from maskloom.data_prep.readers.file_names import comparable, entry_named, folder_named, subfolders
from maskloom.data_prep.readers.spreadsheets import xlsx_rows
from maskloom.data_prep.readers.tables import TableRow, csv_rows
from maskloom.pipeline.errors import MaskLoomError

IMAGES, MASKS = ("original",), ("GT",)
TABLES = ("DatasetB.xlsx", "DatasetB.csv")
ID_TITLES = (
    "image",
    "image id",
    "image name",
    "id",
    "filename",
    "file name",
    "file",
    "name",
    "number",
    "imagem",
    "imagen",
)
CLASS_TITLES = ("type", "class", "label", "pathology", "diagnosis", "tumor type", "classe", "clase", "tipo")
CLASS_WORDS = {
    **dict.fromkeys(("benign", "b", "benigno", "benigna"), "benign"),
    **dict.fromkeys(("malignant", "m", "maligno", "maligna"), "malignant"),
}


class Stated(NamedTuple):
    """The class word of an image, and where it was found."""

    word: str
    where: str


class Adapter(DatasetAdapter):
    """Benign and malignant breast ultrasound images with lesion masks."""

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are folders original and GT, and a table or class folders."""
        root = _root_of(raw_dir)
        if root is None:
            return False
        return _present(root, TABLES) is not None or any(_class_folders(folder_named(root, name)) for name in IMAGES)

    def info(self) -> DatasetInfo:
        """Return what is true of every image."""
        return DatasetInfo(
            modality=MODALITY,
            channels=1,
            mask_classes=MASK_CLASSES,
            palette=PALETTE,
            labels=LABELS,
            prompt_templates=PROMPT_TEMPLATES,
            licence="research use under an agreement with its owner, who is asked for it; no open licence",
            citation="Yap, Pons, Martí, Ganau, Sentís, Zwiggelaar, Davison, Martí: Automated breast ultrasound lesions detection using "
            "convolutional neural networks, IEEE Journal of Biomedical and Health Informatics 22(4), 1218-1226, 2018",
            homepage="https://helward.mmu.ac.uk/STAFF/M.Yap/dataset.php",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the images in natural order, and rejects for masks and table rows without an image.

        Raises:
            MaskLoomError: a folder or the table is missing, or the table is malformed.
        """
        root, images_folder, masks_folder = self._folders()
        images, masks = _files_by_class(images_folder), _files_by_class(masks_folder)
        classes = {} if images and all(word for word, _ in images) else _classes_by_id(root)
        images_of, masks_of = _by_id(images), _by_id(masks)
        for word, image in images:
            number = image_id(image.name)
            stated = Stated(word, "its folder") if word else classes.get(number)
            yield _entry(image, images_of[number], masks_of.get(number, []), stated)
        for _, mask in masks:
            if image_id(mask.name) not in images_of:
                yield Reject(str(mask), "a mask without an image")
        for folder in (images_folder, masks_folder):
            yield from unread_folders(folder, CLASS_WORDS)
        for number in classes:
            if number not in images_of:
                yield Reject(
                    str(images_folder / f"{number:0>6}.png"), "listed in the table, but there is no such image"
                )

    def load(self, item: RawItem) -> RawImage:
        """Decode an image (H, W) uint8 and its mask.

        Raises:
            RejectedSample: a file is unreadable, or the mask has another size or is empty.
        """
        return image_with_lesion(Path(item.path), Path(item.mask_paths[0]))

    def _folders(self) -> tuple[Path, Path, Path]:
        """Return the root folder, and its folders of images and masks."""
        assert self.raw_dir is not None
        root = _root_of(self.raw_dir)
        if root is None:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not UDIAT dataset B: no folders original and GT here or one level below;"
                " give the folder that holds them and DatasetB.xlsx"
            )
        images, masks = _present(root, IMAGES), _present(root, MASKS)
        assert images is not None  # _root_of looked
        assert masks is not None
        return root, images, masks


def image_id(text: str) -> str:
    """Return the number in `1`, `1.0`, `000001` or `000001.png`; else a comparable name."""
    number = re.fullmatch(
        r"0*([0-9]+)(\.png|\.bmp|\.jpg|\.0+)?", text.strip(), re.IGNORECASE
    )  # 1.0: a number as pandas writes it
    return number[1] if number else comparable(text)


def _root_of(raw_dir: Path) -> Path | None:
    candidates = [raw_dir, *subfolders(raw_dir)]
    return next((folder for folder in candidates if _present(folder, IMAGES) and _present(folder, MASKS)), None)


def _present(folder: Path, names: Sequence[str]) -> Path | None:
    return next(filter(None, (entry_named(folder, name) for name in names)), None)


def _class_folders(folder: Path) -> list[Path]:
    return [path for path in subfolders(folder) if comparable(path.name) in CLASS_WORDS]


def _files_by_class(folder: Path) -> list[tuple[str | None, Path]]:
    """Return the files of a folder (with None) and of its class folders (with their name)."""
    loose: list[tuple[str | None, Path]] = [(None, file) for file in files_in(folder)]
    return loose + [(inner.name, file) for inner in _class_folders(folder) for file in files_in(inner)]


def _by_id(files: Sequence[tuple[str | None, Path]]) -> dict[str, list[Path]]:
    of_id: dict[str, list[Path]] = defaultdict(list)
    for _, file in files:
        of_id[image_id(file.name)].append(file)
    return dict(of_id)


def _entry(image: Path, same_id: Sequence[Path], masks: Sequence[Path], stated: Stated | None) -> RawItem | Reject:
    problem = _problem(image, same_id, masks, stated)
    if problem is not None:
        return Reject(str(image), problem)
    assert stated is not None
    return RawItem(
        sample_id=portable_id(image.stem),
        path=str(image),
        mask_paths=(str(masks[0]),),
        label=CLASS_WORDS[stated.word.lower()],
    )


def _problem(image: Path, same_id: Sequence[Path], masks: Sequence[Path], stated: Stated | None) -> str | None:
    if image.suffix.lower() != ".png":
        return "not a PNG file"
    if len(same_id) > 1:
        return f"{len(same_id)} images have this number: {_names(same_id)}"
    if len(masks) != 1:
        return (
            f"several masks belong to this image: {_names(masks)}" if masks else "no mask in GT belongs to this image"
        )
    if stated is None:
        return "DatasetB has no row for this image"
    if stated.word.lower() not in CLASS_WORDS:
        return f"unknown class {stated.word!r} in {stated.where}; known: {', '.join(LABELS)}"
    return None


def _names(files: Sequence[Path]) -> str:
    return ", ".join(f"{file.parent.name}/{file.name}" for file in files)


def _classes_by_id(root: Path) -> dict[str, Stated]:
    """Return the class word of each image id in the table.

    Raises:
        MaskLoomError: the table is missing, unreadable, lacks a column, or names an image twice.
    """
    path = _present(root, TABLES)
    if path is None:
        raise MaskLoomError(
            f"{root}: no DatasetB.xlsx (or DatasetB.csv), which says what is benign and what malignant; put it beside original and GT"
        )
    with reject_as_error(path, "restore the file from the dataset"):
        rows = xlsx_rows(path) if path.suffix.lower() == ".xlsx" else csv_rows(path, ())
    id_column = _column(path, rows, ID_TITLES, lambda value: image_id(value).isdecimal(), "image numbers")
    class_column = _column(path, rows, CLASS_TITLES, lambda value: value.lower() in CLASS_WORDS, "classes")
    first: dict[str, TableRow] = {}
    for row in rows:
        if not row[id_column]:  # a line of sums
            continue
        known = first.setdefault(image_id(row[id_column]), row)
        if known is not row:
            raise MaskLoomError(
                f"{path}: row {row.number}: {id_column} {row[id_column]!r} is listed more than once (first in row {known.number}); "
                "remove the wrong row"
            )
    return {number: Stated(row[class_column], f"row {row.number} of {path.name}") for number, row in first.items()}


def _column(
    path: Path, rows: Sequence[Mapping[str, str]], titles: Sequence[str], fits: Callable[[str], bool], content: str
) -> str:
    """Return the column with the first matching title, else the only column whose values all fit.

    Raises:
        MaskLoomError: there is no such column, or several fit.
    """
    columns = list(rows[0]) if rows else []
    titled = {column.lower().replace("_", " "): column for column in columns if any(fits(row[column]) for row in rows)}
    for title in titles:
        if title in titled:
            return titled[title]
    fitting = [column for column in columns if all(fits(row[column]) for row in rows)]
    if len(fitting) != 1:
        raise MaskLoomError(
            f"{path}: {'no' if not fitting else 'more than one'} column of {content} among {', '.join(columns) or 'none'}; "
            f"name it {titles[0]!r}"
        )
    return fitting[0]
