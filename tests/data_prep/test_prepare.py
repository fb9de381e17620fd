import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from PIL import Image

import maskloom.data_prep.sources as sources_module
from maskloom.data_prep.__main__ import main
from maskloom.data_prep.adapter import DatasetInfo, RawImage, RawItem, Reject
from maskloom.data_prep.card import dataset_card
from maskloom.data_prep.datasets import phantom_bus
from maskloom.data_prep.datasets.busi import Adapter
from maskloom.data_prep.parts import Reading, found_samples, read_part, scanned_parts, without_taken_ids
from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.processing.resizing import resized
from maskloom.data_prep.sources import Source, open_adapter
from maskloom.data_prep.survey import sample_problem
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, LEDGER_FILE, read_contract
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.dataset.writer import DatasetWriter
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from maskloom.pipeline.files.atomic import TEMPORARY_SUFFIX
from maskloom.pipeline.parallel import available_cores, worker_count
from maskloom.pipeline.runs.command import EXIT_CODE
from maskloom.pipeline.runs.sample_files import sample_files
from tests.data_prep.experiment import BUSI, BUSI_ABSENT, dataset_bytes, experiment
from tests.processes import Command, finished, limit_file_size, start_server
from tests.tiny_datasets import tiny_description
from tests.writers import busbra, dicom_folder
from tests.writers.busi import write_raw

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A tiny BUSI with one of each flaw."""
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder)
    tree = folder / "Dataset_BUSI_with_GT"
    (tree / "benign" / "benign (1).png").write_bytes(b"not a picture")
    Image.new("L", (5, 5), 255).save(tree / "malignant" / "malignant (1)_mask.png")
    (tree / "normal" / "normal (1)_mask.png").unlink()
    (tree / "malignant" / "malignant (8).png").write_bytes((tree / "benign" / "benign (8).png").read_bytes())
    for mask in tree.glob("malignant/malignant (8)_mask*.png"):
        mask.unlink()
    for mask in tree.glob("benign/benign (8)_mask*.png"):
        mask_name = mask.name.replace("benign", "malignant")
        (tree / "malignant" / mask_name).write_bytes(mask.read_bytes())
    return folder


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """The run folder of that BUSI, prepared."""
    run = tmp_path_factory.mktemp("run")
    prepare(experiment(run, raw_dir=raw), force=False)
    return run


def ledger(run):
    lines = (run / "dataset" / LEDGER_FILE).read_text(encoding="utf-8").splitlines()
    return {Path(row["path"]).name: row["reason"] for row in map(json.loads, lines)}


def command_line(run, raw_dir, *more):
    config = run.parent / f"{run.name}.yaml"
    resolved = experiment(run, raw_dir=raw_dir).model_dump(mode="json")
    config.write_text(yaml.safe_dump(resolved), encoding="utf-8")
    return ["--config", str(config), *more]


def test_every_image_is_in_the_dataset_or_in_the_ledger(raw, prepared):
    images = {path.name for path in raw.rglob("*.png") if "_mask" not in path.name}
    rows = load_dataset(str(prepared / "dataset"))
    ids = {row["sample_id"] for split in rows.values() for row in split.select_columns("sample_id")}
    names = {f"{label} ({number}).png" for label, number in (sample_id.rsplit("-", 1) for sample_id in ids)}
    rejected = set(ledger(prepared)) & images
    assert names | rejected == images and not names & rejected
    assert sum(len(split) for split in rows.values()) == len(ids) == read_rows(prepared)
    files = sample_files(prepared / "dataset")
    assert files.keys() == ids and {Path(path).name for path in files.values()} == names
    assert all((raw / path).is_file() for path in files.values())


def read_rows(run):
    return sum(split.rows for split in read_contract(run / "dataset").splits.values())


def test_the_reasons_are_listed_with_paths_below_the_raw_folder(prepared):
    reasons = ledger(prepared)
    assert "cannot be decoded" in reasons["benign (1).png"]
    assert "is 5x5, the image" in reasons["malignant (1).png"]
    assert reasons["normal (1).png"] == "no mask file belongs to this image"
    conflict = "near-duplicates with different labels (benign, malignant): benign-8, malignant-8"
    assert reasons["benign (8).png"] == reasons["malignant (8).png"] == conflict
    paths = [json.loads(line)["path"] for line in (prepared / "dataset" / LEDGER_FILE).read_text().splitlines()]
    assert all(path.startswith("Dataset_BUSI_with_GT/") for path in paths)


def test_rows_come_back_exactly(raw, prepared):
    config = experiment(prepared, raw_dir=raw)
    adapter = open_adapter(config.data)
    items = {entry.sample_id: entry for entry in adapter.scan() if isinstance(entry, RawItem)}
    for split in load_dataset(str(prepared / "dataset")).values():
        for row in split:
            image, mask, _ = resized(adapter.load(items[row["sample_id"]]), (64, 64), "pad", 1)
            np.testing.assert_array_equal(np.asarray(row["image"]), image)
            np.testing.assert_array_equal(np.asarray(row["mask"]), mask)
            palette = np.asarray(adapter.info().palette, dtype=np.uint8)
            np.testing.assert_array_equal(np.asarray(row["conditioning_image"]), palette[mask])
            label = split.features["label"].int2str(row["label"])
            values = json.loads(row["attributes"])
            assert label == values["label"] == items[row["sample_id"]].label
            assert row["source"] == "busi" and row["origin"] == "real" and row["parent_id"] is None
            assert "breast ultrasound" in row["text"] and ("size" in values) == mask.any()


def test_the_dataset_is_sound_and_its_card_is_read(prepared):
    contract = verify_fully(prepared / "dataset").contract
    assert contract.rejected == len(ledger(prepared))
    card = (prepared / "dataset" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0" and front["size_categories"] == ["n<1K"]
    assert "| near-duplicates with different labels | 2 |" in card and "Al-Dhabyani" in card


def test_load_dataset_does_not_mix_up_runs(raw, tmp_path):
    for size in (64, 32):
        prepare(experiment(tmp_path / str(size), raw_dir=raw, image_size=size), force=False)
        assert load_dataset(str(tmp_path / str(size) / "dataset"))["train"][0]["image"].size == (size, size)


def test_an_unknown_licence_is_named_in_full():
    about = tiny_description(labels=()).model_copy(update={"licence": "Ask Prof. X"})
    card = dataset_card(about, {"train": Counter({"none": 2000})}, {"train": 1}, [])
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "other" and front["license_name"] == "ask-prof.-x"
    assert front["size_categories"] == ["1K<n<10K"] and "Nothing." in card


def test_no_class_name_breaks_the_tables_of_a_card():
    about = tiny_description(labels=("a|b", "c\nd"))
    card = dataset_card(about, {"train": Counter({"a|b": 3, "c\nd": 2})}, {"train": 5}, ["unknown class 'x|y'"])
    assert r"| split | rows | groups | a\|b | c d |" in card and "| train | 5 | 5 | 3 | 2 |" in card
    assert r"| unknown class 'x\|y' | 1 |" in card


def test_a_card_counts_reasons_without_the_names_of_raw_files():
    reasons = ["Smith_John.nii.gz is cut short", "Doe.nii.gz is cut short", "no mask (Doe.png)"]
    card = dataset_card(tiny_description(labels=()), {"train": Counter({"none": 1})}, {"train": 1}, reasons)
    assert "| a file is cut short | 2 |" in card and "| no mask | 1 |" in card
    assert "Smith" not in card and "Doe" not in card


def test_another_run_gives_the_same_bytes(raw, prepared, tmp_path):
    prepare(experiment(tmp_path / "again", raw_dir=raw / "Dataset_BUSI_with_GT"), force=False)
    ours, again = dataset_bytes(prepared / "dataset"), dataset_bytes(tmp_path / "again" / "dataset")
    shards = [file for file in ours if file.startswith("data/")]
    assert len(shards) == 5
    assert all(ours[file] == again[file] for file in shards)


def test_a_second_call_is_skipped_and_a_damaged_dataset_is_named_and_repaired(raw, tmp_path, capsys):
    config = experiment(tmp_path, raw_dir=raw)
    prepare(config, force=False)
    before = dataset_bytes(tmp_path / "dataset")
    shard = next((tmp_path / "dataset" / "data").glob("test-*"))
    (tmp_path / "dataset" / "notes.txt").write_text("the user's own")
    prepare(config, force=False)
    assert "up to date" in capsys.readouterr().err
    shard.write_bytes(b"edited by hand")
    with pytest.raises(MaskLoomError, match=f"{shard.name}: its SHA-256 differs.*write it again with --force"):
        verify_fully(tmp_path / "dataset")
    prepare(config, force=False)
    assert f"prepare: damaged: {shard}: changed since it was written; writing it again" in capsys.readouterr().err
    assert (tmp_path / "dataset" / "notes.txt").read_text() == "the user's own"
    (tmp_path / "dataset" / "notes.txt").unlink()
    assert dataset_bytes(tmp_path / "dataset") == before
    prepare(config, force=True)
    assert dataset_bytes(tmp_path / "dataset") == before


@pytest.mark.parametrize("place", ["dataset", "dataset/raw", "above", "link"])
def test_raw_files_where_the_stage_writes_are_refused_and_left_alone(raw, tmp_path, place):
    run = tmp_path / "above" / "run"
    given = {"above": tmp_path / "above", "link": tmp_path / "link"}.get(place, run / place)
    if place == "link":
        (tmp_path / "link").symlink_to(run / "dataset")
    shutil.copytree(raw, run / "dataset" if place == "link" else given / "deep")
    before = _files(tmp_path)
    with pytest.raises(MaskLoomError, match=rf"^(data\.raw_dir={given}: |run_dir={run}: holds dataset)"):
        prepare(experiment(run, raw_dir=given), force=True)
    assert _files(tmp_path) == before


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_part_is_read_again(raw, prepared, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "prepare_folder", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(experiment(tmp_path, raw_dir=raw), force=False)
    for suffix in ("jsonl", "bin", "near"):
        part = next((tmp_path / ".prepare").glob(f"*/part-*.{suffix}"))
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(DatasetWriter, "prepare_folder", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(experiment(tmp_path, raw_dir=raw), force=False)
        assert "reading that part of the raw data again" in capsys.readouterr().err
    prepare(experiment(tmp_path, raw_dir=raw), force=False)
    assert dataset_bytes(tmp_path / "dataset") == dataset_bytes(prepared / "dataset")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_another_configuration_leaves_nothing_of_the_old_dataset(raw, tmp_path):
    prepare(experiment(tmp_path, raw_dir=raw, rows_per_shard=2), force=False)
    prepare(experiment(tmp_path, raw_dir=raw, rows_per_shard=50, conditioning="edges"), force=False)
    assert len(list((tmp_path / "dataset" / "data").iterdir())) == 3
    verify_fully(tmp_path / "dataset")


def test_classes_are_spread_over_the_splits(raw, tmp_path):
    prepare(
        experiment(tmp_path, dataset="phantom_bus", options={"patients": 40, "views": 1, "height": 64}), force=False
    )
    rows = load_dataset(str(tmp_path / "dataset"))
    for split, expected in (("train", (11.2, 11.2, 5.6)), ("validation", (2.4, 2.4, 1.2)), ("test", (2.4, 2.4, 1.2))):
        counts = Counter(rows[split]["label"])
        assert all(abs(counts[label] - n) <= 1 for label, n in enumerate(expected))


def test_torch_is_not_imported():
    code = "import sys, maskloom.data_prep.__main__, maskloom.data_prep.prepare, datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=False).returncode == 0


# --- interruptions --------------------------------------------------------------------------------


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(raw, prepared, tmp_path):
    expected = dataset_bytes(prepared / "dataset")
    arguments = command_line(tmp_path / "run", raw)
    start_server()
    start = time.monotonic()
    assert finished("data_prep", arguments)[0] == 0
    whole = time.monotonic() - start
    assert dataset_bytes(tmp_path / "run" / "dataset") == expected
    moments = random.Random(0)
    for attempt in range(4):
        run = tmp_path / f"killed-{attempt}"
        command = Command("data_prep", command_line(run, raw))
        time.sleep(whole * moments.uniform(0.1, 1.0))
        command.kill()
        prepare(experiment(run, raw_dir=raw), force=False)
        assert dataset_bytes(run / "dataset") == expected
        assert not [path for path in run.iterdir() if path.name.startswith((".prepare", ".dataset"))]


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_killed_between_shards_it_goes_on_where_it_stopped(raw, prepared, tmp_path, monkeypatch, shards):
    write, done = DatasetWriter.write_shard, []

    def write_some(self, shard, samples):
        if len(done) == shards:
            (self.staging / "data").mkdir(exist_ok=True)
            (self.staging / "data" / f".{Path(shard.file).name}.1{TEMPORARY_SUFFIX}").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(shard.file)
        write(self, shard, samples)

    monkeypatch.setattr(DatasetWriter, "write_shard", write_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(experiment(tmp_path, raw_dir=raw), force=False)
    assert not (tmp_path / "dataset" / CONTRACT_FILE).exists()
    times = {file: (tmp_path / ".dataset.unfinished" / file).stat().st_mtime_ns for file in done}
    monkeypatch.setattr(DatasetWriter, "write_shard", write)
    prepare(experiment(tmp_path, raw_dir=raw), force=False)
    assert dataset_bytes(tmp_path / "dataset") == dataset_bytes(prepared / "dataset")
    assert {file: (tmp_path / "dataset" / file).stat().st_mtime_ns for file in done} == times


def test_a_full_disk_is_one_line_and_nothing_half_written_counts(raw, prepared, tmp_path):
    arguments = command_line(tmp_path / "run", raw)
    code, errors = finished("data_prep", arguments, before=partial(limit_file_size, 20_000))
    assert code == EXIT_CODE
    assert "Traceback" not in errors and errors.strip().splitlines()[-1].startswith("error: ")
    assert "free space" in errors
    assert not (tmp_path / "run" / "dataset" / CONTRACT_FILE).exists()
    assert finished("data_prep", arguments)[0] == 0
    assert dataset_bytes(tmp_path / "run" / "dataset") == dataset_bytes(prepared / "dataset")


# --- bad input ------------------------------------------------------------------------------------


def refused(capsys, arguments):
    """Return the one line that a command ends with, with exit code 2."""
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == EXIT_CODE
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_a_missing_folder(tmp_path, capsys):
    line = refused(capsys, command_line(tmp_path / "run", tmp_path / "nowhere"))
    assert "nowhere: no such folder" in line
    assert not (tmp_path / "run").exists()


def test_an_empty_folder(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert "not BUSI" in refused(capsys, command_line(tmp_path / "run", tmp_path / "raw"))
    (tmp_path / "raw" / "benign").mkdir()
    assert "no image found" in refused(capsys, command_line(tmp_path / "run", tmp_path / "raw"))


def test_nothing_usable(tmp_path, capsys):
    (tmp_path / "raw" / "benign").mkdir(parents=True)
    (tmp_path / "raw" / "benign" / "benign (1).png").write_bytes(b"x")
    (tmp_path / "raw" / "benign" / "benign (1)_mask.png").write_bytes(b"x")
    line = refused(capsys, command_line(tmp_path / "run", tmp_path / "raw"))
    assert "no usable image of busi among 1" in line and "benign (1).png cannot be decoded" in line
    assert not (tmp_path / "run" / "dataset").exists()


def test_an_unknown_option_and_an_unknown_dataset(raw, tmp_path):
    with pytest.raises(
        MaskLoomError, match=r"data\.options: unknown key 'include_normals': did you mean 'include_normal'"
    ):
        prepare(experiment(tmp_path, raw_dir=raw, options={"include_normals": True}), force=False)
    with pytest.raises(MaskLoomError, match="unknown dataset 'bussi': did you mean 'busi'"):
        prepare(experiment(tmp_path, dataset="bussi", raw_dir=raw), force=False)


def test_verify_says_what_is_wrong(prepared, tmp_path, capsys):
    main_arguments = ["verify", str(prepared / "dataset")]
    with pytest.raises(SystemExit) as leaving:
        main(main_arguments)
    assert leaving.value.code == 0
    assert "busi (real): sound, 64x64" in capsys.readouterr().out
    assert "no such dataset" in refused(capsys, ["verify", str(tmp_path / "nowhere")])


INFO = DatasetInfo(
    modality="m", channels=1, mask_classes=("background", "lesion"), palette=((0, 0, 0), (1, 1, 1)), labels=("a",),
    prompt_templates=("{modality}",), licence="", citation="", homepage="",
)  # fmt: skip
GOOD = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("image", "mask", "label", "problem"),
    [
        (GOOD, GOOD, "a", None),
        (GOOD, None, None, None),
        (np.zeros((4, 5, 3), np.uint8), GOOD, "a", None),
        (np.zeros((4, 5, 2), np.uint8), GOOD, "a", r"image has shape \(4, 5, 2\)"),
        (np.zeros((0, 5), np.uint8), None, "a", r"image has shape \(0, 5\)"),
        (np.full((4, 5), np.nan), GOOD, "a", "image holds NaN or infinite values"),
        (GOOD, GOOD[:2], "a", r"mask has shape \(2, 5\), the image \(4, 5\)"),
        (GOOD, GOOD + np.uint8(2), "a", r"unknown label value 2 in the mask; the classes are 0\.\.1"),
        (GOOD, GOOD, "b", "unknown label 'b'; known: a"),
    ],
)
def test_samples_are_checked(image, mask, label, problem):
    found = sample_problem(RawImage(image, mask), RawItem("x", "x.png", label=label), INFO)
    if problem is None:
        assert found is None
    else:
        assert re.search(problem, found)


class ListAdapter:
    """An adapter over given entries, for what no well-behaved adapter lists."""

    raw_dir = None

    def __init__(self, *entries):
        self.entries = entries

    def scan(self):
        return iter(self.entries)

    items_per_part = 2

    def expand(self, item):
        if item.key == "broken volume":
            raise RejectedSample("no slices")
        if isinstance(item.key, list):
            yield from (RawItem(name, f"{item.path}#{name}") for name in item.key)
        else:
            yield item

    def load(self, item):
        if item.key == "broken":
            raise RejectedSample("gone")
        return RawImage(GOOD, GOOD)


def listed(*entries, folder):
    """What one part of these entries keeps: the found samples, and the rejects' reasons by path."""
    source = Source("list", ListAdapter(*entries), INFO, INFO.labels, "near")
    data = DataConfig(dataset="list", image_size=8)
    reading = Reading(folder, (source,), data)
    parts = scanned_parts(reading.sources)
    for part in parts:
        read_part(reading, part)
    found, rejected = found_samples(folder, parts, reading.sources)
    found, taken = without_taken_ids(found)
    return found, {reject.path: reject.reason for reject in rejected + taken}


