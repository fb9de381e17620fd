"""Judge images that something else made: every layout, every refusal, leaks and copies."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from maskloom.data_prep.datasets.phantom_bus import _render
from maskloom.evaluate.judge.given import given_folder, require_apart
from maskloom.evaluate.judge.importing import ORIGIN, conversion_of, mask_class_table, resized
from maskloom.evaluate.judge.judge import REMEDY, Request, judge
from maskloom.evaluate.judge.reading import class_source, messages_about, options_like_real, real_mask_values
from maskloom.evaluate.judge.remarks import blank_remark, few_groups_remark, mask_remark, transparency_remark
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.copies import found_copies
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.writer import Sample
from maskloom.pipeline.errors import LeakedImages, MaskLoomError
from maskloom.pipeline.results import read_evaluations
from maskloom.pipeline.runs.record import StageRecord, write_record
from maskloom.pipeline.runs.run import Run
from tests.evaluate.runs import faithful, small_options
from tests.processes import finished
from tests.tiny_datasets import tiny_description, tiny_samples, write_dataset, write_tiny_run
from tests.writers import hf_folder, nnunet_folder

SIDE = 64
LABELS = ("benign", "malignant")
METRICS = ("quality", "faithfulness", "memorisation", "downstream_segmentation", "downstream_classification")
BLOCKED = ("diffusers", "accelerate", "peft", "transformers")
BLOCKER = f"""
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"blocked: {{name}}")


sys.meta_path.insert(0, Blocked())
"""


def scan(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a phantom (H, W) and its mask of 0 and 1."""
    return _render(seed, number, 0, LABELS[number % 2], SIDE)


def write_classes(folder: Path, seed: int, count: int, masks: bool = True) -> Path:
    """Write class folders, `benign/scan_0.png` and `benign/scan_0_mask.png`."""
    for number in range(count):
        place = folder / LABELS[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image, mask = scan(seed, number)
        Image.fromarray(image).save(place / f"scan_{number}.png")
        if masks:
            Image.fromarray(mask * np.uint8(255)).save(place / f"scan_{number}_mask.png")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("real") / "images", 1, 40)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with small questions."""
    path = tmp_path / "small.yaml"
    metrics = {name: small_options(name) for name in METRICS}
    values = {"extends": "judge.yaml", "data": {"image_size": SIDE}, "evaluate": {"metrics": metrics}}
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A configuration with one quick question."""
    path = tmp_path / "quick.yaml"
    metrics = {name: False for name in METRICS if name != "quality"} | {"quality": small_options("quality")}
    values = {"extends": "judge.yaml", "data": {"image_size": SIDE}, "evaluate": {"metrics": metrics}}
    path.write_text(yaml.safe_dump(values))
    return path


def judged(
    real: Path, synthetic: Path, out: Path, config: Path, *overrides: str, seeds: int | None = None
) -> tuple[MaskPromptDataset, MaskPromptDataset]:
    """Judge, and return the real dataset and the synthetic set of the run."""
    judge(Request(real, synthetic, out, config, None, seeds, overrides), force=False)
    return MaskPromptDataset.open(out / "dataset"), MaskPromptDataset.open(out / "synthetic" / "synthetic")


def classes_of(dataset: MaskPromptDataset) -> Counter[str | None]:
    return Counter(dataset.description.label_name(row["label"]) for row in dataset.rows(None, ["label"]))


def masked(dataset: MaskPromptDataset) -> int:
    return sum(row["mask"] is not None and bool(png_array(row["mask"]["bytes"]).any()) for row in dataset.rows())


