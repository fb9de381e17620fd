"""What trainings and evaluations ask first: planted leaks stop the run, sound datasets are compared
once, and no record is trusted blindly.
"""

import json
import tracemalloc

import numpy as np
import pytest

from maskloom.pipeline.dataset.audit.pixels import decoded_image, pixel_digest
from maskloom.pipeline.dataset.contract import Parent
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import LeakedImages, MaskLoomError
from maskloom.pipeline.runs import leaks
from maskloom.pipeline.runs.leaks import require_no_leaks
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.sample_files import write_sample_files
from tests.data_prep.audit.test_audit import darker, picture
from tests.tiny_datasets import synthetic_samples, tiny_description, tiny_samples, write_dataset

COUNTS = {"train": 6, "validation": 4, "test": 4, "external_other": 4}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def splits():
    return {split: tiny_samples(split, count) for split, count in COUNTS.items()}


def opened(folder, parts, preprocessing=None, parent=None, **about):
    description = tiny_description(**about).model_copy(update={"preprocessing": preprocessing or {}})
    write_dataset(folder, description, parts, parent)
    return verify_quickly(folder)


def planted(run, change, **more):
    parts = splits()
    change(parts)
    return opened(run.dataset, parts, **more)


def same_image(split, other, index=1):
    """Give a sample of `split` image and label of one in `other`."""

    def change(parts):
        parts[split][index].image, parts[split][index].label = parts[other][index].image, parts[other][index].label

    return change


def records(run):
    return sorted(run.logs("audit").glob("*.json"))


def not_again(*_):
    raise AssertionError("the images were compared again")


def test_a_sound_dataset_is_compared_once(run, monkeypatch, capsys):
    dataset = opened(run.dataset, splits())
    require_no_leaks(run, [dataset])
    (record,) = records(run)
    assert record.name == f"{dataset.contract.digest}.json"
    said = capsys.readouterr().err
    assert "audit: 18 images in" in said and "none found in two splits" in said
    monkeypatch.setattr(leaks, "_failures", not_again)
    require_no_leaks(run, [dataset])
    with pytest.raises(AssertionError):
        require_no_leaks(run, [opened(run.dataset, {**splits(), "test": tiny_samples("test", 3)})])
    monkeypatch.setattr(leaks, "VERSION", 2)
    with pytest.raises(AssertionError):
        require_no_leaks(run, [dataset])


@pytest.mark.parametrize(
    ("split", "other"),
    [
        ("train", "validation"),
        ("train", "test"),
        ("validation", "test"),
        ("train", "external_other"),
        ("validation", "external_other"),
    ],
)
def test_an_image_that_shapes_a_model_and_measures_it_stops_the_run(run, split, other):
    dataset = planted(run, same_image(split, other))
    message = rf"1 pair\(s\) of images .* identical images in two splits: {split}-0001 \({split}\) and {other}-0001 \({other}\); prepare"
    with pytest.raises(MaskLoomError, match=message):
        require_no_leaks(run, [dataset])
    assert records(run) == []
    (listed,) = run.logs("audit").glob("*-leaked.jsonl")
    (row,) = map(json.loads, listed.read_text().splitlines())
    (leaking,) = (one for one in dataset.rows(split, ["sample_id", "image"]) if one["sample_id"] == f"{split}-0001")
    assert row["image_pixels"] == pixel_digest(decoded_image(dataset.folder, leaking)).hex()


def test_several_leaks_are_counted_and_the_first_named(run):
    def change(parts):
        for index in range(4):
            same_image("train", "test", index)(parts)

    with pytest.raises(
        MaskLoomError, match=r"4 pair\(s\) of images .*; and 1 more; all are listed in .*-leaked\.jsonl; prepare"
    ):
        require_no_leaks(run, [planted(run, change)])


def test_held_out_splits_may_share_an_image(run):
    require_no_leaks(run, [planted(run, same_image("test", "external_other"))])
    assert len(records(run)) == 1


@pytest.mark.parametrize("value", [0, 200])
def test_images_of_one_value_are_no_leak(run, value):
    def change(parts):
        for samples in parts.values():
            samples[0].image = np.pad(np.full((20, 32), value, np.uint8), ((6, 6), (0, 0)))
            samples[1].image = np.full((32, 32), value, np.uint8)

    require_no_leaks(run, [planted(run, change)])


def test_an_image_with_two_labels_stops_the_run(run):
    def change(parts):
        parts["train"][1].image = parts["train"][0].image

    with pytest.raises(
        MaskLoomError, match=r"identical images with different labels: train-0000 \(disc\) and train-0001 \(square\)"
    ):
        require_no_leaks(run, [planted(run, change)])


def damage_text(path):
    path.write_text(path.read_text().replace('"rows": 18', '"rows": 19'))


def cut(path):
    path.write_text(path.read_text()[:40])


def other_shape(path):
    path.write_text(json.dumps([1, 2]))


def of_another_dataset(path):
    """A record that is whole and typed, of another dataset."""
    other = Run(path.parent / "other")
    dataset = opened(other.dataset, {"train": tiny_samples("train", 3)})
    require_no_leaks(other, [dataset])
    path.write_bytes(records(other)[0].read_bytes())