def test_ids_that_are_taken_or_not_portable_are_rejected(tmp_path):
    entries = (RawItem("a", "1.png"), RawItem("a", "2.png"), RawItem("b/c", "3.png"), Reject("4.png", "why"))
    found, reasons = listed(*entries, folder=tmp_path)
    assert [sample.path for sample in found] == ["1.png"]
    assert reasons["2.png"] == "its sample_id a is already that of 1.png" and reasons["4.png"] == "why"
    assert "characters other than" in reasons["3.png"]


def test_a_volume_is_expanded_and_an_unusable_one_is_one_reject(tmp_path):
    entries = (
        RawItem("v", "v.nii", key=["v-1", "v-2"]),
        RawItem("w", "w.nii", key="broken volume"),
        RawItem("x", "x.nii", key=[]),
    )
    found, reasons = listed(*entries, folder=tmp_path)
    assert [sample.sample_id for sample in found] == ["v-1", "v-2"]
    assert reasons == {"w.nii": "no slices"}


# --- real BUSI ------------------------------------------------------------------------------------


@pytest.mark.skipif(not BUSI.is_dir(), reason=BUSI_ABSENT)
def test_real_busi(tmp_path):
    prepare(experiment(tmp_path, raw_dir=BUSI, rows_per_shard=512), force=False)
    contract = verify_fully(tmp_path / "dataset").contract
    images = [path for path in BUSI.rglob("*.png") if "_mask" not in path.name]
    rows = sum(split.rows for split in contract.splits.values())
    assert rows + contract.rejected == len(images)
    reason = ledger(tmp_path)["benign (433).png"]
    assert "malignant-145" in reason and reason == ledger(tmp_path)["malignant (145).png"]
    for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        assert abs(contract.splits[split].rows - share * rows) <= 3
    groups = sum(split.groups for split in contract.splits.values())
    assert 430 <= groups <= 460


