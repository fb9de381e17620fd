"""`pannuke`: PanNuke (Gamper et al. 2019, 2020), H&E patches of 19 tissues with outlined nuclei.

The dataset has 190,000 nuclei of five kinds. Three layouts are read, from the folder of the folds,
the folder above, or a single fold, in any case; `Fold 1`, `fold_1`, `fold-1` and `fold1` are
equivalent:

    Fold 1/images/fold1/images.npy     fold1/images/images.npy     fold1/images.npy
                        types.npy                   types.npy            types.npy
           masks/fold1/masks.npy             masks/masks.npy             masks.npy

    images.npy  (N, 256, 256, 3), values 0..255, released as float64; any number type is read
    types.npy   (N,) unicode, the tissue
    masks.npy   (N, 256, 256, 6), released as float64: channels 0..4 hold instance ids, 0 = none:
                neoplastic, inflammatory, connective, dead, epithelial. Channel 5, the background,
                is redundant and not used.

Folds numbered 0..2 are treated as folds 1..3. The arrays are memory-mapped and read patch by patch.

Masks (`data.options.masks`):
  - `semantic`: the five kinds. If nuclei of two kinds overlap, the later channel counts (as in
    `binarize` of the authors' PanNuke-metrics).
  - `binary`: nuclei.
  - `boundary`: interior of nuclei, and their outermost pixels (scikit-image `find_boundaries`, mode
    `inner`, on the ids of each channel), which separate touching nuclei.
Patches without nuclei are part of the dataset; their masks are all background.

Splits: the three folds, by default 1 train, 2 validation, 3 test. The authors rotate them;
`data.options.fold1=test` and so on does the same. The release names neither patients nor slides, so
there are no groups, and patches of one slide may be in several folds. Identical patches are
searched for; `data.duplicates=near` also searches near-duplicates, which has not been validated on
stained tissue.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject
from maskloom.data_prep.readers.common import npy_array, reject_as_error, unreadable_as_reject
from maskloom.data_prep.readers.file_names import entry_named, subfolders
from maskloom.data_prep.readers.npz_rows import MAX_HEADER_BYTES, npy_header
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

HOMEPAGE = "https://warwick.ac.uk/fac/cross_fac/tia/data/pannuke"
TISSUES = {
    "adrenalgland": "adrenal gland",
    "bileduct": "bile duct",
    "bladder": "bladder",
    "breast": "breast",
    "cervix": "cervix",
    "colon": "colon",
    "esophagus": "esophagus",
    "headneck": "head and neck",
    "kidney": "kidney",
    "liver": "liver",
    "lung": "lung",
    "ovarian": "ovary",
    "pancreatic": "pancreas",
    "prostate": "prostate",
    "skin": "skin",
    "stomach": "stomach",
    "testis": "testis",
    "thyroid": "thyroid",
    "uterus": "uterus",
}
"""Tissue in `types.npy`, lower-case letters only -> label."""
KINDS = 5  # of nuclei; the channels before the background
MASK_CLASSES = {
    "semantic": (
        "background",
        "neoplastic nuclei",
        "inflammatory nuclei",
        "connective tissue nuclei",
        "nuclei of dead cells",
        "epithelial nuclei",
    ),
    "binary": ("background", "nuclei"),
    "boundary": ("background", "nuclei", "nuclear boundaries"),
}
PALETTE = ((0, 0, 0), (255, 80, 80), (80, 220, 80), (80, 140, 255), (255, 225, 60), (255, 150, 50))
MAX_TYPES_BYTES = 2**24
FOLD_NAME = re.compile(r"fold[ _-]?(?P<number>\d+)", re.IGNORECASE)
INNER_FOLDERS = ("images", "masks")
LEVELS = 4  # of folders between the raw folder and the arrays

SplitName = Literal["train", "validation", "test"]


class PanNukeOptions(Options):
    """Content of masks, and split of each fold."""

    masks: Literal["semantic", "binary", "boundary"] = Field(
        "semantic", description="semantic: five kinds of nuclei; binary: nuclei; boundary: nuclei and their boundaries"
    )
    fold1: SplitName = Field("train", description="split of fold 1 (fold 0 where folds are numbered from 0)")
    fold2: SplitName = Field("validation", description="split of fold 2")
    fold3: SplitName = Field("test", description="split of fold 3")


@dataclass(frozen=True)
class Fold:
    """The files of one fold."""

    number: int
    images: Path
    types: Path
    masks: Path


class Row(NamedTuple):
    """Location of an item: the arrays of its fold, and the row."""

    images: str
    masks: str
    row: int


class Adapter(DatasetAdapter):
    """H&E patches labelled by tissue, with masks of nuclei."""

    Options = PanNukeOptions
    options: PanNukeOptions

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are images.npy and masks.npy of a fold."""
        return bool(_arrays_of(raw_dir, "images.npy")) and bool(_arrays_of(raw_dir, "masks.npy"))

    def info(self) -> DatasetInfo:
        """Return what is true of every patch."""
        classes = MASK_CLASSES[self.options.masks]
        return DatasetInfo(
            modality="H&E histology patch",
            channels=3,
            mask_classes=classes,
            palette=PALETTE[: len(classes)],
            labels=tuple(TISSUES.values()),
            prompt_templates=(
                "{modality} of {label} tissue",
                "{label} tissue, {modality}, 40x magnification",
                "{modality} of {label} tissue, with {mask_classes}",
                "{mask_classes} in {label} tissue, {modality}",
                "{modality}, {label}, showing {mask_classes}",
            ),
            licence="CC-BY-NC-SA-4.0",
            citation=(
                "Gamper, Koohbanani, Benet, Khuram, Rajpoot: PanNuke: an open pan-cancer histology dataset for nuclei instance segmentation "
                "and classification, European Congress on Digital Pathology, 11-19, 2019; Gamper et al.: PanNuke dataset extension, insights "
                "and baselines, arXiv:2003.10778, 2020"
            ),
            homepage=HOMEPAGE,
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the patches of each fold in order, after checking the arrays of all folds.

        Raises:
            MaskLoomError: there is no fold, or an array is missing, damaged, of another shape, or
                pickled.
        """
        tissues = {fold: _checked_tissues(fold) for fold in self._folds()}
        for fold, names in tissues.items():
            split = getattr(self.options, f"fold{fold.number}")
            for row, name in enumerate(names):
                yield _entry(fold, row, name, split)

    def load(self, item: RawItem) -> RawImage:
        """Return a patch, (H, W, 3) uint8, and its mask.

        Raises:
            RejectedSample: an array can no longer be read, or has values that are not valid colours
                or instance ids.
        """
        place = Row(*item.key)
        image = _colours(_row_of(Path(place.images), place.row))
        instances = _instance_ids(_row_of(Path(place.masks), place.row)[..., :KINDS])
        return RawImage(image=image, mask=_MASKS[self.options.masks](instances))

    def _folds(self) -> list[Fold]:
        """Return the folds in the order of their numbers."""
        assert self.raw_dir is not None
        found = {name: _by_fold(_arrays_of(self.raw_dir, f"{name}.npy")) for name in ("images", "types", "masks")}
        numbers = sorted(found["images"].keys() | found["masks"].keys())
        if not numbers:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not PanNuke: no images.npy and masks.npy in folders named as folds (Fold 1/images/fold1, fold1, "
                f"...) here or one level below; give the folder that holds the unpacked folds of {HOMEPAGE}"
            )
        for number in numbers:
            for name, files in found.items():
                if number not in files:
                    present = next(files[number] for files in found.values() if number in files)
                    raise MaskLoomError(
                        f"data.raw_dir={self.raw_dir}: fold {number} has no {name}.npy (it has {present}); unpack the whole fold again"
                    )
        first = 0 if 0 in numbers else 1
        if numbers[-1] - first > 2:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: folds {', '.join(map(str, numbers))}: expected three, numbered 1..3 or 0..2; take out the others"
            )
        return [Fold(n - first + 1, found["images"][n], found["types"][n], found["masks"][n]) for n in numbers]


def _arrays_of(raw_dir: Path, name: str) -> list[tuple[int, Path]]:
    """Return the files of a name with their folds, below `raw_dir` or else one level deeper."""
    found = list(_found_below(raw_dir, name, LEVELS))
    if not found:
        others = (folder for folder in subfolders(raw_dir) if not _is_ours(folder))
        found = [file for folder in others for file in _found_below(folder, name, LEVELS)]
    numbered = ((_fold_number(file, raw_dir), file) for file in found)
    return [(number, file) for number, file in numbered if number is not None]


def _found_below(folder: Path, name: str, levels: int) -> Iterator[Path]:
    file = entry_named(folder, name)
    if file is not None and file.is_file():
        yield file
    for inner in subfolders(folder) if levels else []:
        if _is_ours(inner):
            yield from _found_below(inner, name, levels - 1)


def _is_ours(folder: Path) -> bool:
    return folder.name.lower() in INNER_FOLDERS or FOLD_NAME.fullmatch(folder.name) is not None


def _fold_number(file: Path, raw_dir: Path) -> int | None:
    """Return the number of the nearest folder that is named as a fold, up to `raw_dir`."""
    parts = (raw_dir.resolve().name, *file.parent.relative_to(raw_dir).parts)
    names = (FOLD_NAME.fullmatch(part) for part in reversed(parts))
    return next((int(name["number"]) for name in names if name), None)


def _by_fold(files: list[tuple[int, Path]]) -> dict[int, Path]:
    """Return the file of each fold.

    Raises:
        MaskLoomError: a fold has two.
    """
    found: dict[int, Path] = {}
    for number, file in files:
        if found.setdefault(number, file) != file:
            raise MaskLoomError(
                f"{file}: fold {number} has this file twice (also {found[number]}); take one of them out"
            )
    return found


def _checked_tissues(fold: Fold) -> list[str]:
    """Return the tissues of a fold's patches, after checking the consistency of its arrays.

    Raises:
        MaskLoomError: an array is unreadable, or the shapes do not match.
    """
    arrays = []
    for path, channels in ((fold.images, 3), (fold.masks, KINDS + 1)):
        with reject_as_error(path, "unpack the fold again"):
            array = npy_array(path, ndim=4, kinds="iuf", memory_map=True)
            if array.shape[3] != channels:
                raise RejectedSample(f"it has shape {array.shape}, expected (N, height, width, {channels})")
            arrays.append(array)
    images, masks = arrays
    if images.shape[:3] != masks.shape[:3]:
        raise MaskLoomError(
            f"{fold.images} has shape {images.shape}, {fold.masks} {masks.shape}: they must agree in number, height and width; "
            "unpack the fold again"
        )
    with reject_as_error(fold.types, "unpack the fold again"):
        words = _words(fold.types)
    if len(words) != len(images):
        raise MaskLoomError(
            f"{fold.types} has {len(words)} tissues, {fold.images} {len(images)} patches (shape {images.shape}); unpack the fold again"
        )
    return words


def _words(path: Path) -> list[str]:
    """Return the strings of an `.npy` file.

    Raises:
        RejectedSample: it is unreadable, pickled, or not a list of strings.
    """
    with unreadable_as_reject(path):
        with path.open("rb") as file:
            dtype = npy_header(file.read(MAX_HEADER_BYTES))[2]
        if dtype.hasobject:
            raise RejectedSample(
                "it is pickled (dtype object), which is not read, for unpickling can run code; if you trust the file, convert it: "
                f"t = numpy.load('{path.name}', allow_pickle=True); numpy.save('{path.name}', t.astype(str))"
            )
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind != "U" or array.ndim != 1 or array.nbytes > MAX_TYPES_BYTES:
            raise RejectedSample(f"it holds {array.dtype} of shape {array.shape}, expected one word per patch")
        codes = np.array(array).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if codes.max(initial=0) > sys.maxunicode:  # numpy would create an invalid Python string
            raise RejectedSample("it holds characters that do not exist")
        return [str(word) for word in array]


def _entry(fold: Fold, row: int, word: str, split: str) -> RawItem | Reject:
    path = f"{fold.images}#row={row}"
    label = TISSUES.get(re.sub(r"[^a-z]", "", word.lower()))
    if label is None:
        return Reject(
            path, f"unknown tissue {word!r} in row {row} of {fold.types.name}; known: {', '.join(TISSUES.values())}"
        )
    return RawItem(
        sample_id=f"fold{fold.number}-{row:04d}",
        path=path,
        mask_paths=(str(fold.masks),),
        label=label,
        split=split,
        key=Row(str(fold.images), str(fold.masks), row),
    )


def _row_of(path: Path, row: int) -> NDArray[Any]:
    """Return a row of an array on disk.

    Raises:
        RejectedSample: the file changed since it was listed.
    """
    array = npy_array(path, ndim=4, kinds="iuf", memory_map=True)
    with unreadable_as_reject(path):
        return np.array(array[row])


def _colours(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return 0..255 as uint8, fractions rounded.

    Raises:
        RejectedSample: values lie outside 0..255, or all within 0..1 as if scaled.
    """
    if not np.isfinite(values).all():
        raise RejectedSample("the image holds NaN or infinite values")
    low, high = values.min(), values.max()
    if low < 0 or high > 255:
        raise RejectedSample(f"the image holds values {low:g}..{high:g}, expected 0..255")
    if high <= 1 and (values % 1).any():
        raise RejectedSample(
            f"the image holds fractions {low:g}..{high:g}, expected 0..255; multiply images.npy by 255"
        )
    return np.rint(values).astype(np.uint8)


def _instance_ids(values: NDArray[Any]) -> NDArray[np.int32]:
    """Return instance ids as int32.

    Raises:
        RejectedSample: a value is negative, a fraction, not finite, or too large.
    """
    numbers = values.astype(np.float64)
    wrong = numbers[~((numbers >= 0) & (numbers < 2**31) & (np.floor(numbers) == numbers))]
    if wrong.size:
        raise RejectedSample(f"the mask holds {wrong[0]:g}, expected instance ids: 0 and whole numbers above")
    return values.astype(np.int32)


def _semantic(instances: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return 1 + the last channel with a nucleus, 0 without one."""
    mask = np.zeros(instances.shape[:2], np.uint8)
    for kind in range(KINDS):
        mask[instances[..., kind] > 0] = kind + 1
    return mask


def _binary(instances: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return 1 where any channel has a nucleus, else 0."""
    return np.any(instances > 0, axis=2).astype(np.uint8)


def _boundary(instances: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return 1 inside nuclei and 2 on their outermost pixels."""
    from skimage.segmentation import find_boundaries

    mask = _binary(instances)
    for kind in range(KINDS):
        mask[find_boundaries(instances[..., kind], mode="inner")] = 2
    return mask


_MASKS = {"semantic": _semantic, "binary": _binary, "boundary": _boundary}
