"""Names that look alike count as one; what a screen cannot show is escaped.

What file managers leave behind is ignored.
"""

import json
import os
import unicodedata

import pytest

from maskloom.data_prep.adapter import Reject
from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.readers.file_names import (
    as_seen,
    canonical,
    comparable,
    entry_named,
    folder_named,
    is_system_name,
    is_text,
    is_visible,
    printable,
)
from maskloom.pipeline.errors import MaskLoomError
from tests.data_prep.experiment import experiment
from tests.writers import busi

NFC, NFD = "Bénin", unicodedata.normalize("NFD", "Bénin")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NFC, NFD),
        ("a b", "a\u00a0b"),
        ("a b", "a\u2009b"),
        ("ab", "a\u200fb"),
        ("ab", "a\u200bb"),
        ("ab", "\ufeffab"),
        ("ab", "a\x07b"),
    ],
)
def test_names_that_look_the_same(one, other):
    assert (
        as_seen(one) == as_seen(other) and canonical(one) == canonical(other) and comparable(one) == comparable(other)
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Images", "images"),
        ("a.PNG", "a.png"),
        ("a  b", " a b "),
        ("a .png", "a.png"),
        ("x / a.png", "x/a.png"),
        ("STRASSE", "straße"),
        (NFC.upper(), NFD),
    ],
)
def test_names_that_differ_in_case_or_spaces_are_comparable_but_do_not_look_the_same(one, other):
    assert comparable(one) == comparable(other) and as_seen(one) != as_seen(other)


@pytest.mark.parametrize(
    ("one", "other"), [("a", "b"), ("Müller", "Moller"), ("a_b", "a b"), ("a-b", "a b"), ("²", "2")]
)
def test_other_names_are_not_comparable(one, other):
    assert comparable(one) != comparable(other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("benign (1).png", "benign (1).png"),
        ("日本 é", "日本 é"),
        ("a\udcffb", "a\\xffb"),
        ("a\ud800b", "a\\ud800b"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("a\u00a0b\u200f", "a\\xa0b\\u200f"),
    ],
)
def test_what_cannot_be_shown_is_escaped(text, expected):
    assert printable(text) == expected and printable(text).isprintable() and is_text(printable(text))


def test_rejects_are_printable():
    reject = Reject("raw/\udcff\n.png", "\udcff\n.png cannot be decoded")
    assert (reject.path, reject.reason) == ("raw/\\xff\\n.png", "\\xff\\n.png cannot be decoded")
    json.dumps([reject.path, reject.reason], ensure_ascii=False).encode()


@pytest.mark.parametrize("name", [".DS_Store", "._a.png", "Thumbs.db", "thumbs.DB", "__MACOSX", "desktop.ini"])
def test_what_file_managers_leave_behind_is_no_data(name, tmp_path):
    assert is_system_name(name) and not is_visible(tmp_path / name / "a.png", tmp_path)
    assert not is_system_name("a.png") and is_visible(tmp_path / "a.png", tmp_path)


def test_an_entry_is_found_by_how_its_name_looks(tmp_path):
    (tmp_path / NFD.upper()).mkdir()
    (tmp_path / ".hidden").mkdir()
    assert entry_named(tmp_path, NFC) == tmp_path / NFD.upper()
    assert entry_named(tmp_path, "none") is None and entry_named(tmp_path, ".hidden") is None
    assert entry_named(tmp_path / "nowhere", "a") is None
    assert folder_named(tmp_path, "none") == tmp_path / "none"
    (tmp_path / NFC).mkdir()
    with pytest.raises(MaskLoomError, match=r"'BE\\u0301NIN' and 'B\\xe9nin' count as one name"):
        entry_named(tmp_path, NFC)


def test_hidden_files_do_not_change_the_fingerprint(tmp_path):
    busi.write_raw(tmp_path)
    adapter = busi_adapter(tmp_path)
    before = adapter.fingerprint()
    for name in (".DS_Store", "__MACOSX/._a.png", "Thumbs.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert adapter.fingerprint() == before


@pytest.mark.parametrize("small", [True, False])
def test_other_content_of_the_same_size_and_time_changes_the_fingerprint(tmp_path, monkeypatch, small):
    """As in two deliveries that are unpacked from archives with fixed times; large folders are not read for it."""
    busi.write_raw(tmp_path)
    if not small:
        monkeypatch.setattr("maskloom.data_prep.adapter.SMALL_FOLDER", 100)
    before, file = busi_adapter(tmp_path).fingerprint(), next(tmp_path.rglob("*.png"))
    content, stat = file.read_bytes(), file.stat()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (busi_adapter(tmp_path).fingerprint() != before) == small


def busi_adapter(raw):
    from maskloom.data_prep.datasets.busi import Adapter

    return Adapter(raw, Adapter.Options())


def test_a_raw_folder_whose_name_is_no_text_is_refused(tmp_path):
    raw = tmp_path / os.fsdecode(b"\xff")
    raw.mkdir()
    with pytest.raises(MaskLoomError, match=r"data\.raw_dir=.*\\xff: a name in it is not valid UTF-8; rename it"):
        busi_adapter(raw)


def test_a_file_whose_name_is_no_text_is_listed_and_the_rest_is_prepared(tmp_path):
    raw = tmp_path / "raw\u00a0data"
    raw.mkdir()
    busi.write_raw(raw)
    folder = raw / busi.ROOT / "benign"
    for end in (".png", "_mask.png"):
        (folder / f"benign (1){end}").rename(folder / os.fsdecode(b"benign \xff(1)" + end.encode()))
    (folder / "benign (2).png").rename(folder / "benign\n(2).png")
    prepare(experiment(tmp_path / "run", raw_dir=raw), force=False)
    ledger = (tmp_path / "run" / "dataset" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    told = {row["path"]: row["reason"] for row in map(json.loads, ledger)}
    start = f"{busi.ROOT}/benign/benign"
    assert told == {f"{start} \\xff(1).png": "its name is not valid UTF-8; rename it"}  # a line break is a space
