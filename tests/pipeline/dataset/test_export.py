"""Exports: each layout against the rule of the tool that reads it, and the command around them."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from maskloom.data_prep.datasets import phantom_bus
from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.__main__ import app
from maskloom.pipeline.dataset.combine import CombineOptions, combine
from maskloom.pipeline.dataset.contract import Contract, Parent, read_contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.export import PROVENANCE_FILE, ExportOptions, export, open_exporter
from maskloom.pipeline.dataset.exporter import safe_name, write_new
from maskloom.pipeline.dataset.exporters.coco import mask_regions, run_lengths
from maskloom.pipeline.errors import LeakedImages, MaskLoomError
from maskloom.pipeline.files.atomic import sole_maker
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.leak_list import leaks_in_words
from tests.data_prep.experiment import experiment
from tests.tiny_datasets import synthetic_samples, tiny_description, tiny_samples, write_dataset

ROOT = Path(__file__).parents[3]


@pytest.fixture
def real(tmp_path: Path) -> Path:
    splits = {split: tiny_samples(split, count) for split, count in (("train", 6), ("validation", 4), ("test", 2))}
    write_dataset(tmp_path / "real", tiny_description(), splits)
    return tmp_path / "real"


@pytest.fixture
def synthetic(real: Path, tmp_path: Path) -> Path:
    samples = synthetic_samples(tiny_samples("train", 6), "made", lambda sample, index: 255 - sample.image)
    parent = Parent(path="../real", digest=read_contract(real).digest)
    write_dataset(tmp_path / "synthetic", tiny_description(origin="synthetic"), {"train": samples}, parent)
    return tmp_path / "synthetic"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# --- busi_tree


def test_held_out_images_of_the_real_dataset_do_not_leave_with_a_synthetic_one(tmp_path: Path):
    splits = {"train": tiny_samples("train", 4), "test": tiny_samples("test", 4)}
    digest = write_dataset(tmp_path / "real", tiny_description(), splits).digest
    shown = [sample.image[::-1] for sample in splits["test"]]
    samples = synthetic_samples(splits["train"], "made", lambda sample, index: shown[index])
    about = tiny_description(origin="synthetic")
    write_dataset(tmp_path / "made", about, {"train": samples}, Parent(path="../real", digest=digest))
    with pytest.raises(
        MaskLoomError, match=r"4 synthetic image\(s\) are copies of its held-out images: .+ shows test-"
    ):
        export(tmp_path / "made", ExportOptions("imagefolder", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def stopped(real: Path, synthetic: Path, tmp_path: Path) -> str:
    """List an image of a set as what stopped an evaluation, and return its id."""
    sample = next(MaskPromptDataset.open(synthetic).rows("train", ["sample_id"]))["sample_id"]
    leak = {"image": sample, "image_dataset": str(synthetic), "shows": "test-0000", "shows_split": "test"}
    leaks_in_words(tmp_path / "logs" / "audit" / "0.json", ["one leak"], [{**leak, "shows_dataset": str(real)}])
    return sample


def test_a_set_whose_leaks_stopped_an_evaluation_does_not_leave_the_run(real: Path, synthetic: Path, tmp_path: Path):
    """Evaluation looks closer than an export does; its list counts for the very images that it is about."""
    options = ExportOptions("imagefolder", tmp_path / "out")
    leaking = stopped(real, synthetic, tmp_path)
    message = rf"1 image\(s\) stopped a training or an evaluation .+: {leaking} shows test-0000 \(test\); .+0-leaked\.jsonl lists them"
    with pytest.raises(LeakedImages, match=message):
        export(synthetic, options)
    assert not options.output.exists()
    samples = synthetic_samples(tiny_samples("train", 6), "again", lambda sample, index: 254 - sample.image)
    parent = Parent(path="../real", digest=read_contract(real).digest)
    write_dataset(tmp_path / "corrected", tiny_description(origin="synthetic"), {"train": samples}, parent)
    export(tmp_path / "corrected", options)
    assert options.output.exists()


def test_what_was_made_with_a_leaking_image_does_not_leave_the_run_either(real: Path, synthetic: Path, tmp_path: Path):
    """Combined before the evaluation, a part of the set as of a filter, and through links."""
    options = ExportOptions("imagefolder", tmp_path / "out")
    combine(real, [synthetic], CombineOptions(tmp_path / "combined"))
    part = synthetic_samples(tiny_samples("train", 6), "made", lambda sample, index: 255 - sample.image)[:2]
    parent = Parent(path="../real", digest=read_contract(real).digest)
    write_dataset(tmp_path / "part", tiny_description(origin="synthetic"), {"train": part}, parent)
    links = tmp_path / "elsewhere" / "run"
    links.mkdir(parents=True)
    (links / "real").symlink_to(real)
    (links / "synthetic").symlink_to(synthetic)
    stopped(real, synthetic, tmp_path)
    for folder in (tmp_path / "combined", tmp_path / "part", links / "synthetic"):
        with pytest.raises(LeakedImages, match=r"1 image\(s\) stopped a training or an evaluation"):
            export(folder, options)
    with pytest.raises(LeakedImages, match=r"1 image\(s\) stopped a training or an evaluation"):
        combine(links / "real", [links / "synthetic"], CombineOptions(tmp_path / "out"))
    assert not options.output.exists()


def test_the_list_lies_in_the_run_that_evaluated_the_set(real: Path, tmp_path: Path):
    """Its real dataset may be that of another run, and may have stopped a training there."""
    samples = synthetic_samples(tiny_samples("train", 6), "made", lambda sample, index: 255 - sample.image)
    parent = Parent(path="../../../real", digest=read_contract(real).digest)
    made = tmp_path / "run" / "synthetic" / "made"
    write_dataset(made, tiny_description(origin="synthetic"), {"train": samples}, parent)
    stopped(real, made, tmp_path / "run")
    with pytest.raises(LeakedImages, match=r"1 image\(s\) stopped a training or an evaluation"):
        export(made, ExportOptions("imagefolder", tmp_path / "out"))
    (tmp_path / "run" / "logs").rename(tmp_path / "logs")
    with pytest.raises(LeakedImages, match=r"1 image\(s\) stopped a training or an evaluation"):
        export(made, ExportOptions("imagefolder", tmp_path / "out"))


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"image_pixels": "0"}', "3", "", '{"image_pixels": "0", "shows": "a", "shows_spl']
)
def test_a_damaged_list_of_leaks_is_no_pass(synthetic: Path, tmp_path: Path, content: str):
    listed = tmp_path / "logs" / "audit" / "0-leaked.jsonl"
    listed.parent.mkdir(parents=True)
    listed.write_text(content)
    with pytest.raises(
        MaskLoomError, match=r"0-leaked\.jsonl:.+ damaged, or written by an earlier .+: delete it, and evaluate"
    ):
        export(synthetic, ExportOptions("imagefolder", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_set_away_from_its_real_dataset_says_why_that_is_needed(synthetic: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    synthetic.rename(tmp_path / "elsewhere" / "synthetic")
    with pytest.raises(MaskLoomError, match=r"the real dataset that it was made from is not at .+; keep it in its run"):
        export(tmp_path / "elsewhere" / "synthetic", ExportOptions("imagefolder", tmp_path / "out"))


def test_the_busi_tree_of_a_synthetic_dataset(synthetic: Path, tmp_path: Path):
    export(synthetic, ExportOptions("busi_tree", tmp_path / "out"))
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    numbers = ("001", "002", "003")
    assert found == {
        ".maskloom.json",
        "maskloom.json",
        "samples.csv",
        "synthetic_dataset.csv",
        *(f"{label}/image/synthetic_{label}_{number}.png" for label in ("disc", "square") for number in numbers),
        *(f"{label}/mask/synthetic_{label}_{number}_mask.png" for label in ("disc", "square") for number in numbers),
    }
    table = rows_of(tmp_path / "out" / "synthetic_dataset.csv")
    assert list(table[0]) == ["image_path", "mask_path", "class", "class_label"]
    samples = {row["sample_id"]: row for row in MaskPromptDataset.open(synthetic).split("train")}
    details = rows_of(tmp_path / "out" / "samples.csv")
    assert len(table) == len(details) == 6
    for row, detail in zip(table, details, strict=True):
        sample = samples[detail["sample_id"]]
        assert row["class_label"] == str(sample["label"])
        assert row["class"] == ("disc", "square")[sample["label"]]
        np.testing.assert_array_equal(pixels(tmp_path / "out" / row["image_path"]), np.asarray(sample["image"]))
        np.testing.assert_array_equal(pixels(tmp_path / "out" / row["mask_path"]), np.asarray(sample["mask"]) * 255)


def test_real_rows_are_called_real(real: Path, tmp_path: Path):
    export(real, ExportOptions("busi_tree", tmp_path / "out"))
    table = rows_of(tmp_path / "out" / "real_dataset.csv")
    assert table[0]["image_path"] == "disc/image/real_disc_001.png"
    assert len({row["image_path"] for row in table}) == 12


def test_numbers_grow_wider_with_the_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "maskloom.pipeline.dataset.exporters.busi_tree.LEAST_DIGITS", 1
    )  # or it would take a thousand rows to see
    for count in (9, 10):
        samples = tiny_samples("train", count)
        for sample in samples:
            sample.label = 0
        write_dataset(tmp_path / f"real{count}", tiny_description(), {"train": samples})
        export(tmp_path / f"real{count}", ExportOptions("busi_tree", tmp_path / f"out{count}"))
    assert sorted(path.name for path in (tmp_path / "out9/disc/image").iterdir())[0] == "real_disc_1.png"
    names = sorted(path.name for path in (tmp_path / "out10/disc/image").iterdir())
    assert (names[0], names[-1], len(names)) == ("real_disc_01.png", "real_disc_10.png", 10)


def test_several_mask_classes_are_indices(tmp_path: Path):
    samples = tiny_samples("train", 2)
    for sample in samples:
        sample.mask = np.asarray(sample.mask) * 2
    about = tiny_description().model_copy(
        update={"mask_classes": ("background", "cyst", "lesion"), "palette": ((0, 0, 0), (9, 9, 9), (255, 0, 0))}
    )
    write_dataset(tmp_path / "real", about, {"train": samples})
    provenance = export(tmp_path / "real", ExportOptions("busi_tree", tmp_path / "out"))
    assert provenance["masks"] == "0 background, 1 cyst, 2 lesion"
    assert set(np.unique(pixels(tmp_path / "out/disc/mask/real_disc_001_mask.png"))) == {0, 2}


def test_classes_that_differ_in_capitals_are_refused(tmp_path: Path):
    write_dataset(tmp_path / "real", tiny_description(labels=("a", "A")), {"train": tiny_samples("train", 2)})
    with pytest.raises(MaskLoomError, match="the class 'a' and another one would share a folder"):
        export(tmp_path / "real", ExportOptions("busi_tree", tmp_path / "out"))


@pytest.fixture(scope="module")
def busi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contract]:
    """A prepared dataset with BUSI's classes."""
    folder = tmp_path_factory.mktemp("busi")
    (folder / "raw").mkdir()
    phantom_bus.write_raw(folder / "raw", patients=20, views=1, height=64)
    prepare(experiment(folder / "run", "busi", folder / "raw"), force=False)
    return folder / "run" / "dataset", read_contract(folder / "run" / "dataset")


