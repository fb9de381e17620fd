import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Parent, read_contract, summarise_splits
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.dataset.verification import verify_fully, verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import file_digest
from tests.tiny_datasets import synthetic_samples, tiny_description, tiny_samples, write_dataset

TRAIN, TEST = "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"


def png(*shape, value=0):
    return {"bytes": png_bytes(np.full(shape, value, np.uint8)), "path": None}


@pytest.fixture
def folder(tmp_path):
    counts = {"train": 8, "validation": 4, "test": 4, "external_abroad": 2}
    splits = {split: tiny_samples(split, count) for split, count in counts.items()}
    write_dataset(tmp_path / "real", tiny_description(), splits)
    return tmp_path / "real"


@pytest.fixture
def synthetic(folder, tmp_path):
    """A synthetic dataset made from `folder`.

    Calling it writes the dataset with the given parents.
    """

    def write(parents, digest=None):
        samples = synthetic_samples(parents, "made", lambda sample, index: sample.image)
        for sample in samples:
            sample.group_id = "of-" + sample.group_id
        parent = Parent(path="../real", digest=digest or read_contract(folder).digest)
        write_dataset(tmp_path / "synthetic", tiny_description(origin="synthetic"), {"train": samples}, parent)
        return tmp_path / "synthetic"

    return write


def edit_row(folder, change, file=TRAIN, recount=True):
    """Change a row of a shard, and the hashes (and counts) that would give it away: what a careful
    forger would do.
    """
    table = pq.read_table(folder / file)
    rows = table.to_pylist()
    rows[1].update(change)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / file)
    rehash(folder, recount)


def rehash(folder, recount):
    path = folder / CONTRACT_FILE
    contract = json.loads(path.read_text())
    contract["files"] = {name: file_digest(folder / name) for name in contract["files"]}
    if recount:
        ids = MaskPromptDataset.open(folder).ids()
        contract["splits"] = {split: part.model_dump() for split, part in summarise_splits(ids).items()}
    path.write_text(json.dumps(contract))


def test_a_sound_dataset(folder):
    assert verify_fully(folder).contract.splits["train"].rows == 8


def test_a_file_edited_by_hand(folder):
    with (folder / "README.md").open("a") as card:
        card.write("edited")
    with pytest.raises(MaskLoomError, match=r"README\.md: its SHA-256 differs.*write it again with --force"):
        verify_quickly(folder)


def test_a_missing_shard(folder):
    (folder / TEST).unlink()
    with pytest.raises(MaskLoomError, match=r"missing although contract\.json lists it"):
        verify_quickly(folder)


def test_a_published_dataset_comes_without_its_ledger(folder):
    (folder / "rejected.jsonl").unlink()
    assert verify_fully(folder).contract.splits["train"].rows == 8


def test_an_extra_shard(folder):
    (folder / "data" / "train-00009-of-00010.parquet").write_bytes((folder / TEST).read_bytes())
    with pytest.raises(MaskLoomError, match=r"train-00009-of-00010\.parquet: not listed"):
        verify_quickly(folder)


def test_a_path_that_leads_out(folder, tmp_path):
    (tmp_path / "outside.txt").write_text("x")
    path = folder / CONTRACT_FILE
    contract = json.loads(path.read_text())
    contract["files"]["../outside.txt"] = file_digest(tmp_path / "outside.txt")
    path.write_text(json.dumps(contract))
    with pytest.raises(MaskLoomError, match="lies outside the dataset"):
        verify_quickly(folder)


def test_a_link_that_leads_out(folder, tmp_path):
    (folder / "README.md").rename(tmp_path / "outside.md")
    (folder / "README.md").symlink_to(tmp_path / "outside.md")
    with pytest.raises(MaskLoomError, match=r"the file 'README\.md' lies outside the dataset"):
        verify_quickly(folder)


def test_a_shard_that_is_not_parquet(folder):
    (folder / TRAIN).write_bytes(b"not a table")
    rehash(folder, recount=False)
    with pytest.raises(MaskLoomError, match="not a Parquet file"):
        verify_quickly(folder)


def test_a_column_too_few(folder):
    pq.write_table(pq.read_table(folder / TRAIN).drop_columns(["text"]), folder / TRAIN)
    rehash(folder, recount=False)
    with pytest.raises(MaskLoomError, match="are not the contract's"):
        verify_quickly(folder)


