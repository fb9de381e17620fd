import json

import numpy as np
import pytest
from datasets import ClassLabel, Image, Value, load_dataset
from hypothesis import given
from hypothesis import strategies as st

from maskloom.pipeline.dataset.contract import (
    CONTRACT_FILE,
    LEDGER_FILE,
    SPLITS,
    arrow_schema,
    features,
    read_contract,
)
from maskloom.pipeline.dataset.writer import DatasetWriter, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from tests.tiny_datasets import tiny_description, tiny_samples, write_dataset


@pytest.fixture
def splits():
    return {
        "train": tiny_samples("train", 10),
        "validation": tiny_samples("validation", 4),
        "test": tiny_samples("test", 4),
    }


@pytest.fixture
def folder(tmp_path, splits):
    write_dataset(tmp_path / "dataset", tiny_description(), splits)
    return tmp_path / "dataset"


@given(st.dictionaries(st.sampled_from(SPLITS), st.integers(0, 50)), st.integers(1, 20))
def test_shards_cover_every_row_once(rows, rows_per_shard):
    shards = plan_shards(rows, rows_per_shard)
    for split in SPLITS:
        covered = [row for shard in shards if shard.split == split for row in range(shard.start, shard.stop)]
        assert covered == list(range(rows.get(split, 0)))
    assert all(0 < shard.stop - shard.start <= rows_per_shard and shard.index < shard.of for shard in shards)
    assert len({shard.file for shard in shards}) == len(shards)


def test_rows_come_back_as_they_were(folder, splits):
    rows = load_dataset(str(folder))
    assert {split: len(part) for split, part in rows.items()} == {"train": 10, "validation": 4, "test": 4}
    for split, samples in splits.items():
        for row, sample in zip(rows[split], samples, strict=True):
            np.testing.assert_array_equal(np.asarray(row["image"]), sample.image)
            np.testing.assert_array_equal(np.asarray(row["mask"]), sample.mask)
            np.testing.assert_array_equal(np.asarray(row["conditioning_image"]), sample.conditioning_image)
            for column in (
                "text",
                "label",
                "sample_id",
                "group_id",
                "source",
                "origin",
                "parent_id",
                "generator",
                "seed",
            ):
                assert row[column] == getattr(sample, column)
            assert json.loads(row["attributes"]) == sample.attributes
    assert rows["train"].features["label"].names == ["disc", "square"]


def test_masks_and_labels_may_be_missing(tmp_path):
    samples = tiny_samples("train", 3)
    for sample in samples:
        sample.mask, sample.label = None, None
    write_dataset(tmp_path / "bare", tiny_description(labels=()), {"train": samples})
    rows = load_dataset(str(tmp_path / "bare"))["train"]
    assert all(row["mask"] is None and row["label"] is None for row in rows)


def test_the_digest_is_of_the_content_only(tmp_path, splits):
    one = write_dataset(tmp_path / "one", tiny_description(), splits)
    two = write_dataset(tmp_path / "two", tiny_description(), splits)
    splits["train"][0].text = "something else"
    other = write_dataset(tmp_path / "other", tiny_description(), splits)
    assert one.digest == two.digest != other.digest
    assert read_contract(tmp_path / "one").digest == one.digest
    described = one.model_copy(update={"description": one.description.model_copy(update={"modality": "another"})})
    assert described.digest != one.digest


def test_an_interrupted_writing_goes_on(tmp_path, splits):
    shards = plan_shards({"train": 10}, 4)

    def writer(key):
        made = DatasetWriter(tmp_path / "dataset", tiny_description(), shards, key)
        made.prepare_folder()
        return made

    first = writer("key")
    first.write_shard(shards[0], splits["train"][:4])
    with pytest.raises(MaskLoomError, match=r"dataset: unfinished; run `maskloom prepare` again"):
        read_contract(tmp_path / "dataset")
    assert writer("key").missing_shards() == shards[1:]
    assert writer("another key").missing_shards() == shards


