"""Images that are not square, and of several sizes (buckets): from raw files to training,
generation and evaluation.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.processing.resizing import nearest_size
from maskloom.evaluate.inputs import ImageSet
from maskloom.generate.generate import generate
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.train import build_task, train_stage
from tests.data_prep.experiment import dataset_bytes
from tests.tiny_datasets import tiny_description, tiny_picture, write_dataset
from tests.train_controlnet.conftest import tiny_values
from tests.train_controlnet.test_rows import sized_samples, write_sized

RAW_SIZES = ((40, 40), (40, 62), (60, 38))
SIZES = ((32, 32), (32, 48), (48, 32))


def write_raw(folder: Path, count: int = 18) -> Path:
    """Write grey images of three shapes with masks, one patient each."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(count):
        height, width = RAW_SIZES[index % 3]
        image, mask = (picture[:height, :width] for picture in tiny_picture(index, 64, index // 3 % 2, 0))
        mask = mask.copy()
        mask[4:9, 4:9] = 1  # cut-outs may have lost their disc
        Image.fromarray(image).save(folder / "images" / f"p{index:02d}.png")
        Image.fromarray(mask * 255).save(folder / "masks" / f"p{index:02d}.png")
    return folder


def experiment(run: Path, backbone: Path, raw: Path, data: dict[str, Any], **train: Any) -> ExperimentConfig:
    values = tiny_values(run, backbone, max_train_steps=2, validation_steps=2, num_validation_images=1, **train)
    values["data"] = {
        "dataset": "folder",
        "raw_dir": str(raw),
        "options": {"modality": "toy imaging", "images": "images/*", "masks": "masks/{stem}.png"},
        "num_workers": 1,
        "duplicates": "none",
        **data,
    }
    values["generate"] = {
        "generators": {"controlnet": {}},
        "mask_source": ["train", "warped"],
        "num_images": 5,
        "num_inference_steps": 1,
        "batch_size": 4,
    }
    return ExperimentConfig.model_validate(values)


def shapes(dataset: Path, split: str = "train") -> list[tuple[int, int]]:
    return [(row["image"].height, row["image"].width) for row in MaskPromptDataset.open(dataset).split(split)]


def test_an_image_that_is_not_square_goes_all_the_way(tmp_path: Path, backbone: Path) -> None:
    config = experiment(tmp_path / "run", backbone, write_raw(tmp_path / "raw"), {"image_size": [32, 48]}, augment={})
    prepare(config, force=False)
    run = Run(config.run_folder)
    assert verify_fully(run.dataset).description.image_size == (32, 48)
    assert set(shapes(run.dataset)) == {(32, 48)}
    train_stage(config, force=False)
    with Image.open(run.logs("train") / "images" / "step-000002.png") as grid:
        assert grid.height % 32 == 0
        assert grid.width % 48 == 0
    generate(config, force=False)
    assert shapes(run.synthetic / "controlnet") == [(32, 48)] * 5


def test_buckets_go_all_the_way(tmp_path: Path, backbone: Path) -> None:
    data = {"image_size": 32, "buckets": [[32, 48], [48, 32]], "splits": {"train": 0.6, "validation": 0.2, "test": 0.2}}
    config = experiment(tmp_path / "run", backbone, write_raw(tmp_path / "raw"), data)
    prepare(config, force=False)
    run = Run(config.run_folder)
    real = verify_fully(run.dataset)
    assert real.description.sizes == SIZES
    assert read_json(run.dataset / CONTRACT_FILE, "")["description"]["buckets"] == [[32, 48], [48, 32]]
    for split in ("train", "test"):
        for row in real.split(split):
            expected = SIZES[int(row["sample_id"][-2:]) % 3]
            for name in ("image", "mask", "conditioning_image"):
                assert (row[name].height, row[name].width) == expected
    assert len(set(shapes(run.dataset))) == 3
    train_stage(config, force=False)
    with Image.open(run.logs("train") / "images" / "step-000002.png") as grid:
        assert grid.width % 3 == 0
    generate(config, force=False)
    synthetic = verify_fully(run.synthetic / "controlnet")
    parents = {row["sample_id"]: row["image"].size for row in real.split("train")}
    made = synthetic.split("train")
    assert all(row["image"].size == row["mask"].size == parents[row["parent_id"]] for row in made)
    assert len({row["image"].size for row in made}) > 1
    for image_set in (ImageSet("real", real, "train"), ImageSet("made", synthetic, "train")):
        assert image_set.images().shape == (len(image_set), 32, 32, 1)
        assert image_set.masks()[0].shape == (len(image_set), 32, 32)


def test_a_set_of_one_size_is_the_same_with_and_without_the_key(tmp_path: Path, backbone: Path) -> None:
    raw, written = write_raw(tmp_path / "raw", 6), []
    for name, data in (("without", {}), ("with", {"buckets": []}), ("base twice", {"buckets": [32]})):
        config = experiment(tmp_path / name, backbone, raw, {"image_size": 32, **data})
        prepare(config, force=False)
        written.append(dataset_bytes(tmp_path / name / "dataset"))
    assert written[0] == written[1]
    assert b"buckets" not in b"".join(written[0].values())
    rows = [{file: data for file, data in files.items() if file.startswith("data/")} for files in written]
    assert rows[2] == rows[0]


def test_a_description_without_buckets_says_nothing_of_them() -> None:
    about = tiny_description()
    assert "buckets" not in about.model_dump(mode="json")
    assert Description.model_validate_json(about.model_dump_json()) == about
    some = about.model_copy(update={"buckets": ((32, 48),)})
    assert Description.model_validate_json(some.model_dump_json()).sizes == ((32, 32), (32, 48))


def test_a_row_of_another_size_is_found(tmp_path: Path) -> None:
    write_sized(tmp_path, [(32, 32), (32, 48)])
    with pytest.raises(
        MaskLoomError, match=r"sample train-0001: image is \(32, 48\) uint8, the contract says \(32, 32\)"
    ):
        verify_fully(tmp_path / "dataset")


def test_pictures_of_one_row_must_agree(tmp_path: Path) -> None:
    samples = sized_samples("train", [(32, 48), (32, 48)])
    samples[1].conditioning_image = samples[1].conditioning_image[:, :32]  # type: ignore[index]
    write_dataset(tmp_path, tiny_description().model_copy(update={"buckets": ((32, 48),)}), {"train": samples})
    with pytest.raises(MaskLoomError, match=r"sample train-0001: conditioning_image is \(32, 32, 3\)"):
        verify_fully(tmp_path)


def test_the_nearest_ratio_wins_and_then_the_nearest_area() -> None:
    sizes = [(64, 64), (64, 96), (96, 64), (128, 128)]
    found = {source: nearest_size(source, sizes) for source in ((70, 70), (500, 480), (50, 75), (100, 170), (300, 100))}
    assert found == {
        (70, 70): (64, 64),
        (500, 480): (128, 128),
        (50, 75): (64, 96),
        (100, 170): (64, 96),
        (300, 100): (96, 64),
    }


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_turned_images_go_to_turned_buckets(height: int, width: int) -> None:
    sizes = [(64, 64), (64, 96), (96, 64), (64, 128), (128, 64)]
    found, turned = nearest_size((height, width), sizes), nearest_size((width, height), sizes)
    assert found == turned[::-1]
    assert nearest_size((height, width), [(8, 16)]) == (8, 16)


def test_a_bucket_must_suit_the_vae() -> None:
    with pytest.raises(ValidationError, match=r"buckets=\(32, 50\): both sides must be positive multiples of 8"):
        DataConfig(dataset="folder", image_size=(32, 32), buckets=[(32, 48), (32, 50)])
    assert DataConfig(dataset="folder", image_size=(32, 32), buckets=[48, [32, 32]]).sizes == [(32, 32), (48, 48)]  # type: ignore[list-item]


def test_validation_takes_rows_of_several_sizes(tmp_path: Path, backbone: Path) -> None:
    write_sized(tmp_path, [SIZES[i % 2] for i in range(6)], [SIZES[i % 2] for i in range(4)])
    config = ExperimentConfig.model_validate(tiny_values(tmp_path, backbone, num_validation_images=2))
    task = build_task(config, Run(tmp_path), MaskPromptDataset.open(tmp_path / "dataset"), Accelerator(cpu=True))
    figures = task.validate(1)
    assert np.isfinite(figures["loss"])
