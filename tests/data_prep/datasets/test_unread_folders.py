"""Where only the files of a folder are read, a folder in it is a reject: what lies there is not
left out silently.
"""

import importlib
import shutil
from pathlib import Path

import pytest

from maskloom.data_prep.adapter import Reject, unread_folders
from maskloom.data_prep.sources import open_adapter
from tests.data_prep.experiment import experiment
from tests.writers import lidc


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("bci", None),
        ("busbra", None),
        ("busi", None),
        ("isic9", None),
        ("lidc", lidc.write_raw),
        ("lidc", lidc.write_nodule_tree),
        ("udiat", None),
    ],
)
def test_every_folder_of_images_and_masks(name, write, tmp_path):
    (write or importlib.import_module(f"tests.writers.{name}").write_raw)(tmp_path)
    read = {path.parent for path in tmp_path.rglob("*") if path.suffix in (".png", ".npy", ".jpg")}
    for folder in read:
        file = next(path for path in folder.iterdir() if path.is_file())
        (folder / "second reading").mkdir()
        shutil.copy(file, folder / "second reading" / file.name)
    adapter = open_adapter(experiment(Path("unused"), name, tmp_path).data)
    found = {entry.path for entry in adapter.scan() if isinstance(entry, Reject)}
    assert found == {str(folder / "second reading") for folder in read}


def test_empty_hidden_and_missing_folders_are_nothing(tmp_path):
    for name in ("empty", ".hidden", "read"):
        (tmp_path / name).mkdir()
    (tmp_path / ".hidden" / "x").touch()
    (tmp_path / "read" / "x").touch()
    assert list(unread_folders(tmp_path, ("read",))) == list(unread_folders(tmp_path / "nowhere")) == []