# --- several processes, several jobs --------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A BUSI of 200 small images, seven parts, and its run, prepared in this process.

    Every tenth is its neighbour, shifted.
    """
    folder = tmp_path_factory.mktemp("many")
    random, texture = np.random.default_rng(0), Image.new("L", (16, 16))
    for number, path in enumerate(phantom_bus.write_raw(folder / "raw", patients=200, views=1, height=64)):
        # Phantoms are all so much alike that comparing them would take most of the time.
        if number % 10 < 9:
            texture = Image.fromarray(random.integers(0, 200, (16, 16), dtype=np.uint8))
        with Image.open(path) as image:
            size = image.size
        pixels = np.roll(np.asarray(texture.resize(size)), number % 20 // 4, axis=1)
        Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(path)
    run = folder / "run"
    prepare(experiment(run, raw_dir=folder / "raw", rows_per_shard=50, num_workers=1), force=False)
    return folder / "raw", dataset_bytes(run / "dataset")


def test_two_processes_write_what_one_writes(many, tmp_path):
    raw_dir, expected = many
    prepare(experiment(tmp_path, raw_dir=raw_dir, rows_per_shard=50, num_workers=2), force=False)
    assert dataset_bytes(tmp_path / "dataset") == expected


def test_shards_in_any_order_then_merge_write_what_one_job_writes(many, tmp_path, capsys):
    raw_dir, expected = many
    resolved = experiment(tmp_path / "run", raw_dir=raw_dir, rows_per_shard=50, num_workers=1).model_dump(mode="json")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
    config = ["--config", str(tmp_path / "a.yaml")]
    assert "7 of 7 parts have not been read" in refused(capsys, ["merge", *config])
    for shard in ("3/3", "1/3"):
        done(main, [*config, "--shard", shard])
    line = refused(capsys, ["merge", *config])
    assert "2 of 7 parts have not been read (the first: 1)" in line and "run the shards" in line
    assert not (tmp_path / "run" / "dataset").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob(".prepare/*/part-*")}
    done(main, [*config, "--shard", "2/3"])
    done(main, [*config, "--shard", "1/3"])  # once more: nothing left to read
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob(".prepare/*/part-*")}
    assert before.items() < after.items() and len(after) == 28
    done(main, ["merge", *config])
    assert dataset_bytes(tmp_path / "run" / "dataset") == expected
    assert not (tmp_path / "run" / ".prepare").exists()


def done(command, arguments):
    with pytest.raises(SystemExit) as leaving:
        command(arguments)
    assert leaving.value.code == 0


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b", "-1/2"])
def test_a_shard_that_does_not_exist(shard, raw, tmp_path, capsys):
    line = refused(capsys, command_line(tmp_path / "run", raw, f"--shard={shard}"))
    assert f"--shard {shard}: write I/N with 1 <= I <= N" in line


def test_a_part_that_was_read_is_not_read_again(many, tmp_path, monkeypatch):
    raw_dir, expected = many
    config = experiment(tmp_path, raw_dir=raw_dir, rows_per_shard=50, num_workers=1)
    load, loaded = Adapter.load, []

    def load_some(self, item):
        if len(loaded) == 100:
            raise KeyboardInterrupt
        loaded.append(item.sample_id)
        return load(self, item)

    monkeypatch.setattr(Adapter, "load", load_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, force=False)
    read = len(list(tmp_path.glob(".prepare/*/part-*.jsonl")))
    assert read == 100 // Adapter.items_per_part
    first, loaded = loaded, []

    def load_others(self, item):
        loaded.append(item.sample_id)
        return load(self, item)

    monkeypatch.setattr(Adapter, "load", load_others)
    prepare(config, force=False)
    assert len(loaded) == 200 - read * Adapter.items_per_part
    assert not set(loaded) & set(first[: read * Adapter.items_per_part])
    assert dataset_bytes(tmp_path / "dataset") == expected


def test_an_orphaned_worker_stops(tmp_path):
    code = f"from maskloom.pipeline.parallel import _unless_orphaned; _unless_orphaned(1, open, {str(tmp_path / 'written')!r})"
    wanted = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=False)
    assert wanted.returncode == 1 and not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("tasks", "wanted", "least", "most"), [(1, None, 1, 1), (3, None, 1, 1), (10_000, None, 1, 512), (1, 4, 4, 4)]
)
def test_workers_are_as_many_as_the_work_is_worth(tasks, wanted, least, most):
    assert least <= worker_count(tasks, wanted) <= most
    assert worker_count(tasks, None) <= available_cores()


# --- external test sets, windows, stains ----------------------------------------------------------


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Another hospital: other phantoms, and one inverted image of the first set."""
    folder = tmp_path_factory.mktemp("second")
    phantom_bus.write_raw(folder, patients=10, views=1, height=64, seed=7)
    return folder


