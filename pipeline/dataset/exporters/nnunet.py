"""`nnunet`: the dataset format of nnU-Net v2.

See documentation/dataset_format.md and manual_data_splits.md of MIC-DKFZ/nnUNet.

    Dataset501_NAME/dataset.json
                    imagesTr/CASE_0000.png     train and validation rows; RGB images are one file
                    labelsTr/CASE.png          class indices
                    imagesTs/  labelsTs/       test rows; an external test set has its own folders,
                                               such as imagesTs_external_udiat
                    splits_final.json          fold 0: train against validation

nnU-Net reads `splits_final.json` from `nnUNet_preprocessed/Dataset501_NAME`; copy it there after
`nnUNetv2_plan_and_preprocess`, then train with fold 0. Without validation rows there is no such
file, and nnU-Net splits the cases itself, which may put one group into several folds.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

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


class NnunetOptions(Options):
    """Options of the nnU-Net dataset."""

    dataset_id: int = Field(
        501, ge=1, le=999, description="number in the folder's name; not that of another dataset of your nnU-Net"
    )


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
            MaskLoomError: the train split is left out or empty, or there is no class besides the
                background.
        """
        if "train" not in source.splits:
            raise MaskLoomError(
                f"{source.folder}: nnunet needs the train split, and only {', '.join(source.splits)} would be exported"
            )
        if len(source.about.mask_classes) < 2:
            raise MaskLoomError(f"{source.folder}: its masks have no class besides the background; nnunet needs one")

    def write(self, source: ExportSource, folder: Path) -> None:
        """Write images, label maps, `dataset.json` and, if possible, `splits_final.json`."""
        about = source.about
        root = folder / f"Dataset{self.options.dataset_id:03d}_{safe_name(about.dataset)}"
        cases = {split: _write_split(source, split, root) for split in source.splits}
        write_json(root / "dataset.json", _dataset_json(about, sum(len(cases.get(split, ())) for split in TRAINING)))
        if "validation" in cases:
            write_json(root / "splits_final.json", [{"train": cases["train"], "val": cases["validation"]}])


def _write_split(source: ExportSource, split: str, root: Path) -> Sequence[str]:
    """Write the cases of a split; return their identifiers for nnU-Net's fold."""
    ending = "Tr" if split in TRAINING else "Ts" if split == "test" else f"Ts_{split}"
    cases = []
    for row in source.rows(split):
        assert row.mask is not None  # needs_masks
        case = safe_name(row.sample_id)
        write_new(root / f"images{ending}" / f"{case}_0000.png", row.image)
        write_new(root / f"labels{ending}" / f"{case}.png", png_bytes(row.mask))
        cases.append(case)
    return cases


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
