"""`medmnist`: the 12 two-dimensional sets of MedMNIST v2 and MedMNIST+ (Yang et al. 2023).

Each set and size is one `.npz` file of standardised images:

    pathmnist.npz (28 x 28), pathmnist_64.npz, pathmnist_128.npz, pathmnist_224.npz
      train_images, val_images, test_images   (N, S, S) or (N, S, S, 3) uint8
      train_labels, val_labels, test_labels   (N, 1) integers; chestmnist (N, 14) of 0 and 1

The folder may contain files of several sets and sizes; `data.options.flag` and `data.options.size`
select one. Files are searched in the raw folder and one level below. They are read row by row
(`data_prep.readers.npz_rows`), because the train images of pathmnist_224 have 13.5 GB. Listing
decompresses each array once to verify its checksum, so that a damaged download is reported first.

Splits: those of the file (`val` is validation). There are no patient, slide or volume ids and hence
no groups, so leakage between the published splits remains. Labels: `SETS`; names are those of the
package medmnist 3.0.2 (`medmnist/info.py`), spelled out where they are numbers or lists. There are
no masks: use `data.conditioning=edges`.

Known issues of the sets:
  - dermamnist: its random split has images of one lesion, and identical images, in several splits
    (Abhishek et al., Scientific Data 12, 196, 2025, who propose DermaMNIST-C). Identical pixels are
    found here; for the others set `data.duplicates=near`, or use HAM10000 with lesion ids.
  - breastmnist is BUSI (dataset `busi`) with normal and benign as one class; 0 is malignant. Do not
    train on one of them and test on the other.
  - retinamnist: the package only numbers the grades 0..4; the names are those of the international
    clinical scale, which its source DeepDRiD uses.
  - chestmnist: labels were mined from reports; an image has several findings or none.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject
from maskloom.data_prep.readers.common import files_in, reject_as_error
from maskloom.data_prep.readers.file_names import comparable, subfolders
from maskloom.data_prep.readers.npz_rows import check_npz_array, npz_header, npz_row, npz_table
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

DOWNLOAD = "https://zenodo.org/records/10519652"
MEDMNIST = (
    "Yang, Shi, Wei, Liu, Zhao, Ke, Pfister, Ni: MedMNIST v2 - A large-scale lightweight benchmark for 2D and 3D biomedical image "
    "classification, Scientific Data 10, 41, 2023"
)
KERMANY = "Kermany et al.: Identifying medical diagnoses and treatable diseases by image-based deep learning, Cell 172(5), 1122-1131, 2018"
LITS = (
    "Bilic et al.: The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 84, 102680, 2023; "
    "Xu, Zhou, Liu, Fu, Bai: Efficient multiple organ localization in CT image using 3D region proposal network, "
    "IEEE Transactions on Medical Imaging 38(8), 1885-1898, 2019"
)
SPLIT_NAMES = {"train": "train", "val": "validation", "test": "test"}
MULTI_LABEL = "chestmnist"


@dataclass(frozen=True)
class MedSet:
    """Description of one set.

    Attributes:
        modality: name of the imaging method.
        channels: 1 or 3.
        classes: class name -> its text in a prompt, in the order of the label values.
        source: citation of the source of the images.
        licence: licence stated in `medmnist/info.py`.
    """

    modality: str
    channels: Literal[1, 3]
    classes: dict[str, str]
    source: str
    licence: str = "CC-BY-4.0"


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


ORGANS = {
    "bladder": "the bladder",
    "left femur": "the left femur",
    "right femur": "the right femur",
    "heart": "the heart",
    "left kidney": "the left kidney",
    "right kidney": "the right kidney",
    "liver": "the liver",
    "left lung": "the left lung",
    "right lung": "the right lung",
    "pancreas": "the pancreas",
    "spleen": "the spleen",
}

# Order of the classes, channels and licences: medmnist 3.0.2, medmnist/info.py.
SETS = {
    "pathmnist": MedSet(
        "H&E histology of colorectal tissue",
        3,
        {
            "adipose": "adipose tissue",
            "background": "background without tissue",
            "debris": "debris",
            "lymphocytes": "lymphocytes",
            "mucus": "mucus",
            "smooth muscle": "smooth muscle",
            "normal colon mucosa": "normal colon mucosa",
            "cancer-associated stroma": "cancer-associated stroma",
            "colorectal adenocarcinoma epithelium": "colorectal adenocarcinoma epithelium",
        },
        "Kather et al.: Predicting survival from colorectal cancer histology slides using deep learning, PLOS Medicine 16(1), e1002730, 2019",
    ),
    "chestmnist": MedSet(
        "frontal chest X-ray",
        1,
        _same(
            "atelectasis",
            "cardiomegaly",
            "effusion",
            "infiltration",
            "mass",
            "nodule",
            "pneumonia",
            "pneumothorax",
            "consolidation",
            "edema",
            "emphysema",
            "fibrosis",
            "pleural thickening",  # `pleural` in the package
            "hernia",
        ),
        "Wang et al.: ChestX-ray8: Hospital-scale chest X-ray database and benchmarks, CVPR, 2097-2106, 2017",
    ),
    "dermamnist": MedSet(
        "dermatoscopic image",
        3,
        {
            "actinic keratosis or intraepithelial carcinoma": "an actinic keratosis or intraepithelial carcinoma",
            "basal cell carcinoma": "a basal cell carcinoma",
            "benign keratosis-like lesion": "a benign keratosis-like lesion",
            "dermatofibroma": "a dermatofibroma",
            "melanoma": "a melanoma",
            "melanocytic nevus": "a melanocytic nevus",
            "vascular lesion": "a vascular skin lesion",
        },
        "Tschandl, Rosendahl, Kittler: The HAM10000 dataset, Scientific Data 5, 180161, 2018; Codella et al.: Skin lesion analysis toward "
        "melanoma detection 2018, arXiv:1902.03368, 2019",
        licence="CC-BY-NC-4.0",
    ),
    "octmnist": MedSet(
        "retinal OCT scan",
        1,
        {**_same("choroidal neovascularization", "diabetic macular edema", "drusen"), "normal": "a normal retina"},
        KERMANY,
    ),
    "pneumoniamnist": MedSet("pediatric chest X-ray", 1, {"normal": "normal lungs", "pneumonia": "pneumonia"}, KERMANY),
    "retinamnist": MedSet(
        "retinal fundus photograph",
        3,
        _same(
            "no diabetic retinopathy",
            "mild nonproliferative diabetic retinopathy",
            "moderate nonproliferative diabetic retinopathy",
            "severe nonproliferative diabetic retinopathy",
            "proliferative diabetic retinopathy",
        ),
        "Liu et al.: DeepDRiD: Diabetic retinopathy - grading and image quality estimation challenge, Patterns 3(6), 100512, 2022",
    ),
    "breastmnist": MedSet(
        "breast ultrasound",
        1,
        {"malignant": "a malignant lesion", "normal or benign": "no lesion or a benign lesion"},
        "Al-Dhabyani, Gomaa, Khaled, Fahmy: Dataset of breast ultrasound images, Data in Brief 28, 104863, 2020",
    ),
    "bloodmnist": MedSet(
        "microscopy of a peripheral blood smear",
        3,
        {
            "basophil": "a basophil",
            "eosinophil": "an eosinophil",
            "erythroblast": "an erythroblast",
            "immature granulocyte": "an immature granulocyte",  # myelocytes, metamyelocytes and promyelocytes
            "lymphocyte": "a lymphocyte",
            "monocyte": "a monocyte",
            "neutrophil": "a neutrophil",
            "platelet": "a platelet",
        },
        "Acevedo et al.: A dataset of microscopic peripheral blood cell images for development of automatic recognition systems, "
        "Data in Brief 30, 105474, 2020",
    ),
    "tissuemnist": MedSet(
        "fluorescence microscopy of human kidney cortex",
        1,
        {
            "collecting duct or connecting tubule": "a cell of a collecting duct or connecting tubule",
            "distal convoluted tubule": "a cell of a distal convoluted tubule",
            "glomerular endothelial cell": "a glomerular endothelial cell",
            "interstitial endothelial cell": "an interstitial endothelial cell",
            "leukocyte": "a leukocyte",
            "podocyte": "a podocyte",
            "proximal tubule segment": "a cell of a proximal tubule segment",
            "thick ascending limb": "a cell of a thick ascending limb",
        },
        "Ljosa, Sokolnicki, Carpenter: Annotated high-throughput microscopy image sets for validation (BBBC051), Nature Methods 9, 637, 2012; "
        "Woloshuk et al.: In situ classification of cell types in human kidney tissue using 3D nuclear staining, Cytometry A 99(7), 707-721, 2021",
    ),
    "organamnist": MedSet("axial CT slice", 1, ORGANS, LITS),
    "organcmnist": MedSet("coronal CT slice", 1, ORGANS, LITS),
    "organsmnist": MedSet("sagittal CT slice", 1, ORGANS, LITS),
}
Flag = Literal[
    "pathmnist", "chestmnist", "dermamnist", "octmnist", "pneumoniamnist", "retinamnist", "breastmnist", "bloodmnist",
    "tissuemnist", "organamnist", "organcmnist", "organsmnist",
]  # fmt: skip
Finding = Literal[
    "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
    "consolidation", "edema", "emphysema", "fibrosis", "pleural thickening", "hernia",
]  # fmt: skip
FILE_NAME = re.compile(rf"(?P<flag>{'|'.join(SETS)})(_(?P<size>64|128|224))?\.npz")
CLASS_TEMPLATES = (
    "{modality} showing {finding}",
    "{modality}, {finding}",
    "{finding}, {modality}",
    "{modality}: {label}",
)
FINDING_TEMPLATES = (
    "{modality} showing {label}",
    "{modality} with {label}",
    "{label}, {modality}",
    "{modality}: {label}",
)
MULTI_LABEL_TEMPLATES = (
    "{modality} showing {findings}",
    "{modality} with {findings}",
    "{findings}, {modality}",
    "{modality}: {findings}",
)


class MedMNISTOptions(Options):
    """Selection of set and size."""

    flag: Flag | None = Field(None, description="name of the set; null: that of the only file with the given size")
    size: Literal[28, 64, 128, 224] = Field(28, description="height and width of the images, pixels")
    finding: Finding | None = Field(
        None, description="chestmnist only: classify this finding, yes or no; null: all findings, in the prompt alone"
    )


class Row(NamedTuple):
    """Location of an item's pixels: file, array name, row."""

    file: str
    array: str
    row: int


