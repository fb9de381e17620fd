"""`python -m data_prep inspect`: names datasets, describes unknown folders, and proposes
configurations that work as printed.
"""

import importlib
import os
import random
import re
import shlex
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from maskloom.data_prep.__main__ import main
from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from maskloom.data_prep.inspect import observation
from maskloom.data_prep.inspect.advice import advice_for
from maskloom.data_prep.inspect.guess import guessed_data
from maskloom.data_prep.inspect.layout import guessed_options
from maskloom.data_prep.inspect.names import class_words
from maskloom.data_prep.inspect.observation import Listing, Sample, listing_of, sample_of, spread
from maskloom.data_prep.inspect.raw_tree import RawTree, tables_of, tree_of
from maskloom.data_prep.inspect.yaml_text import experiment_name
from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.sources import PACKAGE, open_sources
from maskloom.pipeline.cli import shown_command
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from maskloom.pipeline.plugins import load_plugin, plugin_names
from tests.data_prep.experiment import BUSI, BUSI_ABSENT
from tests.writers import busi, folder, isic9, medmnist

PREPARE = shown_command("prepare")
ROOT = Path(__file__).parents[2]
MEDMNIST = ROOT / ".." / "shared" / "data" / "medmnist"
WITH_WRITER = [name for name in plugin_names(PACKAGE) if (ROOT / "tests" / "writers" / f"{name}.py").is_file()]
HEIGHT, WIDTH = 40, 48


def inspected(capsys, folder, *arguments):
    """What is printed about a folder."""
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(folder), *arguments])
    assert not end.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def facts(text):
    """The aligned `name  value` lines by name; lines that go on are joined."""
    found, name = {}, None
    for line in text.splitlines():
        named = re.match(r"  (\S.*?)  +(\S.*)", line)
        if named:
            name = named[1]
            found.setdefault(name, named[2])
        elif name and line.startswith("     "):
            found[name] += " " + line.strip()
        else:
            name = None
    return found


def picture(path, seed=0, colour=False, size=(HEIGHT, WIDTH)):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 14, 3) if colour else (12, 14)).astype(np.uint8)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