def pictures_of(dataset: Path) -> dict[bytes, tuple[bytes, str]]:
    """Return mask and class by image, over all splits."""
    rows = [row for split in read_contract(dataset).split_names for row in MaskPromptDataset.open(dataset).split(split)]
    names = read_contract(dataset).description.labels
    return {row["image"].tobytes(): (row["mask"].tobytes(), names[row["label"]]) for row in rows}


def test_the_busi_adapter_reads_the_tree_back(busi: tuple[Path, Contract], tmp_path: Path):
    dataset, contract = busi
    export(dataset, ExportOptions("busi_tree", tmp_path / "tree"))
    # Phantoms of 64 pixels are near-duplicates; whether they are found does not matter for the
    # tree.
    prepare(experiment(tmp_path / "run", "busi", tmp_path / "tree", duplicates="none"), force=False)
    again = read_contract(tmp_path / "run" / "dataset")
    assert sum(split.rows for split in again.splits.values()) == sum(split.rows for split in contract.splits.values())
    assert again.rejected == 0
    assert pictures_of(tmp_path / "run" / "dataset") == pictures_of(dataset)


def test_the_folder_adapter_reads_the_tree_back_with_its_splits_and_groups(busi: tuple[Path, Contract], tmp_path: Path):
    dataset, contract = busi
    export(dataset, ExportOptions("busi_tree", tmp_path / "tree"))
    options = {
        "modality": "breast ultrasound",
        "table": "samples.csv",
        "image_column": "image_path",
        "mask_column": "mask_path",
        "label_column": "class",
        "group_column": "group_id",
        "split_column": "split",
    }
    prepare(experiment(tmp_path / "run", "folder", tmp_path / "tree", options=options), force=False)
    again = read_contract(tmp_path / "run" / "dataset")
    counts = {split: (summary.rows, summary.groups) for split, summary in contract.splits.items()}
    assert {split: (summary.rows, summary.groups) for split, summary in again.splits.items()} == counts
    assert pictures_of(tmp_path / "run" / "dataset") == pictures_of(dataset)