@pytest.fixture
def external_busi(monkeypatch):
    """BUSI's adapter under a second name, as the adapter of another dataset."""
    module = importlib.import_module("maskloom.data_prep.datasets.busi")
    monkeypatch.setitem(sys.modules, "maskloom.data_prep.datasets.second_hospital", module)
    names = sources_module.load_plugin

    def load_plugin(package, name, kind):
        return module if name == "second_hospital" else names(package, name, kind)

    monkeypatch.setattr(sources_module, "load_plugin", load_plugin)


@pytest.mark.usefixtures("external_busi")
def test_an_external_set_is_a_split_of_its_own_and_moves_nothing_else(raw, prepared, second, tmp_path):
    tree, seen = second / "Dataset_BUSI_with_GT" / "benign", raw / "Dataset_BUSI_with_GT" / "benign"
    inverted = 255 - np.asarray(Image.open(seen / "benign (2).png").convert("L"))
    Image.fromarray(inverted).save(tree / "benign (77).png")
    Image.open(seen / "benign (2)_mask.png").convert("L").save(tree / "benign (77)_mask.png")
    external = {"second_hospital": {"raw_dir": second}}
    prepare(experiment(tmp_path, raw_dir=raw, external=external), force=False)
    ours, alone = dataset_bytes(tmp_path / "dataset"), dataset_bytes(prepared / "dataset")
    assert all(ours[file] == content for file, content in alone.items() if file.startswith("data/"))
    contract = verify_fully(tmp_path / "dataset").contract
    assert contract.splits["external_second_hospital"].rows == 10
    split = load_dataset(str(tmp_path / "dataset"))["external_second_hospital"]
    assert set(split["source"]) == {"second_hospital"}
    assert all(name.startswith("second_hospital-") for name in split["sample_id"])
    assert Counter(split["label"]) == {0: 4, 1: 4, 2: 2}
    reason = ledger(tmp_path)["benign (77).png"]
    assert reason == "near-duplicate of an image of another source: benign-2"
    assert "second_hospital/Dataset_BUSI_with_GT/benign/benign (77).png" in ours["rejected.jsonl"].decode()
    card = ours["README.md"].decode()
    assert "| external_second_hospital | 10 |" in card and "external: second_hospital" in card


