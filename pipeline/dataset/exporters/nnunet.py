"""`nnunet`: the dataset format of nnU-Net v2.

See documentation/dataset_format.md and manual_data_splits.md of MIC-DKFZ/nnUNet.

    Dataset501_NAME/dataset.json
                    imagesTr/CASE_0000.png     train and validation rows; RGB images are one file
                    labelsTr/CASE.png          class indices
                    imagesTs/  labelsTs/       test rows; an external test set has its own folders,
                                               such as imagesTs_external_udiat
                    splits_final.json          fold 0: train against validation; or `folds` folds

nnU-Net reads `splits_final.json` from `nnUNet_preprocessed/Dataset501_NAME`; copy it there after
`nnUNetv2_plan_and_preprocess`, then train with fold 0. Without validation rows and `folds` there is
no such file, and nnU-Net splits the cases itself, which may put one group into several folds.

With `folds=K`, the groups of the real cases are divided into K folds of about the same size. Each
fold validates on its real cases and trains on all others but synthetic ones whose parent it
validates on.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from maskloom.pipeline.config.base import DigestedSection
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.exporter import (
    DatasetExporter,
    ExportSource,
    Options,
    index_values,
    safe_name,
    write_new,
)
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import write_json

TRAINING = ("train", "validation")


class NnunetOptions(Options, DigestedSection):
    """Options of the nnU-Net dataset."""

    dataset_id: int = Field(
        501, ge=1, le=999, description="number in the folder's name; not that of another dataset of your nnU-Net"
    )
    folds: int = Field(
        1, ge=1, le=50, description="folds of cross-validation over real groups; 1: the dataset's own validation split"
    )

    def unused_keys(self) -> set[str]:
        """Return `folds` where there is one."""
        return super().unused_keys() | ({"folds"} if self.folds == 1 else set())


@dataclass(frozen=True)
class Case:
    """A case of the layout: its name, its group, and whether it is real."""

    name: str
    group: str
    real: bool


class Exporter(DatasetExporter):
    """Writes a raw dataset folder with `dataset.json` and one fold."""

    Options = NnunetOptions
    options: NnunetOptions

    def mask_values(self, about: Description) -> str:
        """Return in words what the pixels of the exported masks mean."""
        return index_values(about)

    def check(self, source: ExportSource) -> None:
        """Check that there are cases to train on, and something to segment.

        Raises:
            MaskLoomError: the train split is left out or empty, there is no class besides the
                background, or there are fewer real groups than folds.
        """
        if "train" not in source.splits:
            raise MaskLoomError(
                f"{source.folder}: nnunet needs the train split, and only {', '.join(source.splits)} would be exported"
            )
        if len(source.about.mask_classes) < 2:
            raise MaskLoomError(f"{source.folder}: its masks have no class besides the background; nnunet needs one")
        groups = len(_real_group_sizes(source)) if self.options.folds > 1 else self.options.folds
        if groups < self.options.folds:
            raise MaskLoomError(
                f"{source.folder}: folds={self.options.folds}, but its train and validation rows have {groups} real groups; "
                f"set folds to at most that, or combine the dataset with real rows"
            )

    def write(self, source: ExportSource, folder: Path) -> None:
        """Write images, label maps, `dataset.json` and, if possible, `splits_final.json`."""
        about = source.about
        root = folder / f"Dataset{self.options.dataset_id:03d}_{safe_name(about.dataset)}"
        cases = {split: _write_split(source, split, root) for split in source.splits}
        training = [case for split in TRAINING for case in cases.get(split, ())]
        write_json(root / "dataset.json", _dataset_json(about, len(training)))
        if self.options.folds > 1:
            write_json(root / "splits_final.json", _folds(training, self.options.folds))
        elif "validation" in cases:
            train, validation = ([case.name for case in cases[split]] for split in TRAINING)
            write_json(root / "splits_final.json", [{"train": train, "val": validation}])


def _write_split(source: ExportSource, split: str, root: Path) -> Sequence[Case]:
    """Write the cases of a split; return them for nnU-Net's folds."""
    ending = "Tr" if split in TRAINING else "Ts" if split == "test" else f"Ts_{split}"
    cases = []
    for row in source.rows(split):
        assert row.mask is not None  # needs_masks
        case = safe_name(row.sample_id)
        write_new(root / f"images{ending}" / f"{case}_0000.png", row.image)
        write_new(root / f"labels{ending}" / f"{case}.png", png_bytes(row.mask))
        cases.append(Case(case, row.group_id, row.origin == "real"))
    return cases


def _real_group_sizes(source: ExportSource) -> Counter[str]:
    """Return the number of real training cases of each group, without reading images."""
    rows = (
        row
        for split in TRAINING
        if split in source.splits
        for row in source.dataset.rows(split, ["group_id", "origin"])
    )
    return Counter(row["group_id"] for row in rows if row["origin"] == "real")


def _folds(cases: Sequence[Case], folds: int) -> list[dict[str, list[str]]]:
    """Return the training and validation cases of each fold; every real case is validated on once.

    A synthetic case lies in its parent's group, so that no fold trains on what was made from a mask
    that it validates on.
    """
    fold_of = _fold_of_groups(Counter(case.group for case in cases if case.real), folds)
    return [
        {
            "train": [case.name for case in cases if fold_of.get(case.group) != fold],
            "val": [case.name for case in cases if case.real and fold_of[case.group] == fold],
        }
        for fold in range(folds)
    ]


def _fold_of_groups(sizes: Counter[str], folds: int) -> dict[str, int]:
    """Return the fold of each group: the largest groups first, each to the fold with the fewest cases."""
    filled, fold_of = [0] * folds, {}
    for group in sorted(sizes, key=lambda one: (-sizes[one], hashlib.sha256(one.encode()).hexdigest())):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += sizes[group]
    return fold_of


def _dataset_json(about: Description, training: int) -> dict[str, object]:
    """Return the metadata that nnU-Net requires, and its optional name, licence and reference."""
    # nnU-Net would clip a channel named `CT` as Hounsfield units; these are 8-bit grey levels.
    channels = ("R", "G", "B") if about.channels == 3 else (f"{about.modality}, 8 bits",)
    return {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {name: index for index, name in enumerate(about.mask_classes)},
        "numTraining": training,
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
        "name": about.dataset,
        "licence": about.licence,
        "reference": about.citation,
    }
