import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from PIL import Image

from data_prep.__main__ import main
from data_prep.adapter import DatasetInfo, RawImage, RawItem, Reject
from data_prep.card import dataset_card
from data_prep.grouping import Row
from data_prep.prepare import _sample, open_adapter, prepare
from data_prep.resizing import resized
from data_prep.survey import sample_problem, survey_samples
from pipeline.contract import CONTRACT_FILE, LEDGER_FILE, DatasetWriter, read_contract
from pipeline.errors import EXIT_CODE, MaskLoomError, RejectedSample
from pipeline.verification import verify_fully
from tests.data_prep.experiment import BUSI, BUSI_ABSENT, dataset_bytes, experiment
from tests.tiny_datasets import tiny_description
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


def started(arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *arguments], cwd=CHECKOUT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def test_every_image_is_in_the_dataset_or_in_the_ledger(raw, prepared):
    images = {path.name for path in raw.rglob("*.png") if "_mask" not in path.name}
    rows = load_dataset(str(prepared / "dataset"))
    ids = {row["sample_id"] for split in rows.values() for row in split.select_columns("sample_id")}
    names = {f"{label} ({number}).png" for label, number in (sample_id.rsplit("-", 1) for sample_id in ids)}
    rejected = set(ledger(prepared)) & images
    assert names | rejected == images and not names & rejected
    assert sum(len(split) for split in rows.values()) == len(ids) == read_rows(prepared)


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
            image, mask = resized(adapter.load(items[row["sample_id"]]), (64, 64), "pad", 1)
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
    contract = verify_fully(prepared / "dataset")
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


def test_another_run_gives_the_same_bytes(raw, prepared, tmp_path):
    prepare(experiment(tmp_path / "again", raw_dir=raw / "Dataset_BUSI_with_GT"), force=False)
    ours, again = dataset_bytes(prepared / "dataset"), dataset_bytes(tmp_path / "again" / "dataset")
    shards = [file for file in ours if file.startswith("data/")]
    assert len(shards) == 5
    assert all(ours[file] == again[file] for file in shards)


def test_a_second_call_is_skipped_and_force_repairs_an_edited_dataset(raw, tmp_path):
    config = experiment(tmp_path, raw_dir=raw)
    prepare(config, force=False)
    before = dataset_bytes(tmp_path / "dataset")
    shard = next((tmp_path / "dataset" / "data").glob("test-*"))
    shard.write_bytes(b"edited by hand")
    prepare(config, force=False)
    assert shard.read_bytes() == b"edited by hand"
    with pytest.raises(MaskLoomError, match=f"{shard.name}: its SHA-256 differs.*write it again with --force"):
        verify_fully(tmp_path / "dataset")
    prepare(config, force=True)
    assert dataset_bytes(tmp_path / "dataset") == before


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
    code = "import sys, data_prep.__main__, datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=False).returncode == 0