def without_masks(folder: Path, to: Path) -> Path:
    """Copy class folders without their masks."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*_mask.png")))


def held_out_file(run: Path, real: Path, split: str) -> Path:
    """Return the file of the first image of a split."""
    row = next(iter(MaskPromptDataset.open(run / "dataset").rows(split, ["sample_id"])))
    label, _, name = row["sample_id"].partition("-")
    return real / label / f"{name}.png"


def plant(original: Path, synthetic: Path, name: str = "planted") -> None:
    """Put an image, with its mask, among the synthetic ones."""
    target = synthetic / original.parent.name
    shutil.copy(original, target / f"{name}.png")
    shutil.copy(original.with_name(f"{original.stem}_mask.png"), target / f"{name}_mask.png")


def test_a_verdict_without_any_of_the_training_packages(real: Path, tmp_path: Path, config: Path) -> None:
    synthetic = write_classes(tmp_path / "vendor", 2, 24)
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    imports = subprocess.run(
        [sys.executable, "-c", "import accelerate"], env=environment, capture_output=True, text=True
    )
    assert "blocked: accelerate" in imports.stderr
    words = ["judge", "--real", real, "--synthetic", synthetic, "--out", tmp_path / "out", "--config", config]
    command = [sys.executable, "-m", "maskloom.evaluate", *map(str, words), "--seeds", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = {one.metric: one for one in read_evaluations(tmp_path / "out" / "evaluation")}
    assert set(answers) == set(METRICS)
    assert all(one.skipped is None and one.verdict in done.stdout for one in answers.values())
    assert answers["downstream_segmentation"].seeds == [0, 1, 2, 3]
    assert (tmp_path / "out" / "evaluation" / "cases.parquet").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Made elsewhere: nothing states what these 24 images were trained on" in page
    assert "maskloom-judge" not in page and str(tmp_path) not in page


def test_the_set_is_one_of_the_real_dataset_and_says_that_it_was_made_elsewhere(
    real: Path, tmp_path: Path, quick: Path
) -> None:
    ours, theirs = judged(real, write_classes(tmp_path / "vendor", 2, 12), tmp_path / "out", quick)
    assert ours.num_rows == 40 and theirs.contract.splits["train"].rows == theirs.num_rows == 12
    assert theirs.contract.parent is not None and theirs.contract.parent.digest == ours.digest
    stated = theirs.description.preprocessing["generation"]
    assert stated["origin"] == ORIGIN
    assert stated["training"] == {"stage": None, "dataset": None, "weights": None}
    assert classes_of(theirs) == {"benign": 6, "malignant": 6} and masked(theirs) == 12
    rows = list(theirs.rows())
    assert all(row["origin"] == "synthetic" and row["generator"] == ORIGIN for row in rows)
    assert all(row["parent_id"] is None and row["group_id"].startswith("synthetic/") for row in rows)
    assert ORIGIN in (theirs.folder / "README.md").read_text()
    evaluated = (tmp_path / "out" / "evaluation" / "quality.json").stat().st_mtime_ns
    judged(real, tmp_path / "vendor", tmp_path / "out", quick)  # nothing has changed
    assert (tmp_path / "out" / "evaluation" / "quality.json").stat().st_mtime_ns == evaluated


def test_the_set_states_its_own_licence(real: Path, tmp_path: Path, quick: Path) -> None:
    made = write_classes(tmp_path / "vendor", 2, 12)
    own = ("data.options.licence=CC-BY-4.0", "data.options.citation=Ours 2020")
    ours, theirs = judged(real, made, tmp_path / "out", quick, *own)
    assert (ours.description.licence, ours.description.citation) == ("CC-BY-4.0", "Ours 2020")
    given = MaskPromptDataset.open(next((tmp_path / "out" / "cache").glob("given-*/dataset")))
    assert given.description.licence != "CC-BY-4.0"
    assert given.description.licence == "not stated (the user's own data)"
    assert (theirs.description.licence, theirs.description.citation) == ("not stated", "not stated")
    assert theirs.description.homepage == given.description.homepage


def test_real_and_synthetic_leaks_have_a_remedy_each(tmp_path: Path, quick: Path) -> None:
    """Nobody here can generate the set again."""
    counts = {"train": 24, "validation": 8, "test": 12}
    tests = tiny_samples("test", counts["test"])

    def doubled(sample: Sample) -> None:
        if sample.sample_id == "train-0002":
            sample.image, sample.label = tests[4].image // 2 + 40, tests[4].label

    run = tmp_path / "run"
    leaking = {"a": lambda parent, index: tests[5].image // 2 + 40 if index == 3 else faithful(parent, index)}
    write_tiny_run(run, leaking, counts, change=doubled)
    with pytest.raises(LeakedImages) as leaked:
        judged(run, run / "synthetic" / "a", tmp_path / "out", quick)
    assert "train-0002" in leaked.value.found and "a-0003" in leaked.value.found
    assert "prepare the dataset again" in leaked.value.remedy
    assert leaked.value.remedy.endswith(f"; {REMEDY}")


def test_a_planted_test_image_stops_with_exit_code_3_and_leaves_no_older_verdict(
    real: Path, tmp_path: Path, quick: Path
) -> None:
    synthetic, out = write_classes(tmp_path / "vendor", 2, 12), tmp_path / "out"
    judged(real, synthetic, out, quick)
    plant(held_out_file(out, real, "test"), synthetic)
    words = ["judge", "--real", real, "--synthetic", synthetic, "--out", out, "--config", quick]
    done = subprocess.run([sys.executable, "-m", "maskloom.evaluate", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 3
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith("stopped: ") and "-planted (train of" in told and "(test)" in told
    assert "/planted.png, " in told and "/scan_" in told.partition("files: ")[2]
    assert "take these images out of the synthetic folder" in told
    assert not (out / "report.html").exists() and not read_evaluations(out / "evaluation")
    for file in synthetic.rglob("planted*.png"):
        file.unlink()
    judged(real, synthetic, out, quick)
    page = (out / "report.html").read_text()
    assert "An earlier set was stopped, and these images may be what remained of it: " in page
    assert "-planted (train of" in page and str(tmp_path) not in page and "planted.png" not in page
    contract = (out / "synthetic" / "synthetic" / "contract.json").read_text()
    assert "An earlier set was stopped" in contract and str(out) not in contract
    assert "it needs the weights of the generator: membership" in page and "run maskloom evaluate" not in page
    words = ["-m", "maskloom.pipeline", "status", "--config", str(out / "config.yaml")]
    status = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert status.returncode == 2 and "`maskloom judge` wrote this run, in stages of its own; give" in status.stderr
    (out / "logs" / "audit" / "stopped.jsonl").write_text("{")
    with pytest.raises(MaskLoomError, match=r"stopped\.jsonl: damaged .*; judge into a new folder"):
        judged(real, synthetic, out, quick)


def test_an_altered_test_image_stops_too(real: Path, tmp_path: Path, quick: Path) -> None:
    synthetic, out = write_classes(tmp_path / "vendor", 2, 12), tmp_path / "out"
    judged(real, synthetic, out, quick)
    original = held_out_file(out, real, "test")
    plant(original, synthetic)
    for name, change in (("planted", lambda pixels: pixels // 2 + 40), ("planted_mask", lambda pixels: pixels)):
        file = synthetic / original.parent.name / f"{name}.png"
        Image.fromarray(change(np.asarray(Image.open(file))[:, ::-1])).save(file)
    with pytest.raises(
        LeakedImages,
        match=r"-planted .* shows .*mirrored.*; files: \S+-planted is \w+/planted\.png, .*-scan-?_?\d+ is \w+/scan_\d+\.png; take",
    ):
        judged(real, synthetic, out, quick)


def test_a_shrunk_test_image_on_grey_stops_too(real: Path, tmp_path: Path, quick: Path) -> None:
    synthetic, out = write_classes(tmp_path / "vendor", 2, 12), tmp_path / "out"
    judged(real, synthetic, out, quick)
    original = held_out_file(out, real, "test")
    plant(original, synthetic)
    for name, grey in (("planted", 128), ("planted_mask", 0)):
        file = synthetic / original.parent.name / f"{name}.png"
        small = Image.open(file).resize((52, 52), Image.Resampling.NEAREST)
        around = Image.new(small.mode, (SIDE, SIDE), grey)
        around.paste(small, (6, 6))
        around.save(file)
    with pytest.raises(
        LeakedImages, match=r"altered copies .*-planted .* shows .*; take these images out of the synth"
    ):
        judged(real, synthetic, out, quick)
    assert not (out / "report.html").exists() and not read_evaluations(out / "evaluation")


def test_copies_of_train_images_follow_on_copies(real: Path, tmp_path: Path, quick: Path) -> None:
    synthetic, out = write_classes(tmp_path / "vendor", 2, 12), tmp_path / "out"
    judged(real, synthetic, out, quick)
    plant(held_out_file(out, real, "train"), synthetic)
    memorisation = f"evaluate.metrics.memorisation={json.dumps(small_options('memorisation'))}"
    with pytest.raises(
        LeakedImages,
        match=r"images are copies of training images: .*-planted of .*files: .* is \w+/planted\.png, .* is \w+/scan_.*evaluate\.on_copies",
    ):
        judged(real, synthetic, out, quick, "evaluate.on_copies=stop", memorisation)
    stopped = found_copies(MaskPromptDataset.open(out / "synthetic/synthetic"))
    assert stopped is not None and stopped.on_copies == "stop" and stopped.rows
    judged(real, synthetic, out, quick, memorisation)  # dropped: a verdict, which names it
    dropped = found_copies(MaskPromptDataset.open(out / "synthetic/synthetic"))
    assert dropped is not None and dropped.on_copies == "drop" and dropped.rows == stopped.rows
    answer = next(one for one in read_evaluations(out / "evaluation") if one.metric == "memorisation")
    assert answer.copies is not None
    assert any(row.sample_id.endswith("planted") for row in answer.copies["synthetic"])


def test_images_without_masks_and_of_another_size_and_colour(real: Path, tmp_path: Path, config: Path) -> None:
    write_classes(tmp_path / "drawn", 2, 16, masks=False)
    for file in (tmp_path / "drawn").rglob("*.png"):
        Image.open(file).convert("RGB").resize((90, 50)).save(file)
    _, theirs = judged(real, tmp_path / "drawn", tmp_path / "out", config)
    assert masked(theirs) == 0 and theirs.description.channels == 1
    assert png_array(next(iter(theirs.rows()))["image"]["bytes"]).shape == (SIDE, SIDE)
    answers = {one.metric: one for one in read_evaluations(tmp_path / "out" / "evaluation")}
    assert answers["downstream_segmentation"].skipped == "no image of synthetic has a mask"
    assert "No synthetic image has a mask" in answers["faithfulness"].verdict
    assert answers["downstream_classification"].skipped is None
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No image has a mask: faithfulness and segmentation leave them out." in page
    assert "colours turned to luminance" in page


def test_classes_that_no_real_image_has_are_said_to_be_left_out(
    tmp_path: Path, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    for path in sorted(write_classes(tmp_path / "real", 1, 24).glob("*/*.png")):
        flat.mkdir(exist_ok=True)
        path.rename(flat / path.name)
    theirs = write_classes(tmp_path / "theirs", 2, 12)
    _, synthetic = judged(flat, theirs, tmp_path / "out", quick)
    told = "The classes of the synthetic images (benign, malignant) are left out, because the real images have none"
    assert f"judge: {told}" in capsys.readouterr().err
    assert any(one.startswith(told) for one in synthetic.description.preprocessing["generation"]["notes"])
    assert set(classes_of(synthetic)) == {None}


def test_a_single_class_folder_is_that_class(real: Path, tmp_path: Path, quick: Path) -> None:
    synthetic = write_classes(tmp_path / "vendor", 2, 16)
    shutil.rmtree(synthetic / "malignant")
    _, theirs = judged(without_masks(real, tmp_path / "real"), synthetic, tmp_path / "out", quick)
    assert classes_of(theirs) == {"benign": 8} and masked(theirs) == 0
    assert (
        "Their masks are left out, because the real images have none." in (tmp_path / "out" / "report.html").read_text()
    )


def write_pairs(folder: Path, seed: int, count: int, table: bool) -> Path:
    """Write `images/N.png` and `masks/N.png`, and on demand a table of classes and patients."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    lines = ["file,mask,diagnosis,patient"]
    for number in range(count):
        image, mask = scan(seed, number)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask * np.uint8(255)).save(folder / "masks" / f"{number}.png")
        lines.append(f"images/{number}.png,masks/{number}.png,{LABELS[number % 2]},c{number // 2}")
    if table:
        (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_images_with_masks_by_pattern(tmp_path: Path, quick: Path) -> None:
    real, synthetic = write_pairs(tmp_path / "real", 1, 40, False), write_pairs(tmp_path / "vendor", 2, 12, False)
    ours, theirs = judged(real, synthetic, tmp_path / "out", quick)
    assert masked(ours) == 40 and masked(theirs) == 12 and not ours.description.labels


def test_images_of_a_table(tmp_path: Path, quick: Path) -> None:
    real, synthetic = write_pairs(tmp_path / "real", 1, 40, True), write_pairs(tmp_path / "vendor", 2, 12, True)
    ours, theirs = judged(real, synthetic, tmp_path / "out", quick)
    assert masked(ours) == 40 and masked(theirs) == 12
    assert classes_of(ours) == {"benign": 20, "malignant": 20} and classes_of(theirs) == {"benign": 6, "malignant": 6}
    assert sum(part.groups for part in ours.contract.splits.values()) == 20  # patients


def write_nnunet(folder: Path) -> None:
    """Write `real` and `vendor`, nnU-Net folders of other phantoms."""
    for name in ("real", "vendor"):
        nnunet_folder.write_raw(folder / name)
    for number, file in enumerate(sorted((folder / "vendor").rglob("*_0000.png"))):
        Image.fromarray(scan(5, number)[0]).save(file)
        Image.fromarray(scan(5, number)[1]).save(str(file).replace("images", "labels").replace("_0000", ""))
    nnunet_folder.describe(folder / "vendor", labels={"background": 0, "tumour": 1})


def test_nnunet_folders(tmp_path: Path, quick: Path) -> None:
    write_nnunet(tmp_path)
    ours, theirs = judged(tmp_path / "real", tmp_path / "vendor", tmp_path / "out", quick)
    assert ours.description.dataset == "nnunet_folder" and masked(ours) == masked(theirs) == 16
    assert ours.contract.splits["test"].rows == nnunet_folder.TEST
    assert theirs.description.mask_classes == ("background", "lesion")


def test_cases_without_label_maps_are_judged_and_searched_for_leaks(tmp_path: Path, quick: Path) -> None:
    write_nnunet(tmp_path)
    ours, theirs = (tmp_path / name / nnunet_folder.FOLDER for name in ("real", "vendor"))
    shutil.rmtree(theirs / "labelsTs")
    shutil.copy(next((ours / "imagesTs").iterdir()), theirs / "imagesTs" / "case_900_0000.png")
    with pytest.raises(LeakedImages, match=r"test-case_900 "):
        judged(tmp_path / "real", tmp_path / "vendor", tmp_path / "out", quick)
    images = MaskPromptDataset.open(tmp_path / "out" / "synthetic" / "synthetic")
    assert images.num_rows == nnunet_folder.CASES + nnunet_folder.TEST + 1 and masked(images) == nnunet_folder.CASES


@pytest.mark.parametrize("layout", ["parquet", "metadata.jsonl", "metadata.csv"])
def test_hugging_face_folders(layout: str, tmp_path: Path, quick: Path) -> None:
    if layout == "parquet":
        hf_folder.write_raw(tmp_path / "real")
    else:
        hf_folder.write_metadata(tmp_path / "real", layout)
    synthetic = write_classes(tmp_path / "vendor", 2, 12)
    ours, theirs = judged(tmp_path / "real", synthetic, tmp_path / "out", quick)
    assert ours.description.dataset == "hf_folder" and masked(ours) == 20 and masked(theirs) == 12
    assert {split: part.rows for split, part in ours.contract.splits.items()} == hf_folder.COUNTS
    assert classes_of(theirs) == {"benign": 6, "malignant": 6}


VENDOR = Path("vendor")


def test_a_hugging_face_dataset_of_one_file_is_divided(tmp_path: Path, quick: Path) -> None:
    hf_folder.write_rows(tmp_path / "real" / hf_folder.file_of("train"), hf_folder.rows_of("train"))
    ours, _ = judged(tmp_path / "real", write_classes(tmp_path / "vendor", 2, 12), tmp_path / "out", quick)
    assert all(ours.contract.splits[split].rows for split in ("train", "validation", "test"))


ABOUT = tiny_description(labels=("benign", "malignant"))
LIVER = ABOUT.model_copy(
    update={"mask_classes": ("background", "liver", "tumour"), "palette": ((0, 0, 0), (9, 9, 9), (99, 99, 99))}
)


def test_mask_values_of_several_classes_are_those_of_the_real_set() -> None:
    guessed = {"images": "*.png", "masks": "m/{stem}.png", "mask_values": {0: "background", 2: "class_1"}}
    assert options_like_real(guessed, LIVER, VENDOR)["mask_values"] == {0: "background", 1: "liver", 2: "tumour"}
    guessed["mask_values"] = {0: "background", 128: "class_1"}
    with pytest.raises(MaskLoomError, match=r"--synthetic vendor: the masks hold the values 0, 128, those of the real"):
        options_like_real(guessed, LIVER, VENDOR)
    stated = {"options": {"mask_values": {"0": "background", "128": "liver", "#ffffff": "tumour"}}}
    named = options_like_real(guessed, LIVER.model_copy(update={"preprocessing": stated}), VENDOR)["mask_values"]
    assert named == {0: "background", 128: "liver", "#ffffff": "tumour"}


GREY = {0: "background", 100: "liver", 200: "tumour"}
INDICES = {0: "background", 1: "liver", 2: "tumour"}


@pytest.mark.parametrize(
    ("real", "found", "expected", "told"),
    [
        (
            GREY,
            {0: "background", 1: "class_1", 2: "class_2"},
            INDICES,
            "are taken for class indices (0 = background, 1",
        ),
        (INDICES, {0: "background", 100: "class_1", 200: "class_2"}, GREY, "in ascending order (0 = background, 100 ="),
        (
            GREY,
            {0: "background", 60: "class_1", 255: "class_2"},
            {0: "background", 60: "liver", 255: "tumour"},
            "order",
        ),
        (GREY, {0: "background", 200: "class_1"}, GREY, ""),
        (GREY, None, GREY, ""),  # a sample of black and one bright value, which may be the real one
        (None, None, INDICES, ""),
        (None, {0: "background", 5: "a", 9: "b"}, {0: "background", 5: "liver", 9: "tumour"}, "in ascending order"),
    ],
)
def test_mask_values_of_another_scale(real, found, expected, told, capsys: pytest.CaptureFixture[str]) -> None:
    about = LIVER.model_copy(update={"preprocessing": {"options": {"mask_values": real}} if real else {}})
    assert real_mask_values(found, about, VENDOR) == expected
    error = capsys.readouterr().err
    assert told in error and bool(told) == bool(error)


@pytest.mark.parametrize(
    ("real", "found"),
    [(GREY, {0: "background", 77: "a"}), ({"#000000": "background", "#ff0000": "liver", "#00ff00": "tumour"}, {0: "b", 7: "l", 9: "t"})],
)  # fmt: skip
def test_mask_values_without_a_meaning_are_refused(real, found) -> None:
    about = LIVER.model_copy(update={"preprocessing": {"options": {"mask_values": real}}})
    with pytest.raises(MaskLoomError, match=r"say what each value means: synthetic\.options\.mask_values=\{0: backgr"):
        real_mask_values(found, about, VENDOR)
    options = {"masks": "m/{stem}.png", "mask_values": found}
    assert options_like_real(options, about, VENDOR, {0: "liver"})["mask_values"] == {0: "liver"}


def test_a_single_mask_class_is_that_class_whatever_its_value() -> None:
    about = ABOUT.model_copy(update={"preprocessing": {"options": {"mask_values": {0: "background", 100: "lesion"}}}})
    assert real_mask_values(None, about, VENDOR) is None
    assert real_mask_values({0: "background", 100: "class_1"}, about, VENDOR) == {0: "background", 100: "lesion"}
    assert real_mask_values({0: "background", 7: "class_1"}, about, VENDOR) == {0: "background", 7: "class_1"}


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("benign_1", "Malignant 2", "benign (3)"), {"benign_1": "benign", "Malignant 2": "Malignant", "benign (3)": "benign"}),
        (("benign_1", "benign_2"), {"benign_1": "benign"}),  # of a single class
        (("benign_1", "scan_2"), None),
        (("benignity_1", "malignant_2"), None),
        ((), None),
    ],
)  # fmt: skip
def test_classes_in_names(names: tuple[str, ...], classes: dict[str, str] | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / f"{name}.png").touch()
    source = class_source(tmp_path, "*.png", LABELS)
    assert bool(source) == (classes is not None)
    for name, label in (classes or {}).items():
        found = re.search(source["label_pattern"], f"{name}.png")
        assert found is not None and found[1] == label
    assert class_source(tmp_path, "x/Benign/*.png", LABELS) == {"label_from": "parent"}
    assert class_source(tmp_path, "*.png", ()) == {}


