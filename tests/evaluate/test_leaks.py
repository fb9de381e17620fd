"""No evaluation where held-out images have shaped a model: by pixels, by what the images show, and by
what the contracts and records say.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskloom.evaluate import leaks
from maskloom.evaluate.evaluate import evaluate, verified_inputs
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Parent
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.runs import copies
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.copies import require_no_held_out_copies
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.trainings import training_of
from tests.data_prep.audit.test_audit import picture
from tests.evaluate.runs import small_options, tiny_config
from tests.records import write_record
from tests.tiny_datasets import Picture, Sample, synthetic_samples, tiny_description, tiny_samples, write_dataset

SIZE = 64
COUNTS = {"train": 24, "validation": 8, "test": 12, "external_other": 8}
HELD_OUT = ("test", "validation", "external_other")
Splits = dict[str, list[Sample]]


def recoded(image: Picture) -> Picture:
    """Return the image with every grey level changed by at most one."""
    change = np.random.default_rng(0).integers(-1, 2, image.shape)
    return (image + change).clip(0, 255).astype(np.uint8)


def cropped(image: Picture) -> Picture:
    """Return a tenth less of the image, resized."""
    edge = round(0.05 * SIZE)
    return np.asarray(Image.fromarray(image[edge:-edge, edge:-edge]).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


ALTERED: dict[str, Callable[[Picture], Picture]] = {
    "recoded": recoded,
    "cropped": cropped,
    "mirrored": lambda image: np.ascontiguousarray(image[:, ::-1]),
    "turned": lambda image: np.ascontiguousarray(np.rot90(image)),
    "inverted": lambda image: 255 - image,
}


def with_border(image: Picture, grey: int) -> Picture:
    """Return the image at 81 % of its size, on a uniform border."""
    side = round(0.81 * SIZE)
    around = np.full_like(image, grey)
    edge = (SIZE - side) // 2
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    around[edge : edge + side, edge : edge + side] = np.asarray(small)
    return around


# What only the search for copies finds (`evaluate.leaks`).
HIDDEN: dict[str, Callable[[Picture], Picture]] = {
    "grey border": lambda image: with_border(image, 128),
    "mirrored and cropped": lambda image: np.asarray(
        Image.fromarray(image[:-13, :12:-1]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    ),
    "shifted": lambda image: np.pad(image, ((4, 0), (4, 0)), "edge")[:SIZE, :SIZE],
}


def picture_of(split: str, index: int) -> Picture:
    return picture([sum(map(ord, split)), index], SIZE, SIZE)


def write_run(
    run: Path,
    change: Callable[[Splits], None] = lambda splits: None,
    image: Callable[[Splits, int], Picture] = lambda splits, index: picture_of("made", index),
    with_parent: bool = True,
    training: dict[str, str | None] | None = None,
    weights: str | None = "0",
) -> ExperimentConfig:
    """Write a run whose images are strangers to each other, apart from what the arguments change.

    Args:
        run: the run's folder.
        change: alters the real samples in place.
        image: draws the image of a synthetic sample from the real ones and its number.
        with_parent: whether the synthetic dataset names the real one.
        training: what the synthetic dataset states about the training; by default nothing.
        weights: what it then states beside it; None: nothing.
    """
    splits = {split: tiny_samples(split, count, SIZE) for split, count in COUNTS.items()}
    for split, samples in splits.items():
        for index, sample in enumerate(samples):
            sample.image = picture_of(split, index)
    change(splits)
    real = write_dataset(run / "dataset", tiny_description(SIZE), splits)
    generation: dict[str, Any] = {"generator": "pix2pix"} | ({} if training is None else {"training": training})
    generation |= {} if training is None or weights is None else {"weights": weights}
    about = tiny_description(SIZE, "synthetic").model_copy(update={"preprocessing": {"generation": generation}})
    made = synthetic_samples(splits["train"], "made", lambda parent, index: image(splits, index))
    parent = Parent(path="../../dataset", digest=real.digest) if with_parent else None
    write_dataset(run / "synthetic" / "pix2pix", about, {"train": made}, parent)
    return tiny_config(run, {"quality": small_options("quality")}, ("pix2pix",))


def stopped(config: ExperimentConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """Evaluate and return the one line with which that stops, before anything is written."""
    folder = config.run_folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "audit" not in path.parts}
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: evaluate(config, force=True))
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "audit" not in path.parts}
    assert len(errors) == 1 and after == before
    return errors[0]


@pytest.mark.parametrize("split", HELD_OUT)
def test_held_out_images_handed_in_as_synthetic(tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str) -> None:
    config = write_run(tmp_path, image=lambda splits, index: splits[split][index % COUNTS[split]].image)  # type: ignore[return-value]
    error = stopped(config, capsys)
    assert f"({split}) and made-" in error and f"train of {tmp_path / 'synthetic' / 'pix2pix'}" in error
    assert error.endswith("or leave it out with generate.generators.NAME=false")


@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("how", ALTERED)
def test_altered_held_out_images_handed_in_as_synthetic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, how: str
) -> None:
    config = write_run(
        tmp_path,
        image=lambda splits, index: ALTERED[how](picture_of(split, 5)) if index == 3 else picture_of("made", index),
    )
    error = stopped(config, capsys)
    turned = ", mirrored or turned" if how in ("mirrored", "turned") else ""
    made = tmp_path / "synthetic" / "pix2pix"
    assert f"{tmp_path / 'dataset'}: 1 image(s) are copies of held-out images: " in error
    assert f"made-0003 (train of {made}) shows {split}-0005 ({split}{turned}, correlation " in error
    assert error.endswith("or leave it out with generate.generators.NAME=false")


@pytest.mark.parametrize("split", HELD_OUT)
def test_train_images_under_other_ids_among_the_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    def change(splits: Splits) -> None:
        for sample, other in zip(splits[split], splits["train"], strict=False):
            sample.image, sample.label = other.image, other.label

    error = stopped(write_run(tmp_path, change), capsys)
    assert f"{COUNTS[split]} pair(s) of images make results wrong: identical images in two splits: train-" in error
    assert f"({split})" in error and "prepare the dataset again" in error


@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("how", ALTERED)
def test_altered_train_images_among_the_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, how: str
) -> None:
    def change(splits: Splits) -> None:
        splits[split][5].image = ALTERED[how](picture_of("train", 2))

    error = stopped(write_run(tmp_path, change), capsys)
    assert f"train-0002 (train of {tmp_path / 'dataset'}) shows {split}-0005 ({split}" in error
    assert error.endswith("and prepare the dataset again")


@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("how", HIDDEN)
def test_held_out_images_that_only_the_search_for_copies_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, how: str
) -> None:
    config = write_run(
        tmp_path,
        image=lambda splits, index: HIDDEN[how](picture_of(split, 5)) if index == 3 else picture_of("made", index),
    )
    made = MaskPromptDataset.open(tmp_path / "synthetic" / "pix2pix")
    require_no_held_out_copies(Run(tmp_path), MaskPromptDataset.open(tmp_path / "dataset"), [made])
    error = stopped(config, capsys)
    assert f"{tmp_path / 'dataset'}: 1 image(s) are altered copies of held-out images: " in error
    assert f"made-0003 (train of {made.folder}) shows {split}-0005 ({split}, " in error
    assert error.endswith("or leave it out with generate.generators.NAME=false")


def test_train_images_that_only_the_search_for_copies_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(splits: Splits) -> None:
        for index in range(3):
            splits["train"][index].image = with_border(picture_of("test", index), 128)

    error = stopped(write_run(tmp_path, change), capsys)
    dataset = tmp_path / "dataset"
    assert (
        f"{dataset}: 3 image(s) are altered copies of held-out images: train-0000 (train of {dataset}) shows " in error
    )
    assert "; images of one patient must lie in one split" in error


@pytest.mark.parametrize("how", ["recoded", "grey border"])
def test_leaks_of_real_and_of_synthetic_images_have_a_remedy_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    change = (ALTERED | HIDDEN)[how]

    def of_real(splits: Splits) -> None:
        splits["train"][2].image = change(picture_of("test", 1))
        splits["train"][2].label = splits["test"][1].label

    def of_synthetic(_: Splits, index: int) -> Picture:
        return change(picture_of("test", 5)) if index == 3 else picture_of("made", index)

    error = stopped(write_run(tmp_path, of_real, of_synthetic), capsys)
    assert "train-0002" in error and "made-0003" in error
    assert "prepare the dataset again" in error
    assert error.endswith("or leave it out with generate.generators.NAME=false")


def test_many_copies_are_counted_and_the_first_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = stopped(write_run(tmp_path, image=lambda _, index: recoded(picture_of("test", index % 12))), capsys)
    assert "24 image(s) are copies" in error and "made-0002" in error and "made-0003" not in error
    listed = listed_leaks(error, 21)
    assert [row["image"] for row in listed] == [f"made-{index:04}" for index in range(24)]
    assert listed[13]["shows"] == "test-0001" and listed[13]["shows_split"] == "test" and listed[13]["similarity"] > 0.9


def listed_leaks(error: str, more: int) -> list[dict[str, Any]]:
    """Return the leaks in the file that an error names."""
    found = re.search(rf"; and {more} more; all are listed in (.+?\.jsonl); ", error)
    assert found
    return [json.loads(line) for line in Path(found[1]).read_text().splitlines()]


def test_every_identical_image_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = stopped(write_run(tmp_path, image=lambda _, index: picture_of("test", index % 12)), capsys)
    listed = listed_leaks(error, 21)
    assert sorted(row["image"] for row in listed) == [f"made-{index:04}" for index in range(24)]
    assert {row["shows"] for row in listed} == {f"test-{index:04}" for index in range(12)}
    made = str(tmp_path / "synthetic" / "pix2pix")
    assert {(row["image_dataset"], row["shows_split"]) for row in listed} == {(made, "test")}


def test_every_altered_image_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = stopped(
        write_run(tmp_path, image=lambda _, index: with_border(picture_of("test", index % 12), 128)), capsys
    )
    assert "24 image(s) are altered copies" in error
    listed = listed_leaks(error, 21)
    assert [row["image"] for row in listed] == [f"made-{index:04}" for index in range(24)]
    assert all(row["similarity"] > row["threshold"] for row in listed)


def test_a_synthetic_dataset_without_a_parent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = stopped(write_run(tmp_path, with_parent=False), capsys)
    contract = tmp_path / "synthetic" / "pix2pix" / "contract.json"
    assert f"{contract}: names no real dataset (parent: null)" in error and "generate the set from" in error


STAGES = ("train", "baselines/pix2pix")


def trained(config: ExperimentConfig, stage: str, dataset: str, weights: str = "w") -> None:
    write_record(
        Run(config.run_folder),
        stage,
        inputs={"dataset": dataset, "backbone": "b"},
        results={"weights_digest": weights},
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_generator_that_states_another_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    config = write_run(tmp_path, training={"stage": stage, "dataset": "another", "weights": "w"})
    error = stopped(config, capsys)
    assert f"pix2pix: its generator was trained ({stage}) on another version of {tmp_path / 'dataset'}" in error
    assert error.endswith(f"run {stage.split('/')[0]} and generate again")


@pytest.mark.parametrize("stage", STAGES)
def test_an_older_synthetic_dataset_is_checked_by_the_record_of_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    config = write_run(tmp_path)
    made = tmp_path / "synthetic" / "pix2pix"
    preprocessing = {"generation": {"generator": "pix2pix", "weights": "0"}}
    about = tiny_description(SIZE, "synthetic").model_copy(update={"preprocessing": preprocessing})
    real = verified_inputs(Run(tmp_path), config).real.digest
    samples = synthetic_samples(tiny_samples("train", 24, SIZE), "made", lambda _, index: picture_of("made", index))
    write_dataset(made, about, {"train": samples}, Parent(path="../../dataset", digest=real))
    trained(config, stage, "another")
    assert f"its generator was trained ({stage}) on another version" in stopped(config, capsys)
    trained(config, stage, real)
    verified_inputs(Run(tmp_path), config)


def test_weights_that_were_trained_again_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = verified_inputs(Run(tmp_path), write_run(tmp_path)).real.digest
    config = write_run(tmp_path, training={"stage": "baselines/pix2pix", "dataset": real, "weights": "w"})
    trained(config, "baselines/pix2pix", real)
    verified_inputs(Run(tmp_path), config)
    trained(config, "baselines/pix2pix", real, weights="others")
    error = stopped(config, capsys)
    assert "made with other weights than those that baselines/pix2pix has trained since; run generate again" in error


def test_a_backbone_without_training_needs_no_dataset(tmp_path: Path) -> None:
    config = write_run(tmp_path, training={"stage": None, "dataset": None, "weights": "backbone"})
    verified_inputs(Run(tmp_path), config)


NOTHING_TRAINED = {"stage": None, "dataset": None, "weights": "b"}


def test_a_backbone_that_the_training_of_another_generator_used(tmp_path: Path) -> None:
    config = write_run(tmp_path, training=NOTHING_TRAINED, weights="b")
    real = verified_inputs(Run(tmp_path), config).real.digest
    trained(config, "train", real)
    verified_inputs(Run(tmp_path), config)
    write_record(Run(tmp_path), "generate", inputs={"weights of pix2pix": "b"})
    verified_inputs(Run(tmp_path), config)


def test_a_tokenizer_of_its_own_is_part_of_the_backbone(tmp_path: Path) -> None:
    inputs = {"backbone": "b", "tokenizer": "t"}
    whole = value_digest(inputs)
    config = write_run(tmp_path, training=NOTHING_TRAINED | {"weights": whole}, weights=whole)
    write_record(Run(tmp_path), "train", inputs=inputs)
    verified_inputs(Run(tmp_path), config)
    contract = MaskPromptDataset.open(tmp_path / "synthetic" / "pix2pix").contract
    assert training_of(Run(tmp_path), "pix2pix", contract) is None


def test_images_of_another_source_state_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path, training=dict.fromkeys(NOTHING_TRAINED), weights=None)
    trained(config, "train", verified_inputs(Run(tmp_path), config).real.digest)
    verified_inputs(Run(tmp_path), config)
    write_record(Run(tmp_path), "generate", inputs={"weights of pix2pix": "w"})
    assert "states that nothing was trained, but its weights are not those of the backbone" in stopped(config, capsys)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("weights", ["0", "b"])
def test_a_statement_that_nothing_was_trained_where_the_run_trains_the_generator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, weights: str
) -> None:
    """The made-up statement agrees with itself in neither case: the set's weights are not the backbone's."""
    config = write_run(tmp_path, training=NOTHING_TRAINED | {"weights": weights}, weights="trained")
    trained(config, stage, verified_inputs(Run(tmp_path), config).real.digest)
    error = stopped(config, capsys)
    assert "contract.json: description.preprocessing.generation.training: states that nothing was trained, but" in error
    assert error.endswith("; run generate again with --force")


@pytest.mark.parametrize(
    ("stated", "recorded", "problem"),
    [
        ("baselines/other", "train", "states the training of another generator, baselines/other"),
        ("train", "baselines/pix2pix", "states that train trained its generator, but baselines/pix2pix did"),
        ("train", "generate", "states that train trained its generator, but this run has no record of that training"),
        ("baselines/pix2pix", "generate", "but this run has no record of that training"),
    ],
)
def test_a_stated_training_that_is_not_the_recorded_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stated: str, recorded: str, problem: str
) -> None:
    real = verified_inputs(Run(tmp_path), write_run(tmp_path)).real.digest
    config = write_run(tmp_path, training={"stage": stated, "dataset": real, "weights": "w"})
    write_record(Run(tmp_path), recorded, inputs={"dataset": real, "weights of pix2pix": "w"})
    assert problem in stopped(config, capsys)


@pytest.mark.parametrize("stage", STAGES)
def test_a_set_copied_from_another_run(tmp_path: Path, stage: str) -> None:
    """This run has trained and generated with another generator only."""
    real = verified_inputs(Run(tmp_path), write_run(tmp_path)).real.digest
    config = write_run(tmp_path, training={"stage": stage, "dataset": real, "weights": "w"})
    write_record(Run(tmp_path), "generate", inputs={"dataset": real, "weights of other": "w"})
    trained(config, "baselines/other", real)
    verified_inputs(Run(tmp_path), config)


@pytest.mark.parametrize(
    "training", [{"stage": "../../elsewhere", "dataset": "d", "weights": "w"}, {"stage": "train"}, {}]
)
def test_a_damaged_statement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], training: dict[str, str | None]
) -> None:
    error = stopped(write_run(tmp_path, training=training), capsys)
    assert "contract.json: description.preprocessing.generation.training" in error
    assert error.endswith("run generate again with --force")


def test_strangers_pass_and_are_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path)
    verified_inputs(Run(tmp_path), config)
    first = capsys.readouterr().err
    assert "no copies of held-out images among 76 images" in first
    assert "no altered held-out images among 76 images" in first
    verified_inputs(Run(tmp_path), config)
    again = capsys.readouterr().err
    assert "no copies" not in again and "no altered" not in again
    monkeypatch.setattr(copies, "VERSION", copies.VERSION + 1)
    monkeypatch.setattr(leaks, "VERSION", leaks.VERSION + 1)
    verified_inputs(Run(tmp_path), config)
    renewed = capsys.readouterr().err
    assert "no copies" in renewed and "no altered" in renewed


def test_a_copy_of_a_train_image_is_a_finding_of_the_metrics_and_no_leak(tmp_path: Path) -> None:
    config = write_run(tmp_path, image=lambda _, index: recoded(picture_of("train", index)))
    verified_inputs(Run(tmp_path), config)


def test_held_out_splits_may_share_an_image(tmp_path: Path) -> None:
    def change(splits: Splits) -> None:
        splits["external_other"][1].image = recoded(picture_of("test", 1))

    config = write_run(tmp_path, change)
    verified_inputs(Run(tmp_path), config)


def neighbouring(index: int, shift: float) -> Picture:
    """Return a slice of a volume between two pictures: at 0.5, as much of one as of the other."""
    mixed = (1 - shift) * picture_of("slice", index) + shift * picture_of("next", index)
    return mixed.astype(np.uint8)


def test_neighbouring_slices_are_no_copies(tmp_path: Path) -> None:
    def change(splits: Splits) -> None:
        for index in range(8):
            splits["train"][index].image, splits["test"][index].image = (neighbouring(index, at) for at in (0, 0.45))

    config = write_run(tmp_path, change, image=lambda _, index: neighbouring(index % 8, 0.1))
    verified_inputs(Run(tmp_path), config)


def test_blank_images_are_no_copies(tmp_path: Path) -> None:
    def change(splits: Splits) -> None:
        splits["train"][0].image = np.full((SIZE, SIZE), 7, np.uint8)
        splits["test"][0].image = np.full((SIZE, SIZE), 9, np.uint8)

    verified_inputs(Run(tmp_path), write_run(tmp_path, change, lambda _, index: np.full((SIZE, SIZE), index, np.uint8)))


def test_too_many_images_are_reported_and_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, image=lambda _, index: recoded(picture_of("test", index % 12)))
    monkeypatch.setattr(copies, "NEAR_LIMIT", 75)
    monkeypatch.setattr(leaks, "NEAR_LIMIT", 75)
    verified_inputs(Run(tmp_path), config)
    assert "76 images are more than 75: only identical images were looked for" in capsys.readouterr().err


def test_a_disk_without_space_for_the_comparison_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_run(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maskloom.pipeline.dataset.audit.held_out.signature", full)
    with pytest.raises(MaskLoomError, match=r"images cannot be compared \(.*No space left.*\); free space there"):
        verified_inputs(Run(tmp_path), config)