def test_the_folder_adapter_reads_a_tree_of_several_mask_classes_back(tmp_path: Path):
    samples = tiny_samples("train", 8, size=64, per_group=1)
    for sample in samples:
        sample.mask = np.asarray(sample.mask) * np.uint8(1 + int(sample.sample_id[-1]) % 2)
    about = tiny_description(size=64).model_copy(
        update={"mask_classes": ("background", "cyst", "lesion"), "palette": ((0, 0, 0), (9, 9, 9), (255, 0, 0))}
    )
    write_dataset(tmp_path / "real", about, {"train": samples})
    export(tmp_path / "real", ExportOptions("busi_tree", tmp_path / "tree"))
    options = {
        "modality": "toy imaging",
        "table": "samples.csv",
        "image_column": "image_path",
        "mask_column": "mask_path",
        "label_column": "class",
        "group_column": "group_id",
        "split_column": "split",
        "mask_values": {0: "background", 1: "cyst", 2: "lesion"},
    }
    prepare(experiment(tmp_path / "run", "folder", tmp_path / "tree", options=options), force=False)
    assert pictures_of(tmp_path / "run" / "dataset") == pictures_of(tmp_path / "real")


# --- nnunet


def test_the_nnunet_dataset_folder(real: Path, tmp_path: Path):
    export(real, ExportOptions("nnunet", tmp_path / "out", values=["dataset_id=7"]))
    root = tmp_path / "out" / "Dataset007_tiny"
    about = json.loads((root / "dataset.json").read_text())
    assert about["labels"] == {"background": 0, "lesion": 1}
    assert about["channel_names"] == {"0": "toy imaging, 8 bits"}
    assert (about["numTraining"], about["file_ending"]) == (10, ".png")
    cases = {path.name.removesuffix("_0000.png") for path in (root / "imagesTr").iterdir()}
    assert {path.stem for path in (root / "labelsTr").iterdir()} == cases
    assert len(cases) == 10
    (fold,) = json.loads((root / "splits_final.json").read_text())
    assert set(fold["train"]) | set(fold["val"]) == cases
    assert len(fold["val"]) == 4
    assert {path.name for path in (root / "imagesTs").iterdir()} == {"test-0000_0000.png", "test-0001_0000.png"}
    for sample in tiny_samples("train", 6):
        np.testing.assert_array_equal(pixels(root / "labelsTr" / f"{sample.sample_id}.png"), sample.mask)
        np.testing.assert_array_equal(pixels(root / "imagesTr" / f"{sample.sample_id}_0000.png"), sample.image)


