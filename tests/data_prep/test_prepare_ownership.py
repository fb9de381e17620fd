"""What `prepare` deletes, keeps and refuses of a run folder."""

import pytest

from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder
from tests.data_prep.experiment import experiment
from tests.writers.busi import write_raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder)
    return folder


def _tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


@pytest.mark.parametrize("force", [False, True])
def test_the_users_files_in_every_folder_stay(raw, tmp_path, force):
    prepare(experiment(tmp_path, raw_dir=raw), force=False)
    mine = [
        "notes",
        "dataset/data/notes",
        "logs/prepare/notes",
        ".prepare/part-1.bin",
        ".prepare/sub/part-000001.jsonl",
    ]
    _put(tmp_path, *mine)
    prepare(experiment(tmp_path, raw_dir=raw, conditioning="edges"), force)
    tree = _tree(tmp_path)
    assert all(tree[name] == b"mine" for name in mine)
    assert sorted(name for name in tree if name.startswith(".prepare")) == sorted(mine[3:])
    verify_quickly(tmp_path / "dataset")


@pytest.mark.parametrize("kind", ["a stranger's place of writing", "a damaged manifest"])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_in_the_way_is_told_before_anything_is_read(raw, tmp_path, kind, force):
    prepare(experiment(tmp_path, raw_dir=raw), force=False)
    OwnedFolder(tmp_path / ".prepare" / "old").claim()
    if kind == "a damaged manifest":
        (tmp_path / "dataset" / MANIFEST).write_text("{}")
    else:
        _put(tmp_path, ".dataset.unfinished/notes")
    before = _tree(tmp_path)
    with pytest.raises(MaskLoomError, match=r"\.dataset\.unfinished: holds files|dataset/\.maskloom\.json: .*move the"):
        prepare(experiment(tmp_path, raw_dir=raw, conditioning="edges"), force)
    assert _tree(tmp_path) == before


def test_a_shard_of_the_users_in_a_dataset_is_named_with_its_remedy(raw, tmp_path):
    prepare(experiment(tmp_path, raw_dir=raw), force=False)
    _put(tmp_path, "dataset/data/mine.parquet")
    with pytest.raises(MaskLoomError, match=r"data/mine\.parquet: not listed in contract\.json, .*; move it away$"):
        verify_quickly(tmp_path / "dataset")