def mask(path, *values, number=0):
    """A mask with a square for each value: a grey value, or a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3) if isinstance(values[0], tuple) else (HEIGHT, WIDTH), np.uint8)
    for place, value in enumerate(values):
        pixels[4 + 12 * place : 12 + 12 * place, 4 + number : 20 + number] = value
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("name", [name for name in WITH_WRITER if name != "folder"])
def test_every_dataset_is_named_with_its_command(name, tmp_path, capsys):
    importlib.import_module(f"tests.writers.{name}").write_raw(tmp_path)
    text = inspected(capsys, tmp_path, "--samples", "12")
    assert f"  looks like: {name}\n" in text
    options = " data.options.flag=bloodmnist data.options.size=28" if name == "medmnist" else ""
    assert f"\n  {PREPARE} --config configs/{name}.yaml data.raw_dir={tmp_path}{options}\n" in text
    assert (ROOT / "configs" / f"{name}.yaml").is_file()
    assert "\nListed\n" in text and "Problem" not in text


def printed_commands(text):
    """The commands as a shell would take them."""
    return [shlex.split(line) for line in text.splitlines() if line.startswith(f"  {PREPARE} --config configs/")]


SMALL = {"camelyon": ("data.options.tile_size=64",)}  # the writer's slides are smaller than a tile of real ones


def run_printed(text, run, *more):
    """Run the last printed command in a small size; return the contract of what it wrote."""
    words = printed_commands(text)[-1]
    assert words[: len(PREPARE.split())] == PREPARE.split()
    with pytest.raises(SystemExit) as end:
        main([*words[len(PREPARE.split()) :], "data.image_size=32", "data.num_workers=1", f"run_dir={run}", *more])
    assert end.value.code == 0
    return verify_fully(run / "dataset").contract


@pytest.mark.parametrize("name", WITH_WRITER)
def test_the_command_works_as_printed(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    raw = tmp_path / "raw $(x) 'é' #1: {a}\u00a0"
    raw.mkdir()
    importlib.import_module(f"tests.writers.{name}").write_raw(raw)
    text = inspected(capsys, raw, "--samples", "8")
    contract = run_printed(text, tmp_path / "run", *SMALL.get(name, ()))
    assert contract.description.dataset == name and sum(part.rows for part in contract.splits.values()) >= 8


def test_where_nothing_of_the_sample_can_be_used_the_command_comes_with_a_warning(tmp_path, capsys):
    importlib.import_module("tests.writers.camelyon").write_raw(tmp_path)
    text = inspected(capsys, tmp_path, "--samples", "2")
    assert "no image of the sample could be used: fix the problems above first" in " ".join(text.split())


def test_of_several_sets_each_has_its_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "raw"
    folder.mkdir()
    for flag, size in (("pneumoniamnist", 28), ("breastmnist", 64)):
        arrays = {}
        for split in ("train", "val", "test"):
            arrays[f"{split}_images"] = (
                np.random.default_rng(len(split)).integers(0, 256, (4, size, size)).astype(np.uint8)
            )
            arrays[f"{split}_labels"] = (np.arange(4) % 2).astype(np.uint8)[:, None]
        np.savez(folder / f"{flag}{'' if size == 28 else f'_{size}'}.npz", **arrays)
    text = inspected(capsys, folder)
    raw = f"data.raw_dir={folder}"
    assert [words[-3:] for words in printed_commands(text)] == [
        [raw, "data.options.flag=breastmnist", "data.options.size=64"],
        [raw, "data.options.flag=pneumoniamnist", "data.options.size=28"],
    ]
    assert run_printed(text, tmp_path / "run").description.image_size == (32, 32)


def test_the_printed_command_works_from_any_folder(tmp_path, capsys, monkeypatch):
    (tmp_path / "raw").mkdir()
    busi.write_raw(tmp_path / "raw")
    monkeypatch.chdir(tmp_path)
    text = inspected(capsys, "raw")
    assert f"{PREPARE} --config configs/busi.yaml 'data.raw_dir=\"raw\"'" in text
    assert run_printed(text, tmp_path / "run").description.dataset == "busi"


def test_a_layout_that_is_recognised_but_gives_no_image_has_no_command(tmp_path, capsys, monkeypatch):
    busi.write_raw(tmp_path)
    adapter = load_plugin(PACKAGE, "busi", "dataset").Adapter
    monkeypatch.setattr(adapter, "scan", lambda self: iter([Reject("x", "a mask without an image")]))
    text = inspected(capsys, tmp_path)
    assert "no image that can be used, " in text and "configs/busi.yaml data.raw_dir" not in text


def test_files_in_several_classes_are_one_line_and_the_emptied_class_is_named(tmp_path, capsys):
    isic9.write_raw(tmp_path)
    folders = sorted(folder for folder in tmp_path.rglob("Train/*") if folder.is_dir())
    emptied, other = folders[0], folders[1]
    names = [path.name for path in emptied.iterdir()]
    for name in names:
        shutil.copy(emptied / name, other / name)
    text = inspected(capsys, tmp_path)
    told = [line for line in text.splitlines() if "several classes" in line]
    assert len(told) == 1 and told[0].split()[0] == str(2 * len(names)) and "FILE lies in several classes: " in told[0]
    shutil.rmtree(next(path for path in tmp_path.rglob(f"Test/{emptied.name}")), ignore_errors=True)
    shutil.rmtree(next(path for path in tmp_path.rglob(f"Test/{other.name}")), ignore_errors=True)
    advice = inspected(capsys, tmp_path).split("Advice")[1].split("To prepare it")[0]
    assert f"no image is left of the class {emptied.name}; all that there are were left out" in " ".join(advice.split())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jpg", "png", ".jpg|1 is PNG (such as a.jpg); read as what they are"),
        ("a.png", b"<html>404</html>", ".png|1 is text (such as a.png); no image: a page saved instead of a download"),
        ("a.png", b"version https://git-lfs.github.com/spec/v1\n", ".png|1 is text (such as a.png)"),
        ("a.png", b"", ".png|1 is empty (such as a.png); no image: download or copy them again"),
        ("IM0001", bytes(128) + b"DICM", "no ending|1 is DICOM (such as IM0001)"),
        (
            "IM.1.2.840",
            b"\x08\0\x05\0CS\x0a\0ISO_IR 100",
            ".840|1 is DICOM without its preamble (such as IM.1.2.840); not read",
        ),
        ("bare.dcm", b"\x08\0\0\0\4\0\0\0\x10\0\0\0", ".dcm|1 is DICOM without its preamble (such as bare.dcm)"),
        ("a", "png", "no ending|1 is PNG (such as a); the adapter folder goes by endings: give them one"),
        ("a.nii.gz", b"\x5c\x01\0\0" + bytes(344), ".nii.gz|1 is NIfTI (such as a.nii.gz)"),
        ("a.tif", b"RIFF\0\0\0\0WEBPVP8 ", ".tif|1 is WEBP (such as a.tif)"),
    ],
)
def test_files_are_looked_into(tmp_path, capsys, name, content, told):
    picture(tmp_path / "fine.png")
    if content == "png":
        picture(tmp_path / "b.png", 1)
        (tmp_path / "b.png").rename(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    text = inspected(capsys, tmp_path)
    suffix, _, expected = told.partition("|")
    assert "\nNot what their endings say\n" in text and facts(text)[suffix].startswith(expected)
    assert "looks like: dicom_folder" in text or ".png" in text


def test_sound_files_are_what_their_endings_say(tmp_path, capsys):
    for writer in (busi, folder, medmnist):
        raw = tmp_path / writer.__name__
        raw.mkdir()
        writer.write_raw(raw)
        assert "Not what their endings say" not in inspected(capsys, raw, "--samples", "1")


def test_what_is_told_of_a_known_dataset(tmp_path, capsys):
    busi.write_raw(tmp_path)
    for title in ("truncated image", "image without mask"):
        busi.FLAWS[title].damage(tmp_path)
    found = facts(text := inspected(capsys, tmp_path))
    assert found["images"] == "19 listed, 1 left out" and found["licence"] == "CC-BY-4.0"
    assert found["classes"] == "benign 8, malignant 8, normal 3" and found["groups"] == "no patient ids known"
    assert found["official splits"] == "none; drawn by data.splits"
    assert "In a sample of 18 images\n" in text
    assert re.fullmatch(r"\d+ x 64 to \d+ x 64, median \d+ x 64; 2 sizes", found["width x height"])
    assert found["pixels"].startswith("uint8 grey 18; values 0 to 255") and "image PNG RGB 18" in found["files"]
    assert found["empty masks"] == "3 of 18 (16.7%)"
    shares = re.fullmatch(r"background ([\d.]+)%, lesion ([\d.]+)%", found["mask pixels"])
    assert abs(float(shares[1]) + float(shares[2]) - 100) < 0.2
    assert "\nLeft out: 2\n" in text and "no mask file belongs to this image" in text
    assert "Dataset_BUSI_with_GT/benign/benign (1).png" in text
    assert "images are small: image_size 512" in text


def test_only_as_many_samples_as_asked(tmp_path, capsys):
    busi.write_raw(tmp_path)
    assert "In a sample of 7 images\n" in inspected(capsys, tmp_path, "--samples", "7")


@pytest.mark.skipif(not BUSI.is_dir(), reason=BUSI_ABSENT)
def test_real_busi(capsys):
    found = facts(text := inspected(capsys, BUSI, "--samples", "30"))
    assert "looks like: busi\n" in text and re.match(r"\d{3} listed, 0 left out", found["images"])


@pytest.mark.skipif(not MEDMNIST.is_dir(), reason="MedMNIST is not in ../shared/data/medmnist")
def test_real_medmnist(capsys):
    found = facts(text := inspected(capsys, MEDMNIST))
    assert "looks like: medmnist\n" in text and found["width x height"] == "28 x 28"
    assert found["official splits"].startswith("train ")


def suffixed(raw):
    for number, kind in enumerate(["cat", "dog"] * 8):
        picture(raw / kind / f"x{number}.jpg", number, colour=True)
        mask(raw / kind / f"x{number}_seg.png", (255, 0, 0), (0, 255, 0), number=number)


def split_folders(raw):
    for number in range(15):
        place = f"{('train', 'val', 'test')[number // 5]}/patient{number // 5}{number % 5 // 2}_{number}.png"
        picture(raw / "images" / place, number)
        mask(raw / "labels" / place, 1, 2, number=number)


def a_folder_an_image(raw):
    for number in range(9):
        picture(raw / f"s{number}" / "images" / f"s{number}.png", number)
        for part in range(2):
            mask(raw / f"s{number}" / "masks" / f"{number * 7 + part}.png", *(255, 0)[: part + 1], number=number)


def several_masks(raw):
    for number in range(12):
        picture(raw / "scans" / f"{number}.tif", number)
        for part in range(1 + number % 2):
            mask(raw / "scans" / f"{number}_mask_{part}.png", 255, number=number + part)


def further_masks(raw):
    """As BUSI's class folders: a few images have a second lesion."""
    for number in range(1, 13):
        picture(raw / f"benign ({number}).png", number)
        mask(raw / f"benign ({number})_mask.png", 255, number=number)
    mask(raw / "benign (11)_mask_1.png", 255, number=1)