def test_nnunet_colour_channels_are_in_one_file(tmp_path: Path):
    samples = tiny_samples("train", 2)
    for sample in samples:
        sample.image = np.repeat(np.asarray(sample.image)[..., None], 3, 2)
    write_dataset(tmp_path / "real", tiny_description(channels=3), {"train": samples})
    export(tmp_path / "real", ExportOptions("nnunet", tmp_path / "out"))
    root = tmp_path / "out" / "Dataset501_tiny"
    assert json.loads((root / "dataset.json").read_text())["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert pixels(root / "imagesTr" / "train-0000_0000.png").shape == (32, 32, 3)
    assert not (root / "splits_final.json").exists()


def test_a_modality_called_ct_does_not_ask_nnunet_for_hounsfield_clipping(tmp_path: Path):
    about = tiny_description().model_copy(update={"modality": "CT"})
    write_dataset(tmp_path / "real", about, {"train": tiny_samples("train", 2)})
    export(tmp_path / "real", ExportOptions("nnunet", tmp_path / "out"))
    channels = json.loads((tmp_path / "out/Dataset501_tiny/dataset.json").read_text())["channel_names"]
    assert channels["0"].casefold() not in ("ct", "nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")


def test_nnunet_needs_training_cases(real: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match="nnunet needs the train split"):
        export(real, ExportOptions("nnunet", tmp_path / "out", splits=["test"]))


def test_nnunet_needs_something_to_segment(tmp_path: Path):
    samples = tiny_samples("train", 2)
    for sample in samples:
        sample.mask = np.zeros((32, 32), np.uint8)
    about = tiny_description().model_copy(update={"mask_classes": ("background",), "palette": ((0, 0, 0),)})
    write_dataset(tmp_path / "real", about, {"train": samples})
    with pytest.raises(MaskLoomError, match="no class besides the background"):
        export(tmp_path / "real", ExportOptions("nnunet", tmp_path / "out"))


def folds_of(folder: Path, output: Path, folds: int) -> list[dict[str, list[str]]]:
    export(folder, ExportOptions("nnunet", output, values=[f"folds={folds}"]))
    found: list[dict[str, list[str]]] = json.loads((output / "Dataset501_tiny/splits_final.json").read_text())
    return found


def test_nnunet_folds_validate_on_every_real_case_once_and_keep_groups_together(real: Path, tmp_path: Path):
    folds = folds_of(real, tmp_path / "out", 3)
    rows = [row for split in ("train", "validation") for row in MaskPromptDataset.open(real).split(split)]
    group_of = {row["sample_id"]: row["group_id"] for row in rows}
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(group_of)
    for fold in folds:
        assert set(fold["train"]) | set(fold["val"]) == set(group_of)
        assert not {group_of[case] for case in fold["train"]} & {group_of[case] for case in fold["val"]}
    assert json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())["options"]["folds"] == 3
    assert folds_of(real, tmp_path / "again", 3) == folds


