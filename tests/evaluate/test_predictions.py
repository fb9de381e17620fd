"""Predictions of other models are read back into the same table as those of our own."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from maskloom import cli
from maskloom.evaluate.downstream.cases import ScoredTestSet, read_cases
from maskloom.evaluate.downstream.classifier import predicted_probabilities
from maskloom.evaluate.downstream.compare import compare
from maskloom.evaluate.downstream.predictions import find_models, read_masks, read_predictions
from maskloom.evaluate.metrics import downstream_classification, downstream_segmentation
from maskloom.models.segmenter import predicted_masks
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import Sample, tiny_description, tiny_samples, write_dataset, write_tiny_run

COUNTS = {"train": 12, "validation": 6, "test": 14, "external_abroad": 6}


def some_lack_a_target(sample: Sample) -> None:
    if sample.sample_id == "test-0003":
        sample.mask = None
    if sample.sample_id == "test-0005" and sample.mask is not None:
        sample.mask = np.zeros_like(sample.mask)
    if sample.sample_id == "test-0007":
        sample.label = None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("run")
    write_tiny_run(folder, {"controlnet": faithful}, COUNTS, change=some_lack_a_target)
    return folder


def own_models(run: Path, metric: str, trains: str, **options: Any) -> tuple[list[ScoredTestSet], list[Any]]:
    """Return the cases of our own models, and their networks in the order of training."""
    module = {"downstream_segmentation": downstream_segmentation}.get(metric, downstream_classification)
    original, networks = getattr(module, trains), []

    def noted(*arguments: Any) -> Any:
        network, losses = original(*arguments)
        networks.append(network)
        return network, losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, trains, noted)
        result: Any = answer(tiny_inputs(run, ("controlnet",)), metric, seeds=3, **options)
    return result.cases, networks


def write_models(cases: ScoredTestSet, networks: list[Any], write: Callable[[str, int, Any], None]) -> None:
    models = [(arm, seed) for arm, found in cases.arms.items() for seed in found.seeds]
    for (arm, seed), network in zip(models, networks, strict=True):
        write(arm, seed, network)


def write_masks(folder: Path, masks: Mapping[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sample, mask in masks.items():
        Image.fromarray(mask).save(folder / f"{sample}.png")


def assert_same(found: ScoredTestSet, own: ScoredTestSet, left_out: tuple[str, ...] = ()) -> None:
    assert (found.metric, found.test_set, found.samples, found.groups) == (
        own.metric,
        own.test_set,
        own.samples,
        own.groups,
    )
    for arm, one in own.arms.items():
        names = [name for name in one.values if not name.endswith(left_out or ("\0",))]
        assert found.arms[arm].seeds == one.seeds
        assert list(found.arms[arm].values) == names
        for name in names:
            np.testing.assert_allclose(found.arms[arm].values[name], one.values[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [32, 16])
@pytest.mark.parametrize(("split", "number"), [("test", 0), ("external_abroad", 1)])
def test_the_same_masks_give_the_same_table(run: Path, tmp_path: Path, side: int, split: str, number: int) -> None:
    cases, networks = own_models(run, "downstream_segmentation", "train_segmenter", image_size=side)
    inputs = tiny_inputs(run, ("controlnet",))
    test = inputs.test if split == "test" else inputs.externals["abroad"]
    images, present = test.images((side, side)), test.masks((side, side))[1]

    def write(arm: str, seed: int, network: Any) -> None:
        masks = predicted_masks(network, images[present], "cpu")
        samples = [one for one, kept in zip(test.columns["sample_id"], present, strict=True) if kept]
        write_masks(tmp_path / arm / f"fold_{seed}", dict(zip(samples, masks, strict=True)))
        (tmp_path / arm / f"fold_{seed}" / "plans.json").write_text("{}")  # nnU-Net leaves its own files

    write_models(cases[number], networks, write)
    found = read_predictions(tmp_path, run / "dataset", split, 2.0)
    assert_same(found, cases[number])
    assert compare(found, scores=["Dice", "IoU"]) == compare(cases[number], scores=["Dice", "IoU"])


def test_the_same_probabilities_give_the_same_table(run: Path, tmp_path: Path) -> None:
    cases, networks = own_models(run, "downstream_classification", "train_classifier")
    inputs = tiny_inputs(run, ("controlnet",))
    test, labels = inputs.test, inputs.real.description.labels
    kept = np.flatnonzero(test.labels >= 0)

    def write(arm: str, seed: int, network: Any) -> None:
        probabilities = predicted_probabilities(network, test.images((32, 32))[kept], "cpu")
        (tmp_path / arm).mkdir(exist_ok=True)
        with (tmp_path / arm / f"{seed}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["sample_id", *labels])
            table.writerows([test.columns["sample_id"][i], *row] for i, row in zip(kept, probabilities, strict=True))

    write_models(cases[0], networks, write)
    found = read_predictions(tmp_path, run / "dataset", "test", 2.0)
    assert_same(found, cases[0], left_out=("(validation)",))
    assert compare(found, scores=["AUROC"]) == compare(cases[0], scores=["AUROC"])


@pytest.fixture
def predictions(run: Path, tmp_path: Path) -> Path:
    """Two arms of three models: the true masks, and some of them missed."""
    test = tiny_inputs(run, ()).test
    masks, present = test.masks()
    samples = [one for one, kept in zip(test.columns["sample_id"], present, strict=True) if kept]
    for arm, hit in (("real", 0.5), ("mine", 0.9)):
        for seed in range(3):
            random = np.random.default_rng([seed, len(arm)])
            found = [mask * np.uint8(random.random() < hit) for mask in masks[present]]
            write_masks(tmp_path / "predictions" / arm / str(seed), dict(zip(samples, found, strict=True)))
    return tmp_path / "predictions"


def test_the_command_writes_a_table_and_compares_it(predictions: Path, run: Path, tmp_path: Path) -> None:
    arguments = ["import-predictions", str(predictions), "--dataset", str(run / "dataset")]
    arguments += ["--cases", str(tmp_path / "own.parquet")]
    for _ in range(2):  # an earlier table is replaced
        shown = CliRunner().invoke(cli.app, arguments)
        assert shown.exit_code == 0
        assert "mine" in shown.stdout
        assert "masks are compared at 32 x 32 pixels, the size of the predictions" in shown.stderr
    [cases] = read_cases(tmp_path / "own.parquet")
    assert set(cases.arms) == {"real", "mine"}
    assert len(cases.samples) == 13
    again = CliRunner().invoke(cli.app, ["compare", str(tmp_path / "own.parquet"), "--score", "Dice"])
    assert again.exit_code == 0
    assert "mine" in again.stdout


def test_one_arm_alone_is_a_table_as_well(predictions: Path, run: Path, tmp_path: Path) -> None:
    (predictions / "real").rename(tmp_path / "elsewhere")
    arguments = ["import-predictions", str(predictions), "--dataset", str(run / "dataset")]
    shown = CliRunner().invoke(cli.app, [*arguments, "--cases", str(tmp_path / "own.parquet")])
    assert shown.exit_code == 0
    assert "mine Dice" in shown.stderr


def test_another_file_is_not_replaced(predictions: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "own.parquet").write_text("mine")
    arguments = ["import-predictions", str(predictions), "--dataset", str(run / "dataset")]
    shown = CliRunner().invoke(cli.app, [*arguments, "--cases", str(tmp_path / "own.parquet")])
    assert isinstance(shown.exception, MaskLoomError)
    assert (tmp_path / "own.parquet").read_text() == "mine"


def without_a_folder(folder: Path) -> None:
    folder.rename(folder.with_name("away"))


def without_models(folder: Path) -> None:
    for arm in ("real", "mine"):
        (folder / arm).rename(folder.with_name(f"away-{arm}"))


def without_a_seed(folder: Path) -> None:
    (folder / "mine/1").rename(folder / "mine/best")


def with_a_seed_twice(folder: Path) -> None:
    (folder / "mine/1").rename(folder / "mine/fold_2")


def with_both_kinds(folder: Path) -> None:
    (folder / "mine/7.csv").write_text("sample_id\n")


def without_a_case(folder: Path) -> None:
    (folder / "mine/1/test-0002.png").unlink()


def with_another_case(folder: Path) -> None:
    write_masks(folder / "mine/1", {"test-9999": np.zeros((32, 32), np.uint8)})


def without_pixels(folder: Path) -> None:
    (folder / "mine/1/test-0002.png").write_bytes(b"no image")


def with_colours(folder: Path) -> None:
    write_masks(folder / "mine/1", {"test-0002": np.zeros((32, 32, 3), np.uint8)})


def with_grey_levels(folder: Path) -> None:
    write_masks(folder / "mine/1", {"test-0002": np.full((32, 32), 255, np.uint8)})


def with_another_size(folder: Path) -> None:
    write_masks(folder / "mine/1", {"test-0002": np.zeros((32, 30), np.uint8)})


def shrink(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            smaller = image.resize((16, 16), Image.Resampling.NEAREST)
        smaller.save(path)


def with_a_seed_of_another_size(folder: Path) -> None:
    shrink(folder / "mine/1")


def with_an_arm_of_another_size(folder: Path) -> None:
    shrink(folder / "real")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_folder, "no such folder of predictions; give a folder ARM/SEED"),
        (without_models, "no predictions in it; give a folder ARM/SEED"),
        (without_a_seed, r"mine/best: its name must end with the model's seed"),
        (with_a_seed_twice, r"arm 'mine' has another model of seed 2"),
        (with_both_kinds, "holds both masks and probabilities"),
        (without_a_case, r"mine/1/test-0002\.png: no such file, and 0 more are missing"),
        (with_another_case, r"mine/1/test-9999\.png: no test image has this name"),
        (without_pixels, r"mine/1/test-0002\.png: not a readable PNG"),
        (with_colours, r"mine/1/test-0002\.png: a colour image; write class indices"),
        (with_grey_levels, r"mine/1/test-0002\.png: holds the value 255; write class indices from 0 to 1"),
        (with_another_size, r"mine/1/test-0002\.png: 30 x 32 pixels, and .* has 32 x 32"),
        (with_a_seed_of_another_size, r"mine/1: its masks have 16 x 16 pixels, those of \S+mine/0 32 x 32; write all"),
        (with_an_arm_of_another_size, r"real/0: its masks have 16 x 16 pixels, those of \S+mine/0 32 x 32; write all"),
    ],
)
def test_a_mistake_in_the_masks_is_one_line(
    predictions: Path, run: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(predictions)
    with pytest.raises(MaskLoomError, match=message) as caught:
        read_predictions(predictions, run / "dataset", "test", 2.0)
    assert "\n" not in str(caught.value)


def test_an_unknown_split(predictions: Path, run: Path) -> None:
    with pytest.raises(MaskLoomError, match="no test set 'train'; it has test, external_abroad"):
        read_predictions(predictions, run / "dataset", "train", 2.0)


def test_a_tolerance_that_is_no_number(predictions: Path, run: Path) -> None:
    with pytest.raises(MaskLoomError, match="--surface-tolerance nan: give a number of pixels"):
        read_predictions(predictions, run / "dataset", "test", float("nan"))


ROWS = [f"test-{i:04},0.25,0.75" for i in range(14) if i != 7]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sample_id,disc,squar", *ROWS], "column 'square' is missing; it needs sample_id, disc, square"),
        (["sample_id;disc;square", "a;0;1", "b;0;1"], "column 'sample_id' is missing; .* with commas between"),
        (
            ["sample_id,disc,square,disc,square", *(f"{row},0.5,0.5" for row in ROWS)],
            r"0\.csv: column 'disc' stands there twice; keep one of them",
        ),
        (["sample_id,sample_id,disc,square", *ROWS], r"0\.csv: column 'sample_id' stands there twice"),
        (["sample_id,disc,square", *ROWS[1:], "test-0000,0,5,0,5"], "'test-0000': its row has more values than there"),
        (["sample_id,disc,square", *ROWS[1:]], "no row for 'test-0000', and 0 more are missing"),
        (["sample_id,disc,square", *ROWS, "x,1,0"], "no test image is called 'x'"),
        (["sample_id,disc,square", *ROWS, ROWS[0]], "two rows for sample_id 'test-0000'"),
        (["sample_id,disc,square", *ROWS[1:], "test-0000,a,1"], "'test-0000': a probability is not a number"),
        (["sample_id,disc,square", *ROWS[1:], "test-0000,1"], "'test-0000': a probability is not a number"),
        (["sample_id,disc,square", *ROWS[1:], "test-0000,nan,1"], "'test-0000': its values are no probabilities"),
        (["sample_id,disc,square", *ROWS[1:], "test-0000,3,-2"], "'test-0000': its values are no probabilities"),
        (["sample_id,disc,square", *ROWS[1:], "test-0000,.3,.3"], "'test-0000': its values are no probabilities"),
        (["\udcff"], "not a readable CSV file"),
    ],
)
def test_a_mistake_in_a_table_is_one_line(run: Path, tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/0.csv").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(MaskLoomError, match=message) as caught:
        read_predictions(tmp_path, run / "dataset", "test", 2.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "lacking"), [("", "mask"), (".csv", "label")])
def test_a_test_set_without_targets(tmp_path: Path, suffix: str, lacking: str) -> None:
    def drop(sample: Sample) -> None:
        setattr(sample, lacking, None)

    write_tiny_run(tmp_path / "run", {}, {"train": 4, "test": 4}, change=drop)
    target = tmp_path / "predictions/real" / f"0{suffix}"
    target.parent.mkdir(parents=True)
    target.write_text("sample_id\n") if suffix else target.mkdir()
    with pytest.raises(MaskLoomError, match=rf"no image of its test split has a {lacking}"):
        read_predictions(tmp_path / "predictions", tmp_path / "run/dataset", "test", 2.0)


def test_a_dataset_with_nothing_to_predict(tmp_path: Path) -> None:
    about = tiny_description(labels=()).model_copy(update={"mask_classes": ("background",), "palette": ((0, 0, 0),)})
    samples = tiny_samples("test", 4)
    for sample in samples:
        sample.label, sample.mask = None, np.zeros((32, 32), np.uint8)
    write_dataset(tmp_path / "dataset", about, {"test": samples})
    (tmp_path / "masks/real/0").mkdir(parents=True)
    with pytest.raises(MaskLoomError, match="its masks have no class besides the background"):
        read_predictions(tmp_path / "masks", tmp_path / "dataset", "test", 2.0)
    (tmp_path / "tables/real").mkdir(parents=True)
    (tmp_path / "tables/real/0.csv").write_text("sample_id\n")
    with pytest.raises(MaskLoomError, match="it has no image-level classes to distinguish"):
        read_predictions(tmp_path / "tables", tmp_path / "dataset", "test", 2.0)


def test_tables_are_found_whatever_the_case_of_their_ending(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/0.CSV").touch()
    assert find_models(tmp_path) == ({"real": {0: tmp_path / "real/0.CSV"}}, ".csv")


def test_an_arm_without_predictions_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "real/0").mkdir(parents=True)
    (tmp_path / "synthetic").mkdir()
    with pytest.raises(MaskLoomError, match=r"synthetic: no predictions in it; remove it, or give a folder ARM/SEED"):
        find_models(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_mask_must_be_a_png(tmp_path: Path, kind: str) -> None:
    pixels = np.zeros((8, 8), np.float32 if kind == "TIFF" else np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", format=kind)
    with pytest.raises(MaskLoomError, match=r"a\.png: not a readable PNG file"):
        read_masks(tmp_path, ["a"], 2)