def written(folder: Path, change: Callable[[Sample], None], size: int = 32) -> MaskPromptDataset:
    """Write a tiny dataset of changed samples."""
    samples = tiny_samples("train", 12, size)
    for sample in samples:
        change(sample)
    write_dataset(folder / "dataset", tiny_description(size), {"train": samples})
    return MaskPromptDataset.open(folder / "dataset")


@pytest.mark.parametrize(("groups", "told"), [(0, "add real images"), (5, "give about 21 real groups"), (6, "")])
def test_few_test_groups_are_said_before_anything_is_trained(tmp_path: Path, groups: int, told: str) -> None:
    splits = {"train": tiny_samples("train", 12, 32)} | ({"test": tiny_samples("test", groups, 32)} if groups else {})
    for split, samples in splits.items():
        for number, sample in enumerate(samples):
            sample.group_id = f"{split}-{number}"
    write_dataset(tmp_path / "dataset", tiny_description(32), splits)
    remark = few_groups_remark(MaskPromptDataset.open(tmp_path / "dataset"))
    assert told in remark
    assert bool(remark) == bool(told)
    assert not remark or f"the test split has {groups} group(s); whether" in remark


def inverted(sample: Sample) -> None:
    """Exchange black and white, and pad above and below, as for an image of another aspect ratio."""
    sample.mask = 1 - np.asarray(sample.mask)
    sample.mask[:4] = sample.mask[-4:] = 0