def prefixed(raw):
    for number in range(9):
        picture(raw / "a b" / f"{number:02d}.bmp", number)
        mask(raw / "a b masks" / f"mask_{number:02d}.png", 255, number=number)


def only_images(raw):
    for number in range(9):
        picture(raw / f"{number}.png", number)


def a_file_per_class(raw):
    for number in range(12):
        picture(raw / "images" / f"c{number}.png", number)
        mask(raw / "masks" / f"c{number}_disc.png", 255, 255, number=number)
        if number:
            mask(raw / "masks" / f"c{number}_optic cup.png", 255, number=number)


def a_folder_per_class(raw):
    for number in range(12):
        picture(raw / "images" / f"{number}.png", number)
        mask(raw / "masks" / "lung" / f"{number}.png", 255, 255, number=number)
        mask(raw / "masks" / "heart" / f"{number}.png", 255, number=number)


def windows_table(raw):
    rows = ["file,mask"]
    for number in range(12):
        picture(raw / "images" / f"{unicodedata.normalize('NFD', 'ä')}{number}.png", number)
        mask(raw / "masks" / f"M{number}.png", 255, number=number)
        rows.append(f"images\\ä{number}.png,.\\MASKS\\m{number}.PNG")
    (raw / "t.csv").write_text("\n".join(rows), encoding="utf-8")