class MedFile(NamedTuple):
    """A file of a set, with the set and size in its name."""

    path: Path
    flag: str
    size: int


class Adapter(DatasetAdapter):
    """One set of MedMNIST at one size: images with class names, and no masks."""

    Options = MedMNISTOptions
    options: MedMNISTOptions
    items_per_part = 512  # small images; each process decompresses the file from the start up to its parts

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there is a file of any set here or one level below."""
        return bool(_files_of(raw_dir))

    @classmethod
    def needed_options(cls, raw_dir: Path) -> list[dict[str, Any]]:
        """Return name and size of each set in the folder."""
        found = dict.fromkeys((file.flag, file.size) for file in _files_of(raw_dir))
        return [{"flag": flag, "size": size} for flag, size in found]

    def info(self) -> DatasetInfo:
        """Return the description of the selected set.

        Raises:
            MaskLoomError: no set is selected and the folder is ambiguous, or an option does not
                apply to the set.
        """
        flag = self.options.flag or self._file().flag
        about = SETS[flag]
        return DatasetInfo(
            modality=about.modality,
            channels=about.channels,
            mask_classes=("background",),
            palette=((0, 0, 0),),
            labels=self._labels(flag),
            prompt_templates=self._templates(flag),
            licence=about.licence,
            citation=f"{MEDMNIST}; {about.source}",
            homepage="https://medmnist.com",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the rows of the train, validation and test arrays in order, after checking all of
        them.

        Raises:
            MaskLoomError: there is no such file, or several; the file is damaged or not of this
                set; or an option does not apply to the set.
        """
        file = self._file()
        self._labels(file.flag)  # checks that the options apply to the set
        with reject_as_error(file.path, f"download {file.path.name} again from {DOWNLOAD}"):
            labels = {name: _checked_labels(file, name) for name in SPLIT_NAMES}
        for name, rows in labels.items():
            yield from self._entries(file, name, rows)

    def load(self, item: RawItem) -> RawImage:
        """Return a row's image, (S, S) or (S, S, 3) uint8.

        Raises:
            RejectedSample: the file has changed since listing and cannot be read.
        """
        place = Row(*item.key)
        image = npz_row(Path(place.file), place.array, place.row)
        if image.dtype != np.uint8:
            raise RejectedSample(f"{place.array} holds {image.dtype}, expected uint8")
        return RawImage(image=image, mask=None)

    def _labels(self, flag: str) -> tuple[str, ...]:
        if self.options.finding is None:
            return () if flag == MULTI_LABEL else tuple(SETS[flag].classes)
        if flag != MULTI_LABEL:
            raise MaskLoomError(
                f"data.options.finding={self.options.finding}: only {MULTI_LABEL} has findings, not {flag}; set data.options.finding=null"
            )
        return f"no {self.options.finding}", self.options.finding

    def _templates(self, flag: str) -> tuple[str, ...]:
        if self.options.finding is not None:
            return FINDING_TEMPLATES
        return MULTI_LABEL_TEMPLATES if flag == MULTI_LABEL else CLASS_TEMPLATES

    def _file(self) -> MedFile:
        """Return the only file that matches the options."""
        assert self.raw_dir is not None
        files, flag, size = _files_of(self.raw_dir), self.options.flag, self.options.size
        fitting = [file for file in files if file.size == size and flag in (None, file.flag)]
        if len(fitting) == 1:
            return fitting[0]
        shown = ", ".join(str(file.path.relative_to(self.raw_dir)) for file in (fitting or files)) or "none"
        if fitting:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: {len(fitting)} files of {size}x{size} images fit ({shown}); "
                "choose one: data.options.flag=NAME, and only one copy of it"
            )
        wanted = f"{flag or 'NAME'}{'' if size == 28 else f'_{size}'}.npz"
        raise MaskLoomError(
            f"data.raw_dir={self.raw_dir}: not MedMNIST: no file {wanted} here or one level below (MedMNIST files found: {shown}); "
            f"set data.options.flag and data.options.size to one that is there, or download {wanted} from {DOWNLOAD}"
        )

    def _entries(self, file: MedFile, name: str, rows: NDArray[Any]) -> Iterator[RawItem | Reject]:
        """List the rows of one split."""
        split, array = SPLIT_NAMES[name], f"{name}_images"
        for row, values in enumerate(rows.tolist()):
            path = f"{file.path}#{array}={row}"
            problem = _label_problem(file.flag, name, values)
            if problem:
                yield Reject(path, problem)
                continue
            label, attributes = self._described(file.flag, values)
            yield RawItem(
                sample_id=f"{file.flag}-{split}-{row:06d}",
                path=path,
                label=label,
                split=split,
                attributes=attributes,
                key=Row(str(file.path), array, row),
            )

    def _described(self, flag: str, values: list[int]) -> tuple[str | None, dict[str, str]]:
        """Return the class name and prompt attributes for the label values of an image."""
        names = list(SETS[flag].classes)
        if flag != MULTI_LABEL:
            name = names[values[0]]
            return name, {"finding": SETS[flag].classes[name]}
        present = [name for name, value in zip(names, values, strict=True) if value]
        finding = self.options.finding
        label = None if finding is None else self._labels(flag)[finding in present]
        return label, {"findings": _enumeration(present) or "no finding"}