def widened(sample: Sample) -> None:
    sample.mask = np.zeros_like(np.asarray(sample.mask))
    sample.mask[6:26, 6:26] = 1


def narrowed(sample: Sample) -> None:
    sample.mask = np.zeros_like(np.asarray(sample.mask))
    sample.mask[9, 9:12] = 1


def unmasked(sample: Sample) -> None:
    sample.mask = None


def test_inverted_masks_are_refused_unless_they_are_meant_so(tmp_path: Path) -> None:
    ours, theirs = written(tmp_path / "ours", lambda sample: None), written(tmp_path / "theirs", inverted)
    told = (
        r"--synthetic vendor: foreground and background look exchanged in its masks: the masks mark [67]\d\.\d% of a synthetic "
        r"image and 1\d\.\d% of a real one, and in 92% of the synthetic and 0% of the real masks .*"
        r"synthetic\.options\.mask_values=\{0: lesion, 255: background\}"
    )
    with pytest.raises(MaskLoomError, match=told):
        mask_remark(ours, theirs, VENDOR, stated=False)
    assert mask_remark(ours, theirs, VENDOR, stated=True).startswith("Do the masks mean the same? The masks mark ")
    assert mask_remark(theirs, theirs, VENDOR, stated=False) == ""  # so are the real ones
    assert mask_remark(ours, ours, VENDOR, stated=False) == ""