def classes_in_names(raw):
    for number in range(12):
        picture(raw / f"derma_{'ab'[number % 2]}_{number}.png", number)
        mask(raw / f"derma_{'ab'[number % 2]}_{number}_mask.png", 255, number=number)


def table(raw):
    rows = ["img;seg;patient_id;Diagnosis;split;age"]
    for number in range(12):
        picture(raw / "pics" / f"part{number // 6}" / f"A{number}.png", number)
        mask(raw / "m" / f"A{number}_M.png", 255, number=number)
        split = ("train", "val", "test")[number // 4]
        rows.append(f"A{number};A{number}_M.png;P{number // 2};{'ab'[number % 2]};{split};{number}")
    (raw / "meta.csv").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("write", "rows", "classes", "expected"),
    [
        (
            suffixed,
            16,
            ("background", "class_1", "class_2"),
            {"images": "*/*.jpg", "masks": "{folder}/{stem}_seg.png", "label_from": "parent", "channels": 3},
        ),
        (
            split_folders,
            15,
            ("background", "class_1", "class_2"),
            {"masks": "labels/{parent}/{stem}.png", "split_pattern": "^(?:[^/]+/){1}([^/]+)/", "channels": 1},
        ),
        (a_folder_an_image, 9, ("background", "lesion"), {"masks": "{grandparent}/masks/*.png"}),
        (several_masks, 12, ("background", "lesion"), {"masks": "{folder}/{stem}_mask*.png", "images": "scans/*.tif"}),
        (further_masks, 12, ("background", "lesion"), {"images": "*.png", "masks": "{folder}/{stem}_mask*.png"}),
        (prefixed, 9, ("background", "lesion"), {"masks": "a b masks/mask_{stem}.png", "images": "a b/*.bmp"}),
        (only_images, 9, ("background", "lesion"), {"images": "*.png"}),
        (
            classes_in_names,
            12,
            ("background", "lesion"),
            {"label_pattern": "(?:^|/)(derma_a|derma_b)[^/]*$", "masks": "{folder}/{stem}_mask.png"},
        ),
        (
            table,
            12,
            ("background", "lesion"),
            {
                "table": "meta.csv",
                "image_column": "img",
                "images": "pics/*/{image}.png",
                "mask_column": "seg",
                "masks": "m/{mask}",
                "label_column": "Diagnosis",
                "group_column": "patient_id",
                "split_column": "split",
            },
        ),
        (folder.write_raw, 18, ("background", "class_1", "class_2"), {"label_from": "parent"}),
        (
            a_file_per_class,
            12,
            ("background", "disc", "optic cup"),
            {"masks": {"disc": "masks/{stem}_disc.png", "optic cup": "masks/{stem}_optic cup.png"}},
        ),
        (
            a_folder_per_class,
            12,
            ("background", "lung", "heart"),
            {"masks": {"lung": "masks/lung/{stem}.png", "heart": "masks/heart/{stem}.png"}},
        ),
        (windows_table, 12, ("background", "lesion"), {"image_column": "file", "mask_column": "mask"}),
    ],
)
def test_the_configuration_for_an_unknown_folder_works_as_printed(write, rows, classes, expected, tmp_path, capsys):
    raw = tmp_path / "raw data"
    raw.mkdir()
    write(raw)
    text = inspected(capsys, raw)
    assert "none of the datasets that have an adapter of their own" in text
    printed = re.search(r"replace TODO, check what was guessed\n(.*?)\n\nThen\n", text, re.DOTALL)[1]
    shutil.copy(ROOT / "configs" / "folder.yaml", tmp_path)
    config = tmp_path / "my_raw_data.yaml"
    assert f"save this as configs/{config.name}, replace TODO" in text
    config.write_text(printed, encoding="utf-8")
    overrides = [f"run_dir={tmp_path / 'run'}", "data.image_size=64"]
    with pytest.raises(MaskLoomError, match="modality='TODO': say what the images are"):
        prepare(load_experiment(config, overrides), force=False)
    config.write_text(printed.replace("TODO", "skin photograph"), encoding="utf-8")
    experiment = load_experiment(config, overrides)
    assert {key: experiment.data.options[key] for key in expected} == expected
    assert experiment.experiment == "my_raw_data"
    prepare(experiment, force=False)
    contract = verify_fully(tmp_path / "run" / "dataset").contract
    assert sum(part.rows for part in contract.splits.values()) == rows and contract.rejected == 0
    assert contract.description.mask_classes == classes and contract.description.modality == "skin photograph"


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        ("derma_a_{} derma_b_{}", ["derma_a", "derma_b"]),
        ("benign ({}) malignant({})", ["benign", "malignant"]),
        ("{} {}0", []),  # numbers alone
        ("img_{} scan_{}", []),  # what a file is
        ("left_{} right_{}", []),  # sides
        ("train_{} test_{}", []),  # splits
        ("p01_{} p02_{}", []),  # patients
        ("Benign_{} benign_{}", []),  # one class in two spellings
        ("benign_{}", []),
    ],
)
def test_classes_in_names_where_nothing_else_is_meant(names, classes):
    files = [f"x/{name.format(number)}.png" for number in range(3) for name in re.split(r"(?<=[})]) ", names)]
    assert class_words(files) == classes
    assert class_words([*files, "x/cyst_1.png"]) == []  # a word of a single file


