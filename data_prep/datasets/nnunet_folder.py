"""`nnunet_folder`: a raw dataset folder of nnU-Net (version 1 or 2) with two-dimensional images.

Read from the folder itself, or from the folder above:

    Dataset501_NAME/dataset.json            labels, channels, ending of the files
                    imagesTr/CASE_0000.png  images; RGB images are one file
                    labelsTr/CASE.png       label maps with the values of `labels`
                    imagesTs/  labelsTs/    the test split, if its labels are there

nnU-Net's documentation/dataset_format.md describes the format. There are no classes of images and no
patients: `group_pattern` finds patients in the names of the cases, and near-duplicates are searched
for without it. Cases of several files (one per channel), volumes (NIfTI, MHA) and regions (several
values per label) are not read. `splits_final.json` is not used: its folds have no test split.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from maskloom.data_prep.adapter import Options as BaseOptions
from maskloom.data_prep.processing.label_maps import LabelMap, distinct_palette, label_map, read_mask
from maskloom.data_prep.readers.common import files_in, portable_id, require_same_size
from maskloom.data_prep.readers.file_names import NO_TEXT, is_text, subfolders
from maskloom.data_prep.readers.file_patterns import Confined
from maskloom.data_prep.readers.image_files import READ_SUFFIXES, read_picture
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from maskloom.pipeline.files.reading import read_object

DESCRIPTION = "dataset.json"
PARTS = {"Tr": None, "Ts": "test"}  # ending of the folders' names -> split
CASE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
COLOURS = ["R", "G", "B"]
FIX = "correct this file, see nnU-Net's documentation/dataset_format.md"


class NnunetOptions(BaseOptions):
    """What the folder itself does not say."""

    modality: str = Field("medical image", min_length=1, description="name of the imaging method in prompts")
    group_pattern: str | None = Field(
        None, description="regular expression on the name of a case; its group 1 is the patient, as in '^(p[0-9]+)_'"
    )
    keep_incomplete: bool = Field(False, description="keep cases without a label map; false: leave them out")


class Adapter(DatasetAdapter):
    """Two-dimensional images with label maps, as nnU-Net reads them."""

    Options = NnunetOptions
    options: NnunetOptions
    states_layout = True

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are dataset.json, imagesTr and labelsTr."""
        return _root_of(raw_dir) is not None

    def info(self) -> DatasetInfo:
        """Return what is true of every image.

        Raises:
            MaskLoomError: dataset.json is damaged, or describes images that are not read.
        """
        return DatasetInfo(
            modality=self.options.modality,
            channels=3 if self._channel_names == COLOURS else 1,
            mask_classes=self._labels.classes,
            palette=distinct_palette(len(self._labels.classes)),
            labels=(),
            prompt_templates=(
                "{modality}",
                "{modality} of a patient",
                "{modality} with {mask_classes}, {size}, {shape}, {place}",
                "{size} {shape} {mask_classes} in {modality}, {place}",
            ),
            licence=_text(self._stated.get("licence") or self._stated.get("license")),
            citation=_text(self._stated.get("reference")),
            homepage="",
            duplicates="identical" if self.options.group_pattern else "near",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the cases of training and test in natural order.

        Raises:
            MaskLoomError: dataset.json is missing or damaged, or describes images that are not read.
        """
        confined = Confined(self._root)
        for part, split in PARTS.items():
            images, labels = self._root / f"images{part}", self._root / f"labels{part}"
            files = files_in(images)
            if files and not labels.is_dir() and not self.options.keep_incomplete:
                yield Reject(str(images), f"there is no folder {labels.name}, and images without labels are not read")
                continue
            for file in files:
                try:
                    yield self._item(file, labels, split, confined)
                except RejectedSample as error:
                    yield Reject(str(file), str(error))
            cases = {found["case"] for file in files if (found := CASE.fullmatch(file.name.removesuffix(self._ending)))}
            for file in files_in(labels):
                if file.name.removesuffix(self._ending) not in cases:
                    yield Reject(str(file), f"a label map without an image in {images.name}")

    def load(self, item: RawItem) -> RawImage:
        """Decode an image and its label map.

        Raises:
            RejectedSample: a file is unreadable, or the label map has another size or a value that
                dataset.json does not name.
        """
        image, darkened = read_picture(Path(item.path))
        if not item.mask_paths:
            return RawImage(image, None, darkened=darkened)
        path = Path(item.mask_paths[0])
        mask = read_mask(path, self._labels)
        require_same_size(f"label map {path.name}", mask, image)
        return RawImage(image, mask, darkened=darkened)

    def _item(self, file: Path, labels: Path, split: str | None, confined: Confined) -> RawItem:
        if not is_text(file.name):
            raise RejectedSample(NO_TEXT)
        found = CASE.fullmatch(file.name.removesuffix(self._ending))
        if found is None or not file.name.endswith(self._ending):
            raise RejectedSample(f"{file.name} is not named CASE_0000{self._ending}")
        if found["channel"] != "0000":
            raise RejectedSample(f"{file.name} is a further channel; cases of several files are not read")
        label = labels / f"{found['case']}{self._ending}"
        for path in (file, label):
            confined.check(path.relative_to(self._root).as_posix())
        masked = label.is_file()
        if not masked and not self.options.keep_incomplete:
            raise RejectedSample(f"there is no label map {labels.name}/{label.name}")
        return RawItem(
            sample_id=f"{'test-' if split else ''}{portable_id(found['case'])}",
            path=str(file),
            mask_paths=(str(label),) if masked else (),
            group=self._group(found["case"]),
            split=split,
        )

    def _group(self, case: str) -> str | None:
        pattern = self.options.group_pattern
        if pattern is None:
            return None
        found = re.search(pattern, case)
        if found is None or not found.groups() or not found[1]:
            raise RejectedSample(f"data.options.group_pattern={pattern!r} finds no patient in {case!r}")
        return found[1]

    @cached_property
    def _root(self) -> Path:
        assert self.raw_dir is not None
        root = _root_of(self.raw_dir)
        if root is None:
            raise MaskLoomError(f"data.raw_dir={self.raw_dir}: no folder with {DESCRIPTION}, imagesTr and labelsTr")
        return root

    @cached_property
    def _stated(self) -> dict[str, Any]:
        return read_object(self._root / DESCRIPTION, FIX)

    @cached_property
    def _ending(self) -> str:
        ending = self._stated.get("file_ending", ".nii.gz")
        if not isinstance(ending, str) or ending.lower() not in READ_SUFFIXES:
            raise self._problem("file_ending", f"{ending!r} is not read; save slices as PNG or TIFF")
        return ending

    @cached_property
    def _channel_names(self) -> list[str]:
        names = self._stated.get("channel_names", self._stated.get("modality"))
        if not isinstance(names, dict) or not names:
            raise self._problem("channel_names", "gives no channel")
        found = [str(name) for name in names.values()]
        if len(found) > 1 and found != COLOURS:
            raise self._problem("channel_names", f"{len(found)} channels; one, or R, G and B in one file, are read")
        return found

    @cached_property
    def _labels(self) -> LabelMap:
        labels = self._stated.get("labels")
        if not isinstance(labels, dict) or not labels:
            raise self._problem("labels", "gives no label")
        pairs = [(name, value) if str(value).isdigit() else (value, name) for name, value in labels.items()]
        if not all(isinstance(name, str) and str(value).isdigit() for name, value in pairs):
            raise self._problem("labels", "regions, or values that are no numbers, are not read")
        try:
            return label_map({int(value): name for name, value in pairs})
        except ValueError as error:
            raise self._problem("labels", str(error)) from None

    def _problem(self, key: str, what: str) -> MaskLoomError:
        return MaskLoomError(f"{self._root / DESCRIPTION}: {key}: {what}; {FIX}")


def _root_of(raw_dir: Path) -> Path | None:
    """Return the folder of the dataset: this one, or the only one in it."""
    folders = [one for one in (raw_dir, *subfolders(raw_dir)) if _is_dataset(one)]
    return folders[0] if folders and (len(folders) == 1 or folders[0] == raw_dir) else None


def _is_dataset(folder: Path) -> bool:
    names = (folder / "imagesTr", folder / "labelsTr")
    return (folder / DESCRIPTION).is_file() and all(name.is_dir() for name in names)


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value.strip() else "not stated"