def test_nnunet_trains_on_synthetic_cases_and_never_validates_on_them(real: Path, synthetic: Path, tmp_path: Path):
    combine(real, [synthetic], CombineOptions(tmp_path / "combined"))
    rows = list(MaskPromptDataset.open(tmp_path / "combined").split("train"))
    parent_of = {row["sample_id"]: row["parent_id"] for row in rows if row["origin"] == "synthetic"}
    assert len(parent_of) == 6
    folds = folds_of(tmp_path / "combined", tmp_path / "out", 2)
    for fold in folds:
        assert not parent_of.keys() & set(fold["val"])
        trained = parent_of.keys() & set(fold["train"])
        assert not {parent_of[case] for case in trained} & set(fold["val"])
    assert set().union(*(fold["train"] for fold in folds)) >= parent_of.keys()
    export(tmp_path / "combined", ExportOptions("nnunet", tmp_path / "one"))
    (fold,) = json.loads((tmp_path / "one/Dataset501_tiny/splits_final.json").read_text())
    assert parent_of.keys() <= set(fold["train"])
    assert "folds" not in json.loads((tmp_path / "one" / PROVENANCE_FILE).read_text())["options"]


def test_nnunet_needs_a_real_group_for_every_fold(real: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match=r"folds=50, but its train and validation rows have \d+ real groups"):
        export(real, ExportOptions("nnunet", tmp_path / "out", values=["folds=50"]))