@pytest.mark.parametrize(
    ("folder", "name"),
    [("Süd 2024!", "my_sud_2024"), ("null", "my_null"), ("肺", "my_data"), ("x" * 200, "my_" + "x" * 125)],
)
def test_an_experiment_is_named_after_its_folder(folder, name, tmp_path):
    assert experiment_name(tmp_path / folder) == name


def test_masks_that_no_pattern_joins_are_said_to_be_left_out(tmp_path, capsys):
    for number in range(12):
        picture(tmp_path / "images" / f"{number}.png", number)
        mask(tmp_path / "masks" / f"{number}.png", 255, number=number)
    mask(tmp_path / "masks" / "3_2.png", 255, number=1)
    text = inspected(capsys, tmp_path)
    assert "fits 12 of 12 images; 1 of 13 mask files belong to none of them and are left out" in text


def test_the_proposal_does_not_depend_on_the_order_of_files(tmp_path):
    split_folders(tmp_path)
    files = tree_of(tmp_path).files
    guesses = []
    for seed in range(3):
        random.Random(seed).shuffle(files)
        guesses.append(guessed_options(tmp_path, RawTree(sorted(files), complete=True), []).options)
    assert guesses[0] == guesses[1] == guesses[2]


def test_an_unknown_folder_is_described(tmp_path, capsys):
    split_folders(tmp_path)
    picture(tmp_path / "images" / "train" / "patient10_99.png", 99)
    mask(tmp_path / "labels" / "train" / "patient10_99.png", 1, 2, number=9)
    (tmp_path / "age.csv").write_text("name,age\nx,3\n")
    (tmp_path / "bad.csv").write_bytes(b"\xff\x00")
    (tmp_path / "scan.nii.gz").write_bytes(b"x")
    found = facts(text := inspected(capsys, tmp_path))
    assert found["images/train"] == ".png 6" and found["age.csv"] == "1 rows; columns name, age"
    assert found["bad.csv"].startswith("bad.csv cannot be decoded")
    assert "the adapters acdc and brats" in found["NIfTI"]
    assert re.fullmatch(r"0 \([\d.]+%\), 1 \([\d.]+%\), 2 \([\d.]+%\) in 16 masks", found["values"])
    assert "1 of 9 groups lie in several of the dataset's splits" in text


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("scan.svs", b"x", "the adapter camelyon"),
        ("a.npz", b"x", "the adapter medmnist"),
        ("a.nii", b"x", "acdc and brats"),
        ("a.docx", b"x", "no image of a format that is read"),
    ],
)
def test_formats_that_other_adapters_read(tmp_path, capsys, name, content, told):
    (tmp_path / name).write_bytes(content)
    assert told in " ".join(inspected(capsys, tmp_path).split())


def test_dicom_without_an_ending_is_dicom(tmp_path):
    from maskloom.data_prep.inspect.content import kinds_of
    from maskloom.data_prep.inspect.raw_tree import known_formats

    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    kinds = kinds_of(tmp_path, (tree := tree_of(tmp_path)).files)
    assert [(name, count) for name, count, _ in known_formats(tree, kinds)] == [("DICOM", 1)]