def test_a_shard_that_fails_leaves_no_file(tmp_path, splits):
    shards = plan_shards({"train": 10}, 100)
    writer = DatasetWriter(tmp_path / "dataset", tiny_description(), shards, "key")
    writer.prepare_folder()

    def failing():
        yield from splits["train"][:3]
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="the disk went away"):
        writer.write_shard(shards[0], failing())
    with pytest.raises(ValueError, match="3 samples for 10 rows"):
        writer.write_shard(shards[0], splits["train"][:3])
    assert writer.missing_shards() == shards
    assert not list((writer.staging / "data").iterdir())


def test_the_ledger_is_kept(tmp_path, splits):
    shards = plan_shards({"train": 10}, 100)
    writer = DatasetWriter(tmp_path / "dataset", tiny_description(), shards, "key")
    writer.prepare_folder()
    writer.write_shard(shards[0], splits["train"])
    contract = writer.finish("# card\n", [{"path": "a.png", "reason": "trüb"}], "hash", None)
    assert contract.rejected == 1
    ledger = (tmp_path / "dataset" / LEDGER_FILE).read_text(encoding="utf-8")
    assert json.loads(ledger) == {"path": "a.png", "reason": "trüb"}


def test_no_such_dataset(tmp_path):
    with pytest.raises(MaskLoomError, match="no such dataset; run `maskloom prepare` first"):
        read_contract(tmp_path / "nowhere")
    with pytest.raises(MaskLoomError, match="lora: no such dataset; run `maskloom generate` first"):
        read_contract(tmp_path / "synthetic" / "lora")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(MaskLoomError, match=r"not a mask-and-prompt dataset .*; a raw folder\? Run `maskloom inspect"):
        read_contract(tmp_path)
    (tmp_path / "logs").mkdir()  # a name that raw folders may hold too
    with pytest.raises(MaskLoomError, match="a raw folder"):
        read_contract(tmp_path)


def test_a_folder_of_the_project_without_a_contract(tmp_path):
    OwnedFolder(tmp_path).claim()
    with pytest.raises(MaskLoomError, match="unfinished or not a mask-and-prompt dataset"):
        read_contract(tmp_path)
    (tmp_path / "logs").mkdir()
    with pytest.raises(MaskLoomError, match=rf"a run, not a mask-and-prompt dataset; give {tmp_path}/dataset$"):
        read_contract(tmp_path)


def test_a_run_instead_of_its_dataset(folder, tmp_path):
    folder.rename(tmp_path / "dataset")
    with pytest.raises(MaskLoomError, match=rf"a run, not a mask-and-prompt dataset; give {tmp_path}/dataset$"):
        read_contract(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99, this MaskLoom reads 1"),
        ({"rejected": "many"}, "rejected: Input should be a valid integer.*--force"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
    ],
)
def test_a_contract_that_does_not_fit(folder, change, message):
    path = folder / CONTRACT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MaskLoomError, match=message):
        read_contract(folder)


def test_a_contract_that_is_not_json(folder):
    (folder / CONTRACT_FILE).write_text("{")
    with pytest.raises(MaskLoomError, match=r"contract\.json: not valid JSON.*--force"):
        read_contract(folder)


@pytest.mark.parametrize("labels", [(), ("disc", 'a "quoted" Ünit')])
def test_the_schema_that_is_spelt_out_is_the_one_that_datasets_writes(labels):
    description = tiny_description(labels=labels)
    found, schema = features(description), arrow_schema(description)
    assert schema.equals(found.arrow_schema, check_metadata=True)
    assert found["image"] == found["mask"] == found["conditioning_image"] == Image()
    assert found["label"] == (ClassLabel(names=list(labels)) if labels else Value("int64"))
    assert {name for name, kind in found.items() if kind == Value("int64")} - {"label"} == {"seed"}