def test_masks_of_another_extent_are_a_remark(tmp_path: Path) -> None:
    ours = written(tmp_path / "ours", lambda sample: None)
    for name, change in (("wide", widened), ("narrow", narrowed)):
        remark = mask_remark(ours, written(tmp_path / name, change), VENDOR, stated=False)
        assert ("Do the masks mean the same?" in remark) == (name == "narrow")
    assert mask_remark(ours, written(tmp_path / "none", unmasked), VENDOR, stated=False) == ""


def record_transparent(dataset: MaskPromptDataset, images: int, darkened: float) -> None:
    """Record transparent images as `prepare` does."""
    run = Run(dataset.folder.parent)
    results = {"transparent": {"images": images, "first": "a.png", "darkened": darkened}}
    fields = {
        "key": "k",
        "inputs": {},
        "config_hash": "c",
        "maskloom": "0",
        "git_sha": "0",
        "packages": {},
        "files": {},
    }
    write_record(run, StageRecord(stage="prepare", wall_seconds=0, peak_memory_mb=0, results=results, **fields))


def test_transparent_images_are_a_remark_or_refused(tmp_path: Path) -> None:
    ours, theirs = written(tmp_path / "ours", lambda sample: None), written(tmp_path / "theirs", lambda sample: None)
    assert transparency_remark(ours, theirs, VENDOR) == ""
    record_transparent(theirs, 3, 0.8)
    told = "3 of 12 synthetic images have transparent pixels (such as a.png), which became black: 80% of their pixels"
    assert told in transparency_remark(ours, theirs, VENDOR)
    record_transparent(theirs, 6, 0.8)
    with pytest.raises(MaskLoomError, match=r"--synthetic vendor: 6 of 12 .*on black, 40% of all pixels would lose"):
        transparency_remark(ours, theirs, VENDOR)
    record_transparent(ours, 6, 0.8)
    assert "which became black" in transparency_remark(ours, theirs, VENDOR)  # as the real ones