def test_an_adapter_that_recognises_a_folder_but_cannot_read_it_says_why(tmp_path, capsys, monkeypatch):
    busi.write_raw(tmp_path)

    def fail(self):
        raise MaskLoomError("the table has no column 'x'")

    monkeypatch.setattr(load_plugin(PACKAGE, "busi", "dataset").Adapter, "scan", fail)
    text = inspected(capsys, tmp_path)
    assert "looks like: busi\n" in text and "the table has no column 'x'" in text
    assert "extends: folder.yaml" in text  # another way to read it


def test_the_generic_adapter_comes_last(tmp_path, capsys, monkeypatch):
    busi.write_raw(tmp_path)
    for name in ("dicom_folder", "udiat"):
        monkeypatch.setattr(load_plugin(PACKAGE, name, "dataset").Adapter, "recognises", classmethod(lambda *_: True))
    text = inspected(capsys, tmp_path)
    assert "looks like: busi, udiat, dicom_folder\n" in text
    assert text.index("\nbusi:") < text.index("\nudiat:") < text.index("\ndicom_folder:")


def test_required_options_come_from_the_configuration(tmp_path, capsys, monkeypatch):
    folder.write_raw(tmp_path)
    monkeypatch.setattr(load_plugin(PACKAGE, "folder", "dataset").Adapter, "recognises", classmethod(lambda *_: True))
    text = inspected(capsys, tmp_path)
    assert "with the options of configs/folder.yaml" in text and "data.options: modality='TODO'" in text


@pytest.mark.parametrize("what", ["missing", "file", "empty", "unreadable"])
def test_what_cannot_be_looked_into_is_one_line(tmp_path, capsys, monkeypatch, what):
    path = tmp_path / "raw"
    if what == "file":
        path.write_text("x")
    elif what != "missing":
        path.mkdir()
    if what == "unreadable":

        def refuse(self):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(path)])
    told = capsys.readouterr()
    assert end.value.code == 2 and told.out == "" and told.err.count("\n") == 1
    expected = {"missing": "no such folder", "file": "is a file", "empty": "is empty", "unreadable": "cannot be read"}
    assert f"error: {path}: " in told.err and expected[what] in told.err


def test_names_of_any_kind_harm_nothing(tmp_path, capsys):
    picture(tmp_path / "[red]\n{x} ${HOME}" / "a\x1b[31m[/].png")
    picture(tmp_path / "日本 é" / "b.png", 1)
    shutil.copy(tmp_path / "日本 é" / "b.png", os.fsencode(tmp_path) + b"/\xff.png")
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    text = inspected(capsys, tmp_path)
    assert "\x1b" not in text and "日本 é" in text
    text.encode()


def test_lines_fit_in_100_columns_except_what_is_to_be_copied(tmp_path, capsys):
    folder.write_raw(tmp_path)
    for seed in range(30):
        (tmp_path / "images" / "normal" / f"{'long name ' * 12}{seed}.png").write_text("x")
    text = inspected(capsys, tmp_path)
    described = text.partition("To prepare it")[0]
    assert max(map(len, described.splitlines())) <= 100
    assert "cannot be decoded" in described or "no mask file fits" in described


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_told_and_never_a_traceback(tmp_path, capsys, seed):
    chance = random.Random(seed)
    folder.write_raw(tmp_path)
    table(tmp_path)
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        data = bytearray(path.read_bytes())
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.choice([0, 1, 9])):
            if data:
                data[chance.randrange(min(64, len(data)))] = chance.randrange(256)
        path.write_bytes(bytes(data))
    text = inspected(capsys, tmp_path)
    assert "cannot be decoded" in text
    assert "Traceback" not in text


class Slides(DatasetAdapter):
    """40 slides of 500 tiles; counts what is opened."""

    needs_raw_dir = False
    items_per_part = 1
    labels = ("a",)

    def __init__(self, seconds=0.0):
        super().__init__(None, self.Options())
        self.opened, self.loaded, self.clock, self.seconds = [], 0, 0.0, seconds

    def info(self):
        black_white = ((0, 0, 0), (255, 255, 255))
        return DatasetInfo("x", 1, ("background", "lesion"), black_white, (), ("{modality}",), "l", "c", "h", "none")

    def scan(self):
        yield Reject("40", "a slide that is left out")
        yield from (RawItem(f"s{number}", str(number), group=str(number)) for number in range(40))

    def expand(self, item):
        self.opened.append(item.path)
        if item.path == "39":
            raise RejectedSample("unusable")
        yield Reject(f"{item.path}#x", "an empty tile")
        yield from (RawItem(f"{item.path}-{tile}", f"{item.path}#{tile}") for tile in range(500))

    def load(self, item):
        self.loaded += 1
        self.clock += self.seconds
        if item.path.endswith("#0"):
            raise RejectedSample("blurred")
        return RawImage(
            np.full((10, 20), 7, np.uint16), np.ones((10, 20), np.uint8) if item.path.endswith("#499") else None
        )


