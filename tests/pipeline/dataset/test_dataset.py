"""A mask-and-prompt dataset read back: its shards in order, its rows, its ids, one split, and
whether it was changed.
"""

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError

from maskloom.pipeline.dataset.contract import LEDGER_FILE, read_contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.writer import DatasetWriter, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from tests.tiny_datasets import tiny_description, tiny_samples

# A split's name that another one starts with: neither may read the other's shards.
COUNTS = {"train": 10, "test": 4, "external_a": 3, "external_a_b": 2}
SAMPLES = {split: tiny_samples(split, count) for split, count in COUNTS.items()}


@pytest.fixture
def dataset(tmp_path: Path) -> MaskPromptDataset:
    """Four splits in shards of at most four rows."""
    shards = plan_shards(COUNTS, 4)
    writer = DatasetWriter(tmp_path / "dataset", tiny_description(), shards, "key")
    writer.prepare_folder()
    for shard in shards:
        writer.write_shard(shard, SAMPLES[shard.split][shard.start : shard.stop])
    writer.finish("# card\n", [], "hash", None)
    return MaskPromptDataset.open(tmp_path / "dataset")


def names(dataset: MaskPromptDataset, split: str | None) -> list[str]:
    return [shard.relative_to(dataset.folder).as_posix() for shard in dataset.shards(split)]


def test_it_is_the_folder_and_its_contract(dataset: MaskPromptDataset):
    contract = read_contract(dataset.folder)
    assert dataset == MaskPromptDataset(dataset.folder, contract)
    assert (dataset.description, dataset.digest) == (tiny_description(), contract.digest)
    assert dataset.num_rows == sum(COUNTS.values())
    with pytest.raises(FrozenInstanceError):
        dataset.folder = Path("elsewhere")  # type: ignore[misc]


def test_no_such_dataset(tmp_path: Path):
    with pytest.raises(MaskLoomError, match="no such dataset; run `maskloom prepare` first"):
        MaskPromptDataset.open(tmp_path / "nowhere")


def test_shards_are_those_of_the_split_in_the_order_of_their_rows(dataset: MaskPromptDataset):
    train = [f"data/train-0000{number}-of-00003.parquet" for number in range(3)]
    assert names(dataset, "train") == train
    assert names(dataset, "external_a") == ["data/external_a-00000-of-00001.parquet"]
    assert names(dataset, "validation") == []
    assert sorted(names(dataset, None)) == sorted(name for split in COUNTS for name in names(dataset, split))
    assert all(shard.is_file() for shard in dataset.shards())


def test_rows_are_as_they_are_stored(dataset: MaskPromptDataset):
    for split, samples in SAMPLES.items():
        rows = list(dataset.rows(split))
        assert [row["sample_id"] for row in rows] == [sample.sample_id for sample in samples]
        for row, sample in zip(rows, samples, strict=True):
            assert (row["text"], row["label"], row["group_id"]) == (sample.text, sample.label, sample.group_id)
            assert np.array_equal(png_array(row["image"]["bytes"]), sample.image)
            assert np.array_equal(png_array(row["mask"]["bytes"]), sample.mask)


def test_only_the_columns_that_are_asked_for_are_read(dataset: MaskPromptDataset):
    assert next(dataset.rows("test", ["label", "mask.path"])) == {"label": 0, "mask": {"path": None}}
    assert list(dataset.rows("validation", ["label"])) == []


def test_without_a_split_all_rows_are_read(dataset: MaskPromptDataset):
    found = [row["sample_id"] for row in dataset.rows(columns=["sample_id"])]
    assert sorted(found) == sorted(sample.sample_id for samples in SAMPLES.values() for sample in samples)


def test_ids_by_split(dataset: MaskPromptDataset):
    wanted = {split: [(one.sample_id, one.group_id) for one in samples] for split, samples in SAMPLES.items()}
    assert dataset.ids() == wanted
    assert dataset.ids("external_a") == {"external_a": wanted["external_a"]}
    assert dataset.ids("validation") == {}


def test_a_split_decodes_its_pictures_on_access(dataset: MaskPromptDataset):
    rows = dataset.split("train")
    assert len(rows) == 10 and rows[0]["image"].size == (32, 32)
    assert rows["sample_id"][:] == [sample.sample_id for sample in SAMPLES["train"]]
    assert rows.features["label"].names == ["disc", "square"]


def test_an_empty_split(dataset: MaskPromptDataset):
    with pytest.raises(
        MaskLoomError,
        match=r"dataset: the split 'validation' is empty; it has external_a, external_a_b, test, train$",
    ):
        dataset.split("validation")


def test_a_split_whose_memory_mapped_copy_cannot_be_made(dataset: MaskPromptDataset, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise DatasetGenerationError("An error occurred") from OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(MaskLoomError, match=r"'test' cannot be opened \(.*No space left.*\); free space .*HF_HOME"):
        dataset.split("test")


@pytest.mark.parametrize("name", [LEDGER_FILE, "README.md", "data/test-00000-of-00001.parquet"])
@pytest.mark.parametrize("change", ["edited", "missing"])
def test_a_file_that_was_changed_is_named(dataset: MaskPromptDataset, name: str, change: str):
    assert dataset.changed_file() is None
    path = dataset.folder / name
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b" ")
    assert dataset.changed_file() == name


def test_files_that_the_contract_does_not_list_are_not_read(dataset: MaskPromptDataset):
    stranger = dataset.folder / "data/test-00001-of-00002.parquet"
    pq.write_table(pq.read_table(dataset.shards("test")[0]), stranger)
    assert stranger not in dataset.shards()
    assert len(list(dataset.rows("test", ["label"]))) == COUNTS["test"]
