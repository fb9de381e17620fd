"""Files that are whole or absent, digests, and image codecs."""

import json
import os

import numpy as np
import pytest
from PIL import UnidentifiedImageError

from maskloom.pipeline.dataset.images import png_array, png_bytes
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files import atomic as files
from maskloom.pipeline.files.atomic import (
    atomic_path,
    content_digest,
    file_digest,
    folder_digest,
    link_or_copy,
    model_digest,
    read_json,
    remove_leftovers,
    value_digest,
    write_json,
    write_text,
)


def test_a_file_appears_whole(tmp_path):
    with atomic_path(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("half")
        assert not (tmp_path / "deep" / "a.txt").exists()
        temporary.write_text("whole")
    assert (tmp_path / "deep" / "a.txt").read_text() == "whole"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_a_file_is_flushed_unless_it_can_be_made_again(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("maskloom.pipeline.files.atomic.flush_files", flushed.extend)
    for flush in (True, False):
        with atomic_path(tmp_path / "a.txt", flush) as temporary:
            temporary.write_text(str(flush))
        assert (tmp_path / "a.txt").read_text() == str(flush) and len(flushed) == 1


def _write_and_fail(path):
    path.write_text("new")
    raise RuntimeError


def test_a_failed_writing_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as temporary:
        _write_and_fail(temporary)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_json_has_the_same_bytes_for_the_same_value(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "ä"})
    write_json(tmp_path / "b.json", {"a": "ä", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "a.json", "") == {"a": "ä", "b": 1}


def test_a_missing_json_says_what_to_do(tmp_path):
    with pytest.raises(MaskLoomError, match=r"a\.json: no such file; make it"):
        read_json(tmp_path / "a.json", "make it")


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b""])
def test_a_damaged_json_says_what_to_do(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(MaskLoomError, match=r"a\.json: not valid JSON .*; make it"):
        read_json(tmp_path / "a.json", "make it")


def test_digests_of_values_do_not_depend_on_the_order_of_keys(tmp_path):
    assert value_digest({"a": 1, "b": [tmp_path]}) == value_digest({"b": [tmp_path], "a": 1})
    assert value_digest([1, 2]) != value_digest([2, 1])


def test_digests_of_folders_see_names_and_contents_but_no_hidden_files(tmp_path):
    (tmp_path / "a").write_text("1")
    first = folder_digest(tmp_path)
    (tmp_path / ".cache").write_text("hidden")
    assert folder_digest(tmp_path) == first
    (tmp_path / "a").write_text("2")
    second = folder_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, folder_digest(tmp_path)}) == 3


def test_large_files_are_known_by_the_content_of_every_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PIECE_BYTES", 4)
    path = tmp_path / "large"
    path.write_bytes(b"abcdefghij")
    first = content_digest(path)
    assert first.startswith(files.PIECES)
    assert content_digest(path) == first
    for position in range(10):
        changed = bytearray(b"abcdefghij")
        changed[position] ^= 1
        path.write_bytes(changed)
        assert content_digest(path) != first
    path.write_bytes(b"abcd")
    assert content_digest(path) == file_digest(path)


def test_a_link_or_copy_never_writes_through_an_older_link(tmp_path):
    for name in ("source", "other"):
        (tmp_path / name).write_text(name)
    os.link(tmp_path / "other", tmp_path / "target")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "other").read_text() == "other"
    assert (tmp_path / "target").read_text() == "source"


def test_leftovers_are_the_programs_own_temporary_files_only(tmp_path):
    (tmp_path / ".notes.tmp").write_text("the user's")
    (tmp_path / f".a.1{files.TEMPORARY_SUFFIX}").mkdir()
    (tmp_path / f".b.1{files.TEMPORARY_SUFFIX}").touch()
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".notes.tmp"]


def test_models_are_known_by_content_or_by_hub_id(tmp_path):
    (tmp_path / "w.safetensors").write_text("1")
    first = model_digest(str(tmp_path))
    (tmp_path / "README.md").write_text("a card says nothing about the weights")
    assert model_digest(str(tmp_path)) == first
    (tmp_path / "config.json").write_text("{}")
    assert model_digest(str(tmp_path)) != first
    assert model_digest("org/name") == "org/name@main"
    assert model_digest("org/name", "v1") == "org/name@v1"


def test_the_digest_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert file_digest(tmp_path / "a").startswith("e3b0c44298fc1c149afbf4c8996fb924")


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_keeps_every_pixel(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(png_array(png_bytes(array)), array)
    assert png_bytes(array) == png_bytes(array.copy())


def test_what_is_no_png_is_an_error():
    with pytest.raises(UnidentifiedImageError):
        png_array(b"no")


def test_written_json_is_valid_json(tmp_path):
    write_json(tmp_path / "a.json", [1.5, None, "x"])
    assert json.loads((tmp_path / "a.json").read_text()) == [1.5, None, "x"]