def test_messages_about_synthetic_images_name_its_option_and_keys(capfd: pytest.CaptureFixture[str]) -> None:
    with messages_about("synthetic.") as messages:
        line = "a/data.options.x: data.options.mask_values; data.image_size, data.other; data.raw_dir=/x: no; check data.raw_dir"
        line += "; a larger data.image_size keeps them"
        subprocess.run([sys.executable, "-c", f"import sys; print({line!r}, file=sys.stderr)"], stderr=messages)
    assert capfd.readouterr().err == (
        "a/data.options.x: synthetic.options.mask_values; synthetic.image_size, data.other; --synthetic /x: no; check --synthetic"
        "; a larger --size keeps them\n"
    )
    with messages_about("data.") as messages:
        assert messages is None


def test_mask_classes_are_matched_by_name() -> None:
    theirs = LIVER.model_copy(update={"mask_classes": ("background", "Tumour", "liver")})
    assert mask_class_table(LIVER, theirs, Path("vendor"))[:3].tolist() == [0, 2, 1]
    assert mask_class_table(ABOUT, ABOUT, Path("vendor"))[:2].tolist() == [0, 1]
    with pytest.raises(
        MaskLoomError, match=r"--synthetic vendor: mask class 'lesion' is none of the real ones \(liver, tumour\)"
    ):
        mask_class_table(LIVER, ABOUT, Path("vendor"))


def test_images_of_another_aspect_ratio_are_padded() -> None:
    image, mask = np.full((20, 40, 3), 200, np.uint8), np.ones((20, 40), np.uint8)
    about = tiny_description(size=32, channels=3)
    padded, marked = resized(image, mask, about)
    assert padded.shape == (32, 32, 3) and marked is not None
    assert not padded[:8].any() and (padded[8:24] == 200).all() and not padded[24:].any()
    assert marked.sum() == 16 * 32 and (marked[8:24] == 1).all()
    assert resized(np.zeros((32, 32), np.uint8), None, about)[1] is None
    assert resized(image, None, about.model_copy(update={"buckets": ((16, 32),)}))[0].shape == (16, 32, 3)


def test_a_combined_set_is_refused(tmp_path: Path, quick: Path) -> None:
    run = tmp_path / "run"
    write_tiny_run(run, {"a": faithful})
    combined = ["--real", run / "dataset", "--synthetic", run / "synthetic" / "a", "--output", tmp_path / "both"]
    subprocess.run([sys.executable, "-m", "maskloom.pipeline", "combine", *map(str, combined)], check=True)
    with pytest.raises(MaskLoomError, match=r"--synthetic .*both: a combined dataset, with real images in it"):
        judged(run, tmp_path / "both", tmp_path / "out", quick)


def test_a_run_and_its_synthetic_set(tmp_path: Path, quick: Path) -> None:
    run = tmp_path / "run"
    write_tiny_run(run, {"controlnet": faithful})
    copied, theirs = judged(run, run / "synthetic" / "controlnet", tmp_path / "out", quick)
    assert copied.digest == MaskPromptDataset.open(run / "dataset").digest
    given = MaskPromptDataset.open(run / "synthetic" / "controlnet")
    assert [row["parent_id"] for row in theirs.rows()] == [row["parent_id"] for row in given.rows()]
    assert given_folder("synthetic", run).folder == run / "synthetic" / "controlnet"