def test_a_column_of_another_type(folder):
    table = pq.read_table(folder / TRAIN)
    place = table.column_names.index("label")
    pq.write_table(
        table.set_column(place, "label", table["label"].cast(pa.float64())).replace_schema_metadata(None),
        folder / TRAIN,
    )
    rehash(folder, recount=False)
    with pytest.raises(MaskLoomError, match="are not the contract's"):
        verify_quickly(folder)


def test_an_unknown_split(folder):
    (folder / TEST).rename(folder / "data" / "holdout-00000-of-00001.parquet")
    path = folder / CONTRACT_FILE
    contract = json.loads(path.read_text())
    contract["files"]["data/holdout-00000-of-00001.parquet"] = contract["files"].pop(TEST)
    path.write_text(json.dumps(contract))
    with pytest.raises(MaskLoomError, match="unknown split 'holdout'"):
        verify_quickly(folder)


def test_counts_that_differ(folder):
    edit_row(folder, {"sample_id": "renamed"}, recount=False)
    with pytest.raises(MaskLoomError, match="rows, groups or ids differ"):
        verify_quickly(folder)


def test_a_repeated_id(folder):
    edit_row(folder, {"sample_id": "train-0000"})
    with pytest.raises(MaskLoomError, match="sample_id 'train-0000' occurs 2 times"):
        verify_quickly(folder)


def test_a_group_in_two_splits(folder):
    edit_row(folder, {"group_id": "test-group-0000"})
    with pytest.raises(MaskLoomError, match="group 'test-group-0000' lies in both"):
        verify_quickly(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image": None}, "an image cannot be decoded"),
        ({"image": {"bytes": b"\x89PNG no more", "path": None}}, "an image cannot be decoded"),
        ({"mask": {"bytes": png(32, 32)["bytes"][:48], "path": None}}, "an image cannot be decoded"),
        ({"image": png(16, 32)}, r"image is \(16, 32\) uint8, the contract says \(32, 32\) with 1 channel"),
        ({"image": png(32, 32, 3)}, r"image is \(32, 32, 3\)"),
        ({"conditioning_image": png(32, 32)}, r"conditioning_image is \(32, 32\)"),
        ({"mask": png(32, 16)}, r"mask is \(32, 16\), the image \(32, 32\)"),
        ({"mask": png(32, 32, value=7)}, "mask holds the value 7, the classes end at 1"),
        ({"mask": png(32, 32, value=2)}, "mask holds the value 2, the classes end at 1"),
        ({"label": 5}, "label 5 is not one of 2 labels"),
        ({"label": 2}, "label 2 is not one of 2 labels"),
        ({"label": -1}, "label -1 is not one of 2 labels"),
        ({"text": ""}, "text is empty"),
        ({"origin": "synthetic"}, "origin is 'synthetic', the contract says 'real'"),
    ],
)
def test_a_row_that_breaks_the_contract(folder, change, problem):
    edit_row(folder, change)
    verify_quickly(folder)
    with pytest.raises(MaskLoomError, match=rf"train-00000-of-00001\.parquet: sample train-0001: {problem}"):
        verify_fully(folder)


def test_parents_in_train(synthetic):
    assert verify_fully(synthetic(tiny_samples("train", 4))).contract.parent is not None


@pytest.mark.parametrize("split", ["validation", "test", "external_abroad"])
def test_a_parent_that_is_held_out(synthetic, split):
    with pytest.raises(
        MaskLoomError, match=rf"parent '{split}-0000' lies in the {split} split of .*masks may come from train only"
    ):
        verify_quickly(synthetic(tiny_samples(split, 2)))


def test_a_parent_that_does_not_exist(synthetic):
    with pytest.raises(MaskLoomError, match="parent 'train-0008' is not in"):
        verify_quickly(synthetic(tiny_samples("train", 9)))


def test_a_parent_dataset_that_changed(synthetic):
    with pytest.raises(MaskLoomError, match="made from another version of"):
        verify_quickly(synthetic(tiny_samples("train", 4), digest="another"))


def test_a_parent_dataset_that_is_gone(synthetic, folder):
    made = synthetic(tiny_samples("train", 4))
    folder.rename(folder.with_name("moved"))
    with pytest.raises(MaskLoomError, match="the real dataset that it was made from is not at"):
        verify_quickly(made)