# --- imagefolder


def test_datasets_loads_the_image_folder(real: Path, tmp_path: Path):
    export(real, ExportOptions("imagefolder", tmp_path / "out"))
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6, "validation": 4, "test": 2}
    for split, rows in loaded.items():
        samples = {row["sample_id"]: row for row in MaskPromptDataset.open(real).split(split)}
        for row in rows:
            sample = samples.pop(row["sample_id"])
            np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(sample["image"]))
            np.testing.assert_array_equal(np.asarray(row["mask"]), np.asarray(sample["mask"]) * 255)
            assert row["label"] == ("disc", "square")[sample["label"]]
            assert (row["text"], row["group_id"], row["origin"]) == (sample["text"], sample["group_id"], "real")
        assert not samples


def test_the_image_folder_is_one_of_torchvisions(real: Path, tmp_path: Path):
    """torchvision takes every folder below the root for a class, and every picture in it for a
    sample.
    """
    export(real, ExportOptions("imagefolder", tmp_path / "out"))
    classes = {path.name: path for path in (tmp_path / "out" / "train").iterdir() if path.is_dir()}
    assert set(classes) == {"disc", "square"}
    images = {sample.sample_id: sample for sample in tiny_samples("train", 6)}
    found = [path for folder in classes.values() for path in folder.rglob("*")]
    assert {path.stem for path in found} == set(images)
    for path in found:
        np.testing.assert_array_equal(pixels(path), images[path.stem].image)


def test_an_image_folder_with_some_masks_missing_still_loads(tmp_path: Path):
    splits = {"train": tiny_samples("train", 4), "test": tiny_samples("test", 2)}
    for sample in (splits["train"][0], *splits["test"]):
        sample.mask, sample.label = None, None
    write_dataset(tmp_path / "real", tiny_description(), splits)
    export(tmp_path / "real", ExportOptions("imagefolder", tmp_path / "out"))
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "out"))
    paths = {row["sample_id"]: row["mask_path"] for row in loaded["train"]}
    assert paths["train-0000"] == ""
    np.testing.assert_array_equal(
        pixels(tmp_path / "out" / "train" / paths["train-0001"]), np.asarray(splits["train"][1].mask) * 255
    )
    assert [row["label"] for row in loaded["test"]] == ["", ""]
    assert (tmp_path / "out" / "train" / "unlabelled" / "train-0000.png").is_file()


def test_classes_called_like_splits_do_not_become_splits(tmp_path: Path):
    splits = {"train": tiny_samples("train", 4), "validation": tiny_samples("validation", 4)}
    write_dataset(tmp_path / "real", tiny_description(labels=("Test", "val")), splits)
    export(tmp_path / "real", ExportOptions("imagefolder", tmp_path / "out"))
    loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "out"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "validation": 4}


def test_a_class_called_unlabelled_is_not_mixed_with_images_without_a_class(tmp_path: Path):
    samples = [replace(sample, label=None if sample.label else 0) for sample in tiny_samples("train", 4)]
    write_dataset(tmp_path / "real", tiny_description(labels=("unlabelled", "other")), {"train": samples})
    export(tmp_path / "real", ExportOptions("imagefolder", tmp_path / "out"))
    folders = {path.name: len(list(path.iterdir())) for path in (tmp_path / "out" / "train").iterdir() if path.is_dir()}
    assert folders == {"class-unlabelled": 2, "unlabelled": 2}


# --- coco


def rasterised(annotation: dict) -> np.ndarray:
    """Draw a run-length encoding, pixel by pixel, as COCO's page describes it."""
    height, width = annotation["segmentation"]["size"]
    flat = [value for place, run in enumerate(annotation["segmentation"]["counts"]) for value in [place % 2] * run]
    return np.array([[flat[x * height + y] for x in range(width)] for y in range(height)], dtype=bool)