REFUSALS = {
    "no such folder": (lambda r, s: (r, s.parent / "nowhere"), r"--synthetic .*nowhere: no such folder"),
    "a file": (lambda r, s: (r, s / "benign" / "scan_0.png"), r"scan_0\.png: is a file; give the folder"),
    "the same folder": (lambda r, s: (r, r), r"is the folder of --real"),
    "the same folder by a link": (lambda r, s: (r, _linked(r, s)), r"is the folder of --real"),
    "one in the other": (lambda r, s: (r, r / "benign"), r"benign: lies in --real"),
    "one around the other": (lambda r, s: (r / "benign", r), r"--real .*benign: lies in --synthetic"),
    "an empty folder": (lambda r, s: (r, _emptied(s)), r"--synthetic .*: the folder is empty"),
    "no image": (lambda r, s: (r, _without_images(s)), r"--synthetic .*: no image of a format that is read"),
    "a class that the real set lacks": (lambda r, s: (r, _renamed(s)), r"--synthetic .*vendor: class 'cyst' is none of the real classes \(benign, malignant\)"),
}  # fmt: skip


def _linked(real: Path, synthetic: Path) -> Path:
    link = synthetic.parent / "link"
    link.symlink_to(real)
    return link


def _emptied(synthetic: Path) -> Path:
    shutil.rmtree(synthetic)
    synthetic.mkdir()
    return synthetic


def _without_images(synthetic: Path) -> Path:
    _emptied(synthetic)
    (synthetic / "notes.txt").write_text("none")
    return synthetic


def _renamed(synthetic: Path) -> Path:
    (synthetic / "benign").rename(synthetic / "cyst")
    return synthetic


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name: str, real: Path, tmp_path: Path, quick: Path) -> None:
    change, told = REFUSALS[name]
    ours, theirs = change(real, write_classes(tmp_path / "vendor", 2, 8, masks=False))
    with pytest.raises(MaskLoomError, match=told) as error:
        judged(ours, theirs, tmp_path / "out", quick)
    assert "\n" not in str(error.value) and not isinstance(error.value, LeakedImages)


