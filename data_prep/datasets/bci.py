"""`bci`: Breast Cancer Immunohistochemical image generation (Liu et al. 2022), H&E and HER2 pairs.

The two images of a pair are registered. Read from its root or from the folder above. In the
archives of the challenge, the two folder levels are swapped (`train/HE/…`):

    BCI_dataset/HE/train/00000_train_1+.png      BCI_dataset/IHC/train/00000_train_1+.png
                HE/test/00000_test_2+.png                    IHC/test/00000_test_2+.png

4873 pairs of 1024 x 1024 pixels, 3896 for training and 977 for testing. Both images of a pair have
the same name: number, split, HER2 level (0, 1+, 2+, 3+).

- The generator learns the immunohistochemistry (IHC) image, conditioned on the H&E image
  (`data.conditioning=image`). There are no masks.
- The level is that of the whole slide, not of the crop (README of the release), so prompts describe
  the specimen, not the visible staining.
- Splits: the test split is that of the release; validation is drawn from its training images.
- Groups: none. The crops come from 51 pairs of slides, but slides and patients are not published,
  so crops of one slide are in train, validation and test, also in the split of the release. Scores
  therefore describe known slides, not new patients. The slides cannot be recovered from content,
  because crops of one slide show different places and tissue is similar everywhere. Therefore only
  identical pixels are searched for; `data.duplicates=near` also joins overlapping crops, with a
  threshold that has not been validated on stained tissue.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject, unread_folders
from maskloom.data_prep.readers.common import decoded_image, eight_bit, files_in, require_same_size
from maskloom.data_prep.readers.decoding import Picture
from maskloom.data_prep.readers.file_names import Names, folder_named, subfolders
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

SPLITS = ("train", "test")
NAME = re.compile(r"(?P<number>\d+)_(?P<split>train|test)_(?P<level>0|1\+|2\+|3\+)\.png", re.IGNORECASE)
# American Society of Clinical Oncology / College of American Pathologists: 0 and 1+ negative, 2+
# equivocal, 3+ positive.
STATUS = {"0": "negative", "1+": "negative", "2+": "equivocal", "3+": "positive"}


class Adapter(DatasetAdapter):
    """HER2 immunohistochemistry of breast cancer, paired with the H&E stain of the same place."""

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether an H&E image has a name of the release, beside a folder of the other stain."""
        root = _root(raw_dir)
        if root is None:
            return False
        images = (file for split in SPLITS for file in files_in(_folder(root, "HE", split)))
        return any(NAME.fullmatch(file.name) for file in images)

    def info(self) -> DatasetInfo:
        """Return what is true of every pair."""
        return DatasetInfo(
            modality="HER2 immunohistochemistry of breast cancer",
            channels=3,
            mask_classes=("background",),
            palette=((0, 0, 0),),
            labels=tuple(f"HER2 {level}" for level in STATUS),
            prompt_templates=(
                "{modality}, specimen scored {label}",
                "{modality}, HER2-{status} specimen ({label})",
                "breast carcinoma of a {label} specimen, immunohistochemistry with hematoxylin counterstain",
                "{modality}, slide of {label}, brightfield microscopy",
            ),
            licence="BCI licence: non-commercial use only, with reference to the dataset",
            citation="Liu, Zhu, Xu, Jia, Shi, Jin: BCI: Breast Cancer Immunohistochemical Image Generation through Pyramid"
            " Pix2pix, CVPR Workshops, 2022",
            homepage="https://bupt-ai-cz.github.io/BCI/",
            duplicates="identical",
            paired_image="H&E stain",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the pairs by split and number, and rejects for files without partner or valid name.

        Raises:
            MaskLoomError: there is no folder of each stain.
        """
        assert self.raw_dir is not None
        root = _root(self.raw_dir)
        if root is None:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not BCI: no folders HE and IHC with train or test in them, here or one level"
                " below; give the folder that holds HE and IHC"
            )
        for split in SPLITS:
            yield from _split_entries(root, split)

    def load(self, item: RawItem) -> RawImage:
        """Decode a pair.

        Returns:
            The IHC image, and the H&E image as condition, both (H, W, 3) uint8.

        Raises:
            RejectedSample: a file is unreadable or not in colour, or the two differ in size.
        """
        ihc, he = _colour_image(Path(item.path)), _colour_image(Path(item.key))
        require_same_size(f"the H&E image {Path(item.key).name}", he.pixels, ihc.pixels)
        darkened = max(ihc.darkened, he.darkened)
        return RawImage(image=ihc.pixels, mask=None, condition=he.pixels, darkened=darkened)


def _root(raw_dir: Path) -> Path | None:
    """Return the folder with both stains: `raw_dir` or one directly below it."""
    candidates = [raw_dir, *subfolders(raw_dir)]
    return next((folder for folder in candidates if _has_both_stains(folder)), None)


def _has_both_stains(folder: Path) -> bool:
    return all(any(_folder(folder, stain, split).is_dir() for split in SPLITS) for stain in ("HE", "IHC"))


def _folder(root: Path, stain: str, split: str) -> Path:
    """Return the folder of a stain and split, in either order of the folder levels."""
    by_split = folder_named(root, split, stain)
    return by_split if by_split.is_dir() else folder_named(root, stain, split)


def _split_entries(root: Path, split: str) -> Iterator[RawItem | Reject]:
    he_folder, ihc_folder = _folder(root, "HE", split), _folder(root, "IHC", split)
    he_names, ihc_names = (Names(file.name for file in files_in(folder)) for folder in (he_folder, ihc_folder))
    for ihc in files_in(ihc_folder):
        name = NAME.fullmatch(ihc.name)
        problem = _name_problem(ihc.name, split)
        if name is None or problem:
            yield Reject(str(ihc), problem)
        elif (partner := he_names.find(ihc.name)) is None:
            yield Reject(str(ihc), f"an IHC image without an H&E image of the same name in HE/{split}")
        else:
            yield _item(ihc, he_folder / partner, name)
    for he in files_in(he_folder):
        problem = _name_problem(he.name, split)
        if problem or ihc_names.find(he.name) is None:
            yield Reject(str(he), problem or f"an H&E image without an IHC image of the same name in IHC/{split}")
    for folder in (he_folder, ihc_folder):
        yield from unread_folders(folder)


def _name_problem(file_name: str, split: str) -> str:
    """Return why a file name is not that of a pair; empty if it is."""
    name = NAME.fullmatch(file_name)
    if name is None:
        return "not named NUMBER_train_LEVEL.png or NUMBER_test_LEVEL.png with a HER2 level of 0, 1+, 2+ or 3+"
    return "" if name["split"].lower() == split else f"lies in {split}, and its name says {name['split']}"


def _item(ihc: Path, he: Path, name: re.Match[str]) -> RawItem:
    level = name["level"]
    return RawItem(
        sample_id=f"{name['split'].lower()}-{name['number']}-{level.replace('+', 'plus')}",
        path=str(ihc),
        label=f"HER2 {level}",
        split="test" if name["split"].lower() == "test" else None,
        attributes={"status": STATUS[level]},
        key=str(he),
    )


def _colour_image(path: Path) -> Picture:
    """Return an image over black, (H, W, 3) uint8.

    Raises:
        RejectedSample: it is unreadable, grey, or has a palette.
    """
    image = decoded_image(path)
    if image.pixels.ndim == 2 or image.indices is not None:
        raise RejectedSample(f"{path.name} is grey or has a palette, expected RGB")
    return eight_bit(image, "RGB")