def busy_mask() -> np.ndarray:
    mask = np.zeros((9, 13), np.uint8)
    mask[0:3, 0:2] = 1  # begins in the first pixel
    mask[3, 2] = 1  # touches it at a corner: the same region
    mask[6:9, 10:13] = 2  # ends in the last pixel
    mask[7, 11] = 1  # a hole that another class fills
    mask[5, 5] = 2
    return mask


def test_the_union_of_coco_annotations_is_the_mask():
    mask = busy_mask()
    regions = list(mask_regions(mask))
    assert sorted((region["category_id"], region["area"]) for region in regions) == [(1, 1), (1, 7), (2, 1), (2, 8)]
    drawn = np.zeros_like(mask)
    for region in regions:
        pixels_of = rasterised(region)
        assert not drawn[pixels_of].any()  # no pixel twice
        drawn[pixels_of] = region["category_id"]
        assert region["area"] == pixels_of.sum()
        ys, xs = np.nonzero(pixels_of)
        assert region["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
    np.testing.assert_array_equal(drawn, mask)


def test_run_lengths_begin_outside():
    assert run_lengths(np.array([[False, True], [False, True]])) == [2, 2]
    assert run_lengths(np.array([[True, True], [False, True]])) == [0, 1, 1, 2]
    assert run_lengths(np.ones((2, 2), bool)) == [0, 4]


def test_the_coco_files_of_a_dataset(real: Path, tmp_path: Path):
    export(real, ExportOptions("coco", tmp_path / "out"))
    for split in ("train", "validation", "test"):
        content = json.loads((tmp_path / "out" / "annotations" / f"instances_{split}.json").read_text())
        assert content["categories"] == [{"id": 1, "name": "lesion", "supercategory": "toy imaging"}]
        samples = {row["sample_id"]: row for row in MaskPromptDataset.open(real).split(split)}
        assert len(content["images"]) == len(samples)
        ids = [annotation["id"] for annotation in content["annotations"]]
        assert len(set(ids)) == len(ids) >= len(samples)
        for image in content["images"]:
            sample = samples[image["sample_id"]]
            drawn = np.zeros((image["height"], image["width"]), np.uint8)
            for annotation in content["annotations"]:
                if annotation["image_id"] == image["id"]:
                    drawn[rasterised(annotation)] = annotation["category_id"]
            np.testing.assert_array_equal(drawn, np.asarray(sample["mask"]))
            assert image["label"] == ("disc", "square")[sample["label"]]
            picture = pixels(tmp_path / "out" / "images" / split / image["file_name"])
            np.testing.assert_array_equal(picture, np.asarray(sample["image"]))


def test_an_empty_mask_has_no_annotations(tmp_path: Path):
    samples = tiny_samples("train", 2)
    for sample in samples:
        sample.mask = np.zeros((32, 32), np.uint8)
    write_dataset(tmp_path / "real", tiny_description(), {"train": samples})
    export(tmp_path / "real", ExportOptions("coco", tmp_path / "out"))
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert (len(content["images"]), content["annotations"]) == (2, [])


# --- the command


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(MaskLoomError, match=r"unknown format 'cocoa': did you mean 'coco'\? known: busi_tree, coco"):
        open_exporter("cocoa", [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["dataset_id"], "option 'dataset_id': write key=value"),
        (["dataset=1"], "unknown key 'dataset': did you mean 'dataset_id'"),
        (["dataset_id=1000"], "dataset_id='1000': Input should be less than or equal to 999"),
    ],
)
def test_options_that_do_not_fit(values: list[str], message: str):
    with pytest.raises(MaskLoomError, match=message.replace("?", r"\?")):
        open_exporter("nnunet", values)


def test_an_unknown_split(real: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match="no rows in a split 'val'; it has train, validation, test"):
        export(real, ExportOptions("coco", tmp_path / "out", splits=["val"]))