def _files_of(raw_dir: Path) -> list[MedFile]:
    """Return the MedMNIST files in a folder, or else one level below."""
    here = _files_in(raw_dir)
    below = subfolders(raw_dir) if not here else []
    return here + [file for folder in below for file in _files_in(folder)]


def _files_in(folder: Path) -> list[MedFile]:
    named = ((path, FILE_NAME.fullmatch(comparable(path.name))) for path in files_in(folder, (".npz",)))
    return [MedFile(path, name["flag"], int(name["size"] or 28)) for path, name in named if name]


def _checked_labels(file: MedFile, name: str) -> NDArray[Any]:
    """Return the labels of a split, (N, 1) or (N, findings), validated against its images.

    Raises:
        RejectedSample: shapes, dtypes or checksums are wrong.
    """
    path, about = file.path, SETS[file.flag]
    images = npz_header(path, f"{name}_images")
    shape = (file.size, file.size) if about.channels == 1 else (file.size, file.size, 3)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise RejectedSample(
            f"{path.name}: {name}_images holds {images.dtype} of shape {images.shape}, expected uint8 of shape {('N', *shape)}"
        )
    labels = npz_table(path, f"{name}_labels")
    width = len(about.classes) if file.flag == MULTI_LABEL else 1
    if labels.dtype.kind not in "iu" or labels.shape != (images.shape[0], width):
        raise RejectedSample(
            f"{path.name}: {name}_labels holds {labels.dtype} of shape {labels.shape}, expected integers of shape "
            f"{(images.shape[0], width)} for the {images.shape[0]} images of {name}_images"
        )
    check_npz_array(path, f"{name}_images")
    return labels


def _label_problem(flag: str, name: str, values: list[int]) -> str | None:
    last = 1 if flag == MULTI_LABEL else len(SETS[flag].classes) - 1
    unknown = [value for value in values if not 0 <= value <= last]
    return f"unknown label value {unknown[0]} in {name}_labels; those of {flag} are 0..{last}" if unknown else None


def _enumeration(words: list[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