# --- interruptions -----------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(raw, prepared, tmp_path):
    expected = dataset_bytes(prepared / "dataset")
    arguments = command_line(tmp_path / "run", raw)
    start = time.monotonic()
    assert started(arguments).wait() == 0
    whole = time.monotonic() - start
    assert dataset_bytes(tmp_path / "run" / "dataset") == expected
    moments = random.Random(0)
    for attempt in range(4):
        run = tmp_path / f"killed-{attempt}"
        process = started(command_line(run, raw))
        # Start-up (imports) is most of so short a run; the work is in the rest.
        time.sleep(whole * moments.uniform(0.5, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        prepare(experiment(run, raw_dir=raw), force=False)
        assert dataset_bytes(run / "dataset") == expected
        assert not [path for path in run.iterdir() if path.name.startswith((".prepare", ".dataset"))]


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_killed_between_shards_it_goes_on_where_it_stopped(raw, prepared, tmp_path, monkeypatch, shards):
    write, done = DatasetWriter.write_shard, []

    def write_some(self, shard, samples):
        if len(done) == shards:
            (self.folder / "data").mkdir(exist_ok=True)
            (self.folder / "data" / f".{Path(shard.file).name}.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(shard.file)
        write(self, shard, samples)

    monkeypatch.setattr(DatasetWriter, "write_shard", write_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(experiment(tmp_path, raw_dir=raw), force=False)
    assert not (tmp_path / "dataset" / CONTRACT_FILE).exists()
    times = {file: (tmp_path / "dataset" / file).stat().st_mtime_ns for file in done}
    monkeypatch.setattr(DatasetWriter, "write_shard", write)
    prepare(experiment(tmp_path, raw_dir=raw), force=False)
    assert dataset_bytes(tmp_path / "dataset") == dataset_bytes(prepared / "dataset")
    assert {file: (tmp_path / "dataset" / file).stat().st_mtime_ns for file in done} == times


def test_a_full_disk_is_one_line_and_nothing_half_written_counts(raw, prepared, tmp_path):
    def small_files_only():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = command_line(tmp_path / "run", raw)
    process = started(arguments, preexec_fn=small_files_only)
    _, errors = process.communicate()
    assert process.returncode == EXIT_CODE
    assert "Traceback" not in errors and errors.strip().splitlines()[-1].startswith("error: ")
    assert "free space" in errors
    assert not (tmp_path / "run" / "dataset" / CONTRACT_FILE).exists()
    main_ok = started(arguments)
    assert main_ok.wait() == 0
    assert dataset_bytes(tmp_path / "run" / "dataset") == dataset_bytes(prepared / "dataset")


# --- bad input ---------------------------------------------------------------------------------------------------------


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
    assert "no usable image among 1" in line and "benign (1).png cannot be decoded" in line
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

    def expand(self, item):
        yield item

    def load(self, item):
        if item.key == "broken":
            raise RejectedSample("gone")
        return RawImage(GOOD, GOOD)


def test_ids_that_are_taken_or_not_portable_are_rejected(tmp_path):
    entries = (RawItem("a", "1.png"), RawItem("a", "2.png"), RawItem("b/c", "3.png"), Reject("4.png", "why"))
    survey = survey_samples(ListAdapter(*entries), INFO, tmp_path / "signatures")
    assert [item.path for item in survey.items] == ["1.png"]
    reasons = {reject.path: reject.reason for reject in survey.rejected}
    assert reasons["2.png"] == "its sample_id a is already that of 1.png" and reasons["4.png"] == "why"
    assert "characters other than" in reasons["3.png"]


def test_nothing_listed(tmp_path):
    with pytest.raises(MaskLoomError, match="no image found"):
        survey_samples(ListAdapter(), INFO, tmp_path / "signatures")


def test_a_file_that_vanishes_between_the_passes():
    row = Row(RawItem("a", "/raw/a.png", key="broken"), "a")
    with pytest.raises(MaskLoomError, match=r"/raw/a\.png: changed while it was being prepared \(gone\)"):
        _sample(ListAdapter(), INFO, tiny_description(), row)


# --- real BUSI ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not BUSI.is_dir(), reason=BUSI_ABSENT)
def test_real_busi(tmp_path):
    prepare(experiment(tmp_path, raw_dir=BUSI, rows_per_shard=512), force=False)
    contract = verify_fully(tmp_path / "dataset")
    images = [path for path in BUSI.rglob("*.png") if "_mask" not in path.name]
    rows = sum(split.rows for split in contract.splits.values())
    assert rows + contract.rejected == len(images)
    reason = ledger(tmp_path)["benign (433).png"]
    assert "malignant-145" in reason and reason == ledger(tmp_path)["malignant (145).png"]
    for split, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        assert abs(contract.splits[split].rows - share * rows) <= 3
    groups = sum(split.groups for split in contract.splits.values())
    assert 430 <= groups <= 460