def test_unreadable_images_are_left_out_and_counted(real: Path, tmp_path: Path, quick: Path) -> None:
    synthetic = write_classes(tmp_path / "vendor", 2, 12)
    (synthetic / "benign" / "scan_0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "elsewhere.png").write_bytes((synthetic / "benign" / "scan_2.png").read_bytes())
    (synthetic / "benign" / "scan_2.png").unlink()
    (synthetic / "benign" / "scan_2.png").symlink_to(tmp_path / "elsewhere.png")
    overrides = (
        "synthetic.dataset=folder",
        "synthetic.options={modality: medical image, images: '*/scan_*.png', masks: '{folder}/{stem}_mask.png', label_from: parent}",
    )
    _, theirs = judged(real, synthetic, tmp_path / "out", quick, *overrides)
    assert theirs.num_rows == 10
    page = (tmp_path / "out" / "report.html").read_text()
    assert "2 files could not be used and are not judged." in page
    assert "synthetic/synthetic: 2 of 12 files could not be used and were not judged." in page
    words = [f"--real={real}", f"--synthetic={synthetic}", f"--out={tmp_path / 'out'}", f"--config={quick}"]
    code, text = finished("maskloom.evaluate", ["judge", *words, *overrides])
    assert code == 2
    assert text.index("2 of 12 synthetic files could not be used") < text.index("Report: ")
    assert "17% of its files could not be used and were not judged; repair them" in text


def test_a_folder_of_unreadable_images_ends_with_the_exit_code_of_prepare(
    real: Path, tmp_path: Path, quick: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    synthetic = write_classes(tmp_path / "vendor", 2, 4, masks=False)
    for file in synthetic.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(typer.Exit) as end:
        judged(real, synthetic, tmp_path / "out", quick)
    assert end.value.exit_code == 2
    assert "no usable image" in capfd.readouterr().err


def test_a_real_folder_that_is_synthetic_or_of_fixed_size(tmp_path: Path, quick: Path) -> None:
    run = tmp_path / "run"
    write_tiny_run(run, {"a": faithful})
    ours, theirs = run / "dataset", run / "synthetic" / "a"
    with pytest.raises(MaskLoomError, match=r"--real .*: a synthetic dataset; give the real one"):
        judged(theirs, ours, tmp_path / "out", quick)
    with pytest.raises(MaskLoomError, match=r"--size 32: .*dataset is prepared already, at"):
        judge(Request(ours, theirs, tmp_path / "out", quick, 32), force=False)
    with pytest.raises(MaskLoomError, match=r"synthetic\.options\.channels=3: .*a is prepared already"):
        judged(ours, theirs, tmp_path / "out", quick, "synthetic.options.channels=3")


def test_which_synthetic_set_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_tiny_run(run, {})
    with pytest.raises(MaskLoomError, match=r"a run with 0 synthetic sets; give one of them: none"):
        given_folder("synthetic", run)
    write_tiny_run(run, {"a": faithful, "b": faithful})
    with pytest.raises(MaskLoomError, match=r"a run with 2 synthetic sets; give one of them: .*/a, .*/b"):
        given_folder("synthetic", run)
    assert given_folder("real", run).folder == run / "dataset"


def test_the_result_lies_apart_from_what_is_read(tmp_path: Path) -> None:
    for name in ("real", "synthetic"):
        write_classes(tmp_path / name, 1, 1)
    given = given_folder("real", tmp_path / "real"), given_folder("synthetic", tmp_path / "synthetic")
    with pytest.raises(MaskLoomError, match=r"--synthetic=.*synthetic: holds .*result, which is written to"):
        require_apart(*given, tmp_path / "synthetic" / "result")


@pytest.mark.parametrize("role", ["real", "synthetic"])
def test_an_empty_folder_is_refused_before_anything_is_read(role: str, tmp_path: Path) -> None:
    (tmp_path / "folder" / "benign").mkdir(parents=True)
    with pytest.raises(MaskLoomError, match=rf"--{role} .*folder: the folder is empty"):
        given_folder(role, tmp_path / "folder")


def test_a_home_folder_that_the_shell_leaves_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_classes(tmp_path / "scans", 1, 1)
    assert given_folder("real", Path("~/scans")).folder == tmp_path / "scans"


def test_foreign_files_in_the_place_of_the_result_stay(real: Path, tmp_path: Path, quick: Path) -> None:
    (tmp_path / "out" / "dataset").mkdir(parents=True)
    (tmp_path / "out" / "dataset" / "mine.txt").write_text("mine")
    with pytest.raises(MaskLoomError, match=r"holds dataset, which MaskLoom did not write"):
        judged(real, write_classes(tmp_path / "vendor", 2, 4), tmp_path / "out", quick)
    assert (tmp_path / "out" / "dataset" / "mine.txt").read_text() == "mine"


def test_images_without_classes_beside_classes_get_a_report(real: Path, tmp_path: Path, quick: Path) -> None:
    synthetic, out = tmp_path / "vendor", tmp_path / "out"
    synthetic.mkdir()
    for number in range(12):
        Image.fromarray(scan(2, number)[0]).save(synthetic / f"img{number}.png")
    judged(real, synthetic, out, quick)
    page = (out / "report.html").read_text()
    assert "12 images have no class" in page or "No image has a class" in page


def test_masks_that_fit_nothing_are_not_taken_for_images(real: Path, tmp_path: Path, quick: Path) -> None:
    synthetic = write_classes(tmp_path / "vendor", 2, 12)
    words = ["judge", "--real", real, "--synthetic", synthetic, "--out", tmp_path / "out", "--config", quick]
    words += ["synthetic.options.masks='nope/{stem}.png'"]
    done = subprocess.run([sys.executable, "-m", "maskloom.evaluate", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2 and "masks=nope/{stem}.png" in done.stdout + done.stderr
    assert "synthetic.options.masks=nope/{stem}.png: no file in --synthetic" in done.stderr


def test_an_image_that_the_table_does_not_list_is_counted_as_not_judged(
    real: Path, tmp_path: Path, quick: Path
) -> None:
    synthetic, out = write_classes(tmp_path / "vendor", 2, 12, masks=False), tmp_path / "out"
    files = sorted(path.relative_to(synthetic).as_posix() for path in synthetic.rglob("*.png"))
    (synthetic / "list.csv").write_text(
        "\n".join(["file,class", *(f"{file},{Path(file).parent}" for file in files[1:])])
    )
    given = judged(real, synthetic, out, quick)[1]
    assert given.num_rows == 11
    (place,) = (out / "cache").glob("given-*")
    assert "not in list.csv" in (place / "dataset" / "rejected.jsonl").read_text()
    assert "1 files could not be used" in (out / "report.html").read_text()


def test_unknown_keys_of_the_synthetic_images_are_found_first(real: Path, tmp_path: Path, quick: Path) -> None:
    with pytest.raises(MaskLoomError, match=r"^synthetic\.option: no such key; did you mean 'options'\?"):
        judged(real, write_classes(tmp_path / "vendor", 2, 12), tmp_path / "out", quick, "synthetic.option.masks=x")
    assert not (tmp_path / "out").exists()


def test_images_that_show_nothing_are_told(tmp_path: Path) -> None:
    samples = tiny_samples("train", 4)
    assert blank_remark(dataset_of(tmp_path / "shown", samples)) == ""
    spoilt = samples[1].image
    samples[1].image = np.zeros_like(spoilt)
    samples[1].image[3, 3] = 255  # an outlier that a window was set by
    told = blank_remark(dataset_of(tmp_path / "blank", samples))
    assert f"1 of 4 synthetic images are of one grey level all over (such as {samples[1].sample_id})" in told


def test_images_without_masks_have_no_mask_classes(tmp_path: Path) -> None:
    """A folder of plain images gets the class of any folder, which is none of several real ones."""
    palette = (*tiny_description().palette, (0, 0, 255))
    ours = tiny_description().model_copy(update={"mask_classes": ("background", "liver", "tumour"), "palette": palette})
    real = dataset_of(tmp_path / "real", tiny_samples("train", 4), ours)
    samples = tiny_samples("train", 4)
    with pytest.raises(MaskLoomError, match="is none of the real ones"):
        conversion_of(real, dataset_of(tmp_path / "masked", samples), tmp_path)
    for sample in samples:
        sample.mask = None
    assert conversion_of(real, dataset_of(tmp_path / "plain", samples), tmp_path).classes is not None


def dataset_of(folder: Path, samples: list[Sample], about: Description | None = None) -> MaskPromptDataset:
    write_dataset(folder, about or tiny_description(), {"train": samples})
    return MaskPromptDataset.open(folder)