@pytest.mark.parametrize("damage", [damage_text, cut, other_shape, of_another_dataset])
def test_a_record_that_cannot_be_trusted_counts_for_nothing(run, damage, monkeypatch, capsys):
    dataset = opened(run.dataset, splits())
    require_no_leaks(run, [dataset])
    (record,) = records(run)
    whole = record.read_bytes()
    damage(record)
    capsys.readouterr()
    require_no_leaks(run, [dataset])
    said = " ".join(capsys.readouterr().err.split())
    assert "audit: 18 images in" in said
    if damage is not of_another_dataset:
        assert record.name in said
    assert record.read_bytes() == whole


def synthetic(run, real, picture, label=None):
    parts = synthetic_samples(tiny_samples("train", COUNTS["train"]), "made", picture)
    for sample in parts:
        sample.label = sample.label if label is None else label
    parent = Parent(path="../../dataset", digest=real.contract.digest)
    return opened(run.synthetic / "made", {"train": parts}, parent=parent, origin="synthetic")


@pytest.mark.parametrize("split", ["validation", "test", "external_other"])
def test_a_synthetic_image_that_is_a_held_out_one_stops_the_run(run, split):
    real = opened(run.dataset, splits())
    held_out = tiny_samples(split, COUNTS[split])
    made = synthetic(run, real, lambda parent, index: held_out[index].image if index == 2 else parent.image // 2)
    message = rf"identical images in both datasets: {split}-0002 \({split}\) and made-0002 \(train of .*made\)"
    with pytest.raises(MaskLoomError, match=message):
        require_no_leaks(run, [real, made])


def test_a_synthetic_copy_of_a_training_image_is_a_finding_of_the_metrics_and_no_leak(run, monkeypatch):
    real = opened(run.dataset, splits())
    made = synthetic(run, real, lambda parent, index: parent.image)
    require_no_leaks(run, [real, made])
    monkeypatch.setattr(leaks, "_failures", not_again)
    require_no_leaks(run, [real, made])
    with pytest.raises(AssertionError):
        require_no_leaks(run, [real])  # another question, with a record of its own


def test_only_the_first_process_compares(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    require_no_leaks(run, [planted(run, same_image("train", "test"))])
    assert records(run) == []


def test_an_image_that_cannot_be_decoded(run):
    parts = splits()
    parts["train"][2].image = b"no PNG"
    with pytest.raises(
        MaskLoomError, match=r"sample train-0002: its image cannot be decoded .*; write the dataset again"
    ):
        require_no_leaks(run, [opened(run.dataset, parts)])


def test_a_disk_without_space_for_the_comparison_is_one_line(run, monkeypatch):
    monkeypatch.setattr(leaks, "SCHEMA", f"PRAGMA max_page_count = 4; {leaks.SCHEMA}")
    dataset = opened(run.dataset, {"train": tiny_samples("train", 200, 16)})
    with pytest.raises(
        MaskLoomError, match=r"images cannot be compared \(database or disk is full\); free space there"
    ):
        require_no_leaks(run, [dataset])


NEAR = {"near_duplicates": {"method": "as prepare", "correlation": 0.55}}


def near_copy(parts):
    for split, samples in parts.items():
        for index, sample in enumerate(samples):
            sample.image = picture([sum(map(ord, split)), index], 32, 32)
    parts["test"][1].image = darker(parts["train"][1].image)


def test_near_duplicates_stop_the_run_where_groups_were_meant_to_catch_them(run, monkeypatch):
    asked = planted(run, near_copy, preprocessing=NEAR)
    with pytest.raises(
        LeakedImages,
        match=r"1 pair\(s\) of .*near-duplicates in two splits: train-0001 \(train\) and test-0001 \(test\); near-dup.*raw images",
    ):
        require_no_leaks(run, [asked])
    monkeypatch.setattr(leaks, "NEAR_LIMIT", 17)
    require_no_leaks(run, [asked])  # too large to look unasked
    require_no_leaks(run, [planted(run, near_copy)])  # no groups were meant to catch them


def test_memory_does_not_grow_with_the_dataset(run):
    def peak(count):
        dataset = opened(run.dataset, {"train": tiny_samples("train", count, 64)})
        tracemalloc.start()
        leaks._failures([dataset])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(70)  # imports
    assert peak(640) < 1.2 * peak(160)


def test_where_the_audit_itself_fails_its_message_is_passed_on(run):
    dataset = planted(run, near_copy, preprocessing=NEAR)
    shard = next((run.dataset / "data").glob("train-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(MaskLoomError, match=r"train-.*parquet") as error:
        leaks._near_duplicates(dataset)
    assert not isinstance(error.value, LeakedImages)


def test_every_leak_is_listed_with_the_raw_files(run):
    def leak(parts):
        for number in range(4):
            same_image("test", "train", number)(parts)

    asked = planted(run, leak)
    write_sample_files(run.dataset, [(f"train-{number:04d}", f"raw/{number}.png") for number in range(4)])
    with pytest.raises(LeakedImages, match=r"4 pair\(s\).*files: train-000(\d) is raw/\1\.png"):
        require_no_leaks(run, [asked])
    (listed,) = run.logs("audit").glob("*-leaked.jsonl")
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["shows_file"] for row in rows] == [f"raw/{row['shows'][-1]}.png" for row in rows]
    assert len(rows) == 4 and {row["image_file"] for row in rows} == {None}