def test_of_slides_only_a_few_are_opened_and_tiles_are_spread_over_them():
    slides = Slides()
    listing = listing_of(slides)
    assert (len(listing.items), len(listing.rejects), listing.kind) == (40, 1, "volumes or slides")
    sample = sample_of(slides, slides.info(), listing, 60)
    assert slides.opened == ["0", "13", "26", "39"] and slides.loaded == 45  # 15 of each slide but the last
    assert sample.opened == 4 and sample.inside == 1500 and sample.in_time
    assert Counter(reject.reason for reject in sample.rejects) == {"an empty tile": 3, "blurred": 3, "unusable": 1}
    assert (
        sample.sizes == [(10, 20)] * 42 and sample.kinds == {"uint16 grey": 42} and (sample.low, sample.high) == (7, 7)
    )
    assert sample.masks == 3 and sample.foreground == [1.0] * 3 and sample.class_pixels == {1: 600}


def test_reading_stops_when_time_is_up(monkeypatch):
    slides = Slides(seconds=9)
    monkeypatch.setattr(observation.time, "monotonic", lambda: slides.clock)
    sample = sample_of(slides, slides.info(), listing_of(slides), 60)
    assert not sample.in_time and slides.loaded == 7  # of 9 seconds each


def test_entries_are_spread_evenly():
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread(range(3), 9) == [0, 1, 2] and spread(range(9), 1) == [0]


def information(**changes):
    fields = {
        "modality": "x", "channels": 1, "mask_classes": ("background", "lesion"), "palette": ((0, 0, 0), (1, 1, 1)), "labels": (),
        "prompt_templates": ("x",), "licence": "l", "citation": "c", "homepage": "h",
    }  # fmt: skip
    return DatasetInfo(**{**fields, **changes})


def listing(count=10, rejected=0, **of_item):
    items = [RawItem(f"i{n}", f"{n}", **{key: value(n) for key, value in of_item.items()}) for n in range(count)]
    return Listing(items, [Reject(f"r{n}", "x") for n in range(rejected)], "images")


def fine_sample(**changes):
    sample = Sample([RawItem("i", "i")] * 10, sizes=[(500, 500)] * 10, masks=10, foreground=[0.1] * 10)
    sample.class_pixels = Counter({0: 90, 1: 10})
    for name, value in changes.items():
        setattr(sample, name, value)
    return sample


FINE = DataConfig(dataset="any")


@pytest.mark.parametrize(
    ("advice", "info", "listed", "sample", "data"),
    [
        (None, information(), listing(), fine_sample(), FINE),
        (None, information(), listing(rejected=0, label=lambda n: "ab"[n % 2]), fine_sample(), FINE),
        (
            "no image is left of the class c",
            information(labels=("a", "b", "c")),
            listing(label=lambda n: "ab"[n % 2]),
            fine_sample(),
            FINE,
        ),
        ("3 of 13 are left out", information(), listing(rejected=3), fine_sample(), FINE),
        ("2 of 12 are left out", information(), listing(), fine_sample(rejects=[Reject("x", "x")] * 2), FINE),
        (
            "image_size 512 enlarges the median image 8.0 times",
            information(),
            listing(),
            fine_sample(sizes=[(64, 32)]),
            FINE,
        ),
        (
            "100% of the marked areas are smaller than one latent",
            information(),
            listing(),
            fine_sample(foreground=[1e-4]),
            FINE,
        ),
        ("use data.conditioning=edges", information(), listing(), fine_sample(masks=0, class_pixels=Counter()), FINE),
        (
            "use data.conditioning=image",
            information(paired_image="H&E stain"),
            listing(),
            fine_sample(masks=0, class_pixels=Counter()),
            FINE,
        ),
        (
            "no mask of the sample holds lesion",
            information(),
            listing(),
            fine_sample(class_pixels=Counter({0: 9})),
            FINE,
        ),
        ("9 images of a for one of b", information(), listing(label=lambda n: "ab"[n == 9]), fine_sample(), FINE),
        ("all images are of one group", information(), listing(group=lambda n: "g"), fine_sample(), FINE),
        (
            "5 of 5 groups lie in several",
            information(),
            listing(group=lambda n: str(n % 5), split=lambda n: "train" if n < 5 else "test"),
            fine_sample(),
            FINE,
        ),
        ("near-duplicates are looked for among 20001 images", information(), listing(20001), fine_sample(), FINE),
        (
            "no patient ids are known: data.duplicates=near",
            information(duplicates="none"),
            listing(),
            fine_sample(),
            FINE,
        ),
        (
            None,
            information(),
            listing(),
            fine_sample(masks=0, class_pixels=Counter()),
            DataConfig(dataset="x", conditioning="edges"),
        ),
        (None, information(), listing(20001), fine_sample(), DataConfig(dataset="x", duplicates="identical")),
    ],
)
def test_advice(advice, info, listed, sample, data):
    if (
        data.duplicates == "identical"
    ):  # told as well: without patient ids, only near-duplicates keep a lesion in one split
        assert advice_for(info, listed, sample, data) == [
            "no patient ids are known: data.duplicates=near keeps pictures of one lesion in one split, at the price of time"
        ]
        return
    told = advice_for(info, listed, sample, data)
    assert told == [] if advice is None else (len(told) == 1 and advice in told[0])