def test_a_dataset_without_rows(tmp_path: Path):
    write_dataset(tmp_path / "real", tiny_description(), {})
    with pytest.raises(MaskLoomError, match="there are no rows to export"):
        export(tmp_path / "real", ExportOptions("coco", tmp_path / "out"))


def test_other_files_are_never_deleted(real: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for force in (False, True):
        with pytest.raises(MaskLoomError, match="not empty and not an earlier export"):
            export(real, ExportOptions("coco", tmp_path / "out", force=force))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_the_dataset_itself_is_no_output(real: Path, tmp_path: Path):
    for output in (real, real / "out", tmp_path):
        with pytest.raises(MaskLoomError, match="keep what is read and what is written apart"):
            export(real, ExportOptions("coco", output, force=True))


def test_a_file_is_no_output(real: Path, tmp_path: Path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(MaskLoomError, match="a file; give a new or empty folder"):
        export(real, ExportOptions("coco", tmp_path / "out"))


def test_an_earlier_export_is_replaced_if_it_is_the_same_or_by_force(real: Path, synthetic: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()  # empty is fine
    export(real, ExportOptions("coco", out))
    (out / "annotations" / "instances_test.json").unlink()
    export(real, ExportOptions("coco", out))
    assert (out / "annotations" / "instances_test.json").is_file()
    with pytest.raises(MaskLoomError, match=r"holds an export of something else.*--force"):
        export(synthetic, ExportOptions("coco", out))
    assert json.loads((out / PROVENANCE_FILE).read_text())["origin"] == "real"
    export(synthetic, ExportOptions("coco", out, force=True))
    assert json.loads((out / PROVENANCE_FILE).read_text())["origin"] == "synthetic"
    assert not (out / "annotations" / "instances_test.json").exists()


def test_a_failure_leaves_the_earlier_export_and_nothing_else(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export(real, ExportOptions("coco", tmp_path / "out"))
    before = sorted(tmp_path.iterdir())

    def failing(path: Path, content: bytes) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr("maskloom.pipeline.dataset.exporters.coco.write_new", failing)
    with pytest.raises(OSError, match="the disk went away"):
        export(real, ExportOptions("coco", tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "out" / "images" / "train" / "train-0000.png").is_file()


def test_two_exports_to_one_folder_do_not_mix(real: Path, tmp_path: Path):
    """Both wrote to one temporary folder, and one of them announced half an export."""
    before = sorted(tmp_path.iterdir())
    with sole_maker(tmp_path / "out"), pytest.raises(MaskLoomError, match="another process is writing there"):
        export(real, ExportOptions("coco", tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before
    export(real, ExportOptions("coco", tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])


def test_two_samples_never_share_a_file(tmp_path: Path):
    write_new(tmp_path / "a.png", b"1")
    with pytest.raises(MaskLoomError, match="two samples would be written to this file"):
        write_new(tmp_path / "a.png", b"2")
    assert (tmp_path / "a.png").read_bytes() == b"1"


@pytest.mark.parametrize("text", ["case-01_b.2", "A"])
def test_safe_names_stay(text: str):
    assert safe_name(text) == text


def test_unsafe_names_are_made_safe_and_stay_different():
    names = ["..", "a/b", "a b", "a?b", "-x", ".x", "x.", "", "é", "a\nb", "x" * 101]
    made = [safe_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(safe_name(name) == name for name in made)


def test_the_command_line(synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["export", str(synthetic), "--output", str(tmp_path / "out"), "--format"]
    app([*arguments, "nnunet", "dataset_id=9", "--split", "train"], standalone_mode=False)
    assert "nnunet, train 6 rows (synthetic 6); masks: 0 background, 1 lesion" in capsys.readouterr().err
    assert (tmp_path / "out" / "Dataset009_tiny").is_dir()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: app([*arguments, "voc"], standalone_mode=False))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown format 'voc'")


def test_the_command_reads_without_torch():
    code = "import sys, maskloom.pipeline.dataset.export, maskloom.pipeline.dataset.combine; print({'torch', 'datasets', 'skimage'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"
