"""`isic9`: Kaggle's "Skin cancer ISIC", dermoscopic images of nine classes; no masks.

The images come from the ISIC Archive. Read from its root or from the folder above:

    Skin cancer ISIC The International Skin Imaging Collaboration/Train/melanoma/ISIC_0000139.jpg
                                                                  Test/melanoma/ISIC_0000002.jpg

2239 images in Train and 118 in Test, one folder per class (in any case, with spaces, `_` or `-`).
Test is the test split; validation is drawn from Train. An image in both is used in Test; an image
in several classes is not used. JPEG files are RGB; grey and CMYK ones are converted to RGB.

The dataset has no patient or lesion ids, so several images of one lesion are found by content
(`pipeline.dataset.near_duplicates`); near-duplicates of a Test image go to the test split.
Images of one lesion that look different need the metadata of the archive: `metadata: NAME.csv`, a
file in `data.raw_dir` with the columns `image`, `isic_id` or `image_id`, and `lesion_id`, makes the
lesion the group.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from pydantic import Field, field_validator

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject, unread_folders
from maskloom.data_prep.readers.common import decoded_image, eight_bit, files_in, portable_id, reject_as_error
from maskloom.data_prep.readers.file_names import comparable, folder_named, printable, subfolders
from maskloom.data_prep.readers.tables import TableRow, csv_rows
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import say

LABELS = (
    "actinic keratosis",
    "basal cell carcinoma",
    "dermatofibroma",
    "melanoma",
    "nevus",
    "pigmented benign keratosis",
    "seborrheic keratosis",
    "squamous cell carcinoma",
    "vascular lesion",
)
ROOT = "Skin cancer ISIC The International Skin Imaging Collaboration"
SPLIT_OF = {"Train": None, "Test": "test"}
SUFFIXES = (".jpg", ".jpeg")
ID_COLUMNS = ("image", "isic_id", "image_id", "image_name")
SHRUNK = "_downsampled"  # suffix in the ISIC 2019 metadata for downsampled images


class Isic9Options(Options):
    """Source of the groups."""

    metadata: str | None = Field(None, description="CSV file in data.raw_dir with a lesion_id for each image id")

    @field_validator("metadata")
    @classmethod
    def _lies_in_the_raw_folder(cls, name: str | None) -> str | None:
        if name is not None and (PurePath(name).is_absolute() or ".." in PurePath(name).parts):
            raise ValueError(f"{name!r} leads out of data.raw_dir; give a file in it by its relative name")
        return name


class Adapter(DatasetAdapter):
    """Dermoscopic images of nine kinds of skin lesion."""

    Options = Isic9Options
    options: Isic9Options

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are folders Train and Test, and all folders in Train are class names."""
        root = _root_of(raw_dir)
        if root is None:
            return False
        names = [folder.name for folder in _folders(root, "Train")]
        return len(names) > 1 and all(_label_of(name) for name in names)

    def info(self) -> DatasetInfo:
        """Return what is true of every image."""
        return DatasetInfo(
            modality="dermoscopy",
            channels=3,
            mask_classes=("background",),
            palette=((0, 0, 0),),
            labels=LABELS,
            prompt_templates=(
                "dermoscopic image of {finding}",
                "{modality} image of the skin, {label}",
                "close-up {modality} of {finding}",
                "skin lesion under the dermatoscope: {label}",
            ),
            licence="that of each image in the ISIC Archive (CC0, CC-BY or CC-BY-NC)",
            citation="Katanskiy: Skin cancer ISIC, Kaggle, 2019; images of the International Skin Imaging Collaboration (ISIC) Archive",
            homepage="https://www.kaggle.com/datasets/nodoubttome/skin-cancer9-classesisic",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List Train and then Test, class by class, in natural order.

        Raises:
            MaskLoomError: there are no folders Train and Test, or the metadata cannot be used.
        """
        root = self._root()
        lesions = self._lesions()
        files = [
            (half, folder, file) for half in SPLIT_OF for folder in _folders(root, half) for file in files_in(folder)
        ]
        self._check_lesions(lesions, [file for _, _, file in files])
        for half in SPLIT_OF:
            for folder in _folders(root, half):
                yield from unread_folders(folder)
        places: dict[str, list[Path]] = defaultdict(list)
        for _, folder, file in files:
            places[comparable(file.stem)].append(folder)
        for half, folder, file in files:
            label = _label_of(folder.name)
            problem = _problem(file, half, places[comparable(file.stem)])
            if label is None:
                yield Reject(
                    str(file), f"its folder {folder.name!r} is not named after a class; known: {', '.join(LABELS)}"
                )
            elif problem is not None:
                yield Reject(str(file), problem)
            else:
                yield RawItem(
                    sample_id=portable_id(file.stem),
                    path=str(file),
                    label=label,
                    group=lesions.get(_identity(file.name)),
                    split=SPLIT_OF[half],
                    attributes={"finding": f"{'an' if label[0] in 'aeiou' else 'a'} {label}"},
                )

    def load(self, item: RawItem) -> RawImage:
        """Decode an image to (H, W, 3) uint8.

        Raises:
            RejectedSample: the file is unreadable, or has more than 8 bits per channel.
        """
        image, darkened = eight_bit(decoded_image(Path(item.path), turn=True), "RGB")
        return RawImage(image=image, mask=None, darkened=darkened)

    def _lesions(self) -> dict[str, str]:
        """Return the lesion of each image id in the metadata.

        Raises:
            MaskLoomError: the metadata are missing, lack a column, or give an image two lesions.
        """
        if self.options.metadata is None:
            return {}
        assert self.raw_dir is not None
        path = self.raw_dir / self.options.metadata
        with reject_as_error(path, "give another file as data.options.metadata, or none"):
            rows = csv_rows(path, ("lesion_id",))
        id_column = _id_column(path, rows)
        first: dict[str, TableRow] = {}
        for row in rows:
            if not row["lesion_id"]:
                continue
            identity = _identity(row[id_column])
            known = first.setdefault(identity, row)
            if known["lesion_id"] != row["lesion_id"]:
                raise MaskLoomError(
                    f"{path}: rows {known.number} and {row.number}: {id_column} {row[id_column]} has the lesion_id {known['lesion_id']} and "
                    f"{row['lesion_id']}; remove the wrong row"
                )
        return {identity: row["lesion_id"] for identity, row in first.items()}

    def _check_lesions(self, lesions: Mapping[str, str], files: Sequence[Path]) -> None:
        """Check the metadata against the images, and report images without lesion_id.

        Raises:
            MaskLoomError: no image is in the metadata.
        """
        unknown = [file for file in files if _identity(file.name) not in lesions]
        if self.options.metadata is None or not unknown:
            return
        where = f"data.options.metadata={self.options.metadata}"
        if len(unknown) == len(files):
            raise MaskLoomError(
                f"{where}: it has a lesion_id for none of the {len(files)} images (the first: {printable(files[0].name)}); "
                "give the metadata of these images, or none"
            )
        say(
            f"{where}: no lesion_id for {len(unknown)} of {len(files)} images (the first: {printable(unknown[0].name)}); "
            "these are grouped by near-duplicates only"
        )

    def _root(self) -> Path:
        assert self.raw_dir is not None
        root = _root_of(self.raw_dir)
        if root is None:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not ISIC 9 classes: no folders Train and Test here or one level below; "
                f"give the folder {ROOT!r}"
            )
        return root


def _identity(name: str) -> str:
    """Return the archive id of an image from its file name or its name in a table."""
    stem = PurePath(name.replace("\\", "/")).name.removesuffix(" ")
    return comparable(re.sub(r"\.(jpe?g|png)$", "", stem, flags=re.IGNORECASE).removesuffix(SHRUNK))


def _root_of(raw_dir: Path) -> Path | None:
    folders = (raw_dir, *subfolders(raw_dir))
    return next((folder for folder in folders if all(folder_named(folder, half).is_dir() for half in SPLIT_OF)), None)


def _folders(root: Path, half: str) -> list[Path]:
    return subfolders(folder_named(root, half))


def _label_of(folder_name: str) -> str | None:
    words = " ".join(comparable(folder_name).replace("_", " ").replace("-", " ").split())
    return words if words in LABELS else None


def _problem(file: Path, half: str, places: Sequence[Path]) -> str | None:
    """Return why an image is left out, or None.

    Args:
        file: the image.
        half: `Train` or `Test`.
        places: the class folders that hold an image of this name.
    """
    if file.suffix.lower() not in SUFFIXES:
        return "not a JPEG file"
    classes = sorted({_label_of(folder.name) or folder.name for folder in places})
    if len(classes) > 1:
        return f"{file.stem} lies in several classes: {', '.join(classes)}"
    if half == "Train" and any(comparable(folder.parent.name) == "test" for folder in places):
        return f"{file.stem} also lies in Test"
    return None


def _id_column(path: Path, rows: Sequence[Mapping[str, str]]) -> str:
    titles = {title.lower(): title for row in rows[:1] for title in row}
    for name in ID_COLUMNS:
        if name in titles:
            return titles[name]
    raise MaskLoomError(
        f"{path}: no column {' or '.join(ID_COLUMNS)}; it has {', '.join(titles.values()) or 'no rows'}"
    )