def test_tables_that_are_too_large_are_left_alone(tmp_path, monkeypatch):
    from maskloom.data_prep.inspect import raw_tree

    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(raw_tree, "MAX_TABLE_BYTES", 4)
    assert tables_of(tmp_path, tree_of(tmp_path)) == ([], [("t.csv", "too large to look into")])


def test_of_very_many_files_some_are_looked_at(tmp_path, monkeypatch, capsys):
    from maskloom.data_prep.inspect import raw_tree

    only_images(tmp_path)
    monkeypatch.setattr(raw_tree, "MAX_FILES", 5)
    assert "Files: 5 and more; only these were looked at" in inspected(capsys, tmp_path)


def guessed_file(folder: Path, to: Path) -> dict:
    """Write the guess of a folder, and return its section `data`."""
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(folder), "--yaml", str(to)])
    assert not end.value.code
    written = to.read_text()
    assert written.startswith("# written by MaskLoom: guessed configuration (content ")
    return yaml.safe_load(written)["data"]


def test_the_guess_as_a_file(tmp_path, capsys):
    (tmp_path / "known").mkdir()
    busi.write_raw(tmp_path / "known")
    found = guessed_file(tmp_path / "known", tmp_path / "a.yaml")
    told = capsys.readouterr().err.replace("\n", "")
    assert f"then: maskloom run --config {tmp_path / 'a.yaml'}" in told
    assert found == {"dataset": "busi", "raw_dir": str(tmp_path / "known"), "conditioning": "mask", "options": {}}
    (tmp_path / "own" / "x").mkdir(parents=True)
    only_images(tmp_path / "own" / "x")
    found = guessed_file(tmp_path / "own", tmp_path / "b.yaml")
    assert found["dataset"] == "folder" and found["conditioning"] == "edges"
    assert found["options"]["modality"] == "medical image" and "masks" not in found["options"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("write", [only_images, a_folder_per_class, windows_table])
def test_page_command_and_file_state_the_same(write, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw)
    text = inspected(capsys, raw)
    printed = re.search(r"check what was guessed\n(.*?)\n\nThen\n", text, re.DOTALL)[1]
    page = yaml.safe_load(printed.replace("TODO", "medical image"))
    words = next(shlex.split(line) for line in text.splitlines() if "--config configs/folder.yaml" in line)
    command = load_experiment(Path("configs/folder.yaml"), words[words.index("configs/folder.yaml") + 1 :])
    data = guessed_file(raw, tmp_path / "mine.yaml")
    assert data == page["data"] and data["image_size"] == 256
    assert load_experiment(tmp_path / "mine.yaml", []) == command


@pytest.mark.parametrize("name", WITH_WRITER)
def test_the_guess_is_a_whole_configuration(name, tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    importlib.import_module(f"tests.writers.{name}").write_raw(raw)
    data = guessed_file(raw, tmp_path / "mine.yaml")
    config = load_experiment(tmp_path / "mine.yaml", [])
    assert config.experiment == "my_raw" and config.train is not None and config.generate is not None
    assert (config.data.dataset, config.data.raw_dir) == (name, raw)
    info = open_sources(config.data)[0].info
    masked = len(info.mask_classes) > 1
    assert config.data.conditioning in (("mask",) if masked else ("edges", "foreground", "image"))
    assert masked or config.train.adherence is None
    assert {key: config.data.options[key] for key in data["options"]} == data["options"]


def test_a_folder_that_cannot_be_guessed(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(MaskLoomError, match="no image of a format that is read"):
        guessed_data(tmp_path)
    (tmp_path / "several").mkdir()
    for flag in ("bloodmnist", "pneumoniamnist"):
        (tmp_path / "several" / f"{flag}.npz").write_bytes(b"")
    with pytest.raises(MaskLoomError, match=r"holds 2 datasets of the kind medmnist; choose one: options\.flag="):
        guessed_data(tmp_path / "several")