def test_an_external_set_of_known_patients_is_compared_with_the_main_one_by_likeness(raw, tmp_path):
    other = tmp_path / "other"
    busbra.write_raw(other)
    seen = Image.open(raw / "Dataset_BUSI_with_GT" / "benign" / "benign (2).png").convert("L")
    copied = other / "BUSBRA" / "Images" / "bus_0001-l.png"
    seen.point(lambda value: value * 9 // 10 + 9).resize(Image.open(copied).size).save(copied)
    first, alike = (other / "BUSBRA" / "Images" / f"bus_{name}.png" for name in ("0002-l", "0003-l"))
    Image.open(first).point(lambda value: value * 9 // 10).resize(Image.open(alike).size).save(alike)
    prepare(experiment(tmp_path, raw_dir=raw, external={"busbra": {"raw_dir": other}}), force=False)
    assert ledger(tmp_path)["bus_0001-l.png"] == "near-duplicate of an image of another source: benign-2"
    found = load_dataset(str(tmp_path / "dataset"))["external_busbra"]
    assert {name: name.split("_")[1].split("-")[0].lstrip("0") for name in found["sample_id"]} == {
        name: group.removeprefix("busbra-case-")
        for name, group in zip(found["sample_id"], found["group_id"], strict=True)
    }


@pytest.mark.parametrize(
    ("external", "says"),
    [
        ({"busi": {}}, r"data\.external\.busi: this is the main dataset"),
        (["second_hospital"], r"data\.external\.second_hospital\.raw_dir is not set"),
        (
            {"second_hospital": {"raw_dir": "nowhere"}},
            r"data\.external\.second_hospital\.raw_dir=nowhere: no such folder",
        ),
        ({"second_hospital": {"options": {"x": 1}}}, r"data\.external\.second_hospital\.options: unknown key 'x'"),
        (
            {"mni152": {}},
            r"data\.external\.mni152: its mask classes \(background, grey matter, white matter\) are not those",
        ),
    ],
)
@pytest.mark.usefixtures("external_busi")
def test_external_sets_that_do_not_fit(external, says, raw, tmp_path):
    with pytest.raises(MaskLoomError, match=says):
        prepare(experiment(tmp_path, raw_dir=raw, external=external), force=False)


@pytest.mark.usefixtures("external_busi")
def test_an_external_set_without_a_usable_image(raw, tmp_path):
    (tmp_path / "raw" / "benign").mkdir(parents=True)
    with pytest.raises(
        MaskLoomError, match=r"data\.external\.second_hospital\.raw_dir=.*no image found for second_hospital"
    ):
        prepare(
            experiment(tmp_path, raw_dir=raw, external={"second_hospital": {"raw_dir": tmp_path / "raw"}}), force=False
        )


def test_where_no_group_is_left_to_train_on_it_is_told_what_was_left_out(tmp_path):
    (tmp_path / "raw").mkdir()
    rows = ["file,patient,split"]
    for number, split in enumerate(["train", "test"] * 3):
        noise = np.random.default_rng(number).integers(0, 255, (32, 32)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "raw" / f"{number}.png")
        rows.append(f"{number}.png,P{number // 2},{split}")
    (tmp_path / "raw" / "t.csv").write_text("\n".join(rows))
    columns = {"image_column": "file", "group_column": "patient", "split_column": "split"}
    options = {"modality": "X-ray", "table": "t.csv", **columns}
    config = experiment(tmp_path / "run", "folder", tmp_path / "raw", conditioning="edges", options=options)
    says = r"no group is left for the train split; .* \(3 of 6 inputs were left out, 3 of them: .* also lies in the dataset's test split"
    with pytest.raises(MaskLoomError, match=says):
        prepare(config, force=False)


def test_an_intensity_window_over_values_that_were_windowed_is_refused(tmp_path):
    dicom_folder.write_raw(tmp_path / "raw")
    with pytest.raises(
        MaskLoomError,
        match=r"data\.intensity: dicom_folder has its own window.*set data\.intensity=null and data\.options\.window",
    ):
        prepare(
            experiment(tmp_path / "run", "dicom_folder", tmp_path / "raw", intensity={}, conditioning="edges"),
            force=False,
        )
    assert not (tmp_path / "run").exists()


def test_an_intensity_window_is_applied_and_recorded(raw, prepared, tmp_path):
    window = {"method": "window", "center": 100, "width": 100}
    prepare(experiment(tmp_path, raw_dir=raw, intensity=window), force=False)
    about = read_contract(tmp_path / "dataset").description
    assert about.preprocessing["intensity"] == window | {"lower": 1.0, "upper": 99.0, "deviations": 3.0}
    plain = {row["sample_id"]: row for row in load_dataset(str(prepared / "dataset"))["train"]}
    for row in load_dataset(str(tmp_path / "dataset"))["train"]:
        before, after = (np.asarray(one["image"], dtype=float) for one in (plain[row["sample_id"]], row))
        assert after.std() > before.std() and (after[before < 40] == 0).mean() > 0.9
        np.testing.assert_array_equal(np.asarray(row["mask"]), np.asarray(plain[row["sample_id"]]["mask"]))


def test_conditioning_that_the_dataset_cannot_give(raw, tmp_path):
    with pytest.raises(
        MaskLoomError, match=r"data\.conditioning=image needs a second image of every sample and busi has none"
    ):
        prepare(experiment(tmp_path, raw_dir=raw, conditioning="image"), force=False)


def test_duplicates_as_the_configuration_says(raw, tmp_path):
    prepare(experiment(tmp_path / "identical", raw_dir=raw, duplicates="identical"), force=False)
    reason = ledger(tmp_path / "identical")["benign (8).png"]
    assert reason == "near-duplicates with different labels (benign, malignant): benign-8, malignant-8"
    prepare(experiment(tmp_path / "none", raw_dir=raw, duplicates="none"), force=False)
    assert "benign (8).png" not in ledger(tmp_path / "none")


def test_the_slurm_script_reads_in_an_array_and_merges_afterwards(many, tmp_path):
    raw_dir, expected = many
    resolved = experiment(tmp_path / "run", raw_dir=raw_dir, rows_per_shard=50, num_workers=1).model_dump(mode="json")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
    command = ["bash", "configs/slurm/prepare.sh", str(tmp_path / "a.yaml"), "seed=0"]
    environment = {**os.environ, "PYTHON": sys.executable, "SLURM_ARRAY_TASK_COUNT": "2"}
    for task in ("1", "2"):
        subprocess.run(command, cwd=CHECKOUT, env={**environment, "SLURM_ARRAY_TASK_ID": task}, check=True)
    assert not (tmp_path / "run" / "dataset").exists()
    subprocess.run(command, cwd=CHECKOUT, env=environment, check=True)
    assert dataset_bytes(tmp_path / "run" / "dataset") == expected
