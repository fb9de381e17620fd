"""Only regular files of the kind that their name says leave this machine."""

import os
from pathlib import Path

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.hub.files import check_pushed_file, file_text


@pytest.mark.parametrize("name", ["id_rsa", ".env", "weights.bin", "notes.txt", "planted.py"])
def test_other_kinds_never_go(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(MaskLoomError, match="a kind of file that is never pushed"):
        check_pushed_file(tmp_path / name, tmp_path)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "samples.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("samples.png", "folder.png"):
        with pytest.raises(MaskLoomError, match="no regular file"):
            check_pushed_file(tmp_path / name, tmp_path)


def test_a_file_behind_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/unet").symlink_to(tmp_path / "out")
    with pytest.raises(MaskLoomError, match=r"lies outside .*home, behind a link"):
        check_pushed_file(tmp_path / "home/unet/config.json", tmp_path / "home")
    check_pushed_file(tmp_path / "home/unet/config.json", tmp_path)


def test_a_damaged_shard(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MaskLoomError, match=r"a\.parquet: damaged, or no \.parquet file at all"):
        check_pushed_file(tmp_path / "a.parquet", tmp_path)


def test_a_card_with_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"a\0b")
    with pytest.raises(MaskLoomError, match="no text"):
        check_pushed_file(tmp_path / "README.md", tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"short")
    with pytest.raises(MaskLoomError, match="damaged weights"):
        file_text(tmp_path / "a.safetensors")
