"""What the program may delete or overwrite, and whether a file is what was written."""

import json
from pathlib import Path

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import remove_leftovers
from maskloom.pipeline.files.ownership import (
    MANIFEST,
    OwnedFolder,
    check_places,
    delete_folder,
    file_problem,
    foreign_files,
    put_in_place,
    restore_outgoing,
    whole_folder,
)


def _owned(path, **files):
    folder = OwnedFolder(path)
    folder.claim()
    for name, text in files.items():
        folder.write_text(name.replace("__", "/"), text)
    return folder


def _tree(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_a_folder_lists_what_was_written_to_it(tmp_path):
    folder = _owned(tmp_path / "a", x="1", sub__y="2")
    assert set(folder.files()) == {"x", "sub/y"}
    assert folder.problem("x") is None
    assert folder.problem("nothing") == f"{tmp_path / 'a' / 'nothing'}: not a file that MaskLoom wrote"
    (tmp_path / "a" / "x").write_text("3")
    assert folder.problem("x") == f"{tmp_path / 'a' / 'x'}: changed since it was written"
    (tmp_path / "a" / "x").unlink()
    assert folder.problem("x") == f"{tmp_path / 'a' / 'x'}: missing"


def test_only_a_missing_empty_or_marked_folder_is_claimed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    _owned(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "scan.png").write_text("raw")
    with pytest.raises(MaskLoomError, match=r"full: holds files that MaskLoom did not write \(scan\.png\)"):
        OwnedFolder(tmp_path / "full").claim()
    assert _tree(tmp_path / "full") == {"scan.png": b"raw"}
    (tmp_path / "file").touch()
    with pytest.raises(MaskLoomError, match=r"file: not a folder"):
        OwnedFolder(tmp_path / "file").claim()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MaskLoomError, match=r"link: not a folder"):
        OwnedFolder(tmp_path / "link").claim()


def test_a_file_that_it_did_not_write_is_never_overwritten(tmp_path):
    folder = _owned(tmp_path / "a", x="1")
    (tmp_path / "a" / "mine").write_text("mine")
    with pytest.raises(MaskLoomError, match=r"mine: in the way, and MaskLoom did not write it"):
        folder.write_text("mine", "theirs")
    (tmp_path / "a" / "broken").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MaskLoomError, match=r"broken: in the way"):
        folder.write_text("broken", "theirs")
    assert (tmp_path / "a" / "mine").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()
    folder.write_text("x", "2")
    assert (tmp_path / "a" / "x").read_text() == "2"


def test_clearing_leaves_what_it_did_not_write(tmp_path):
    folder = _owned(tmp_path / "a", x="1", data__y="2", other__z="3")
    (tmp_path / "a" / "data" / "mine").write_text("mine")
    folder.clear("data")
    assert set(folder.files()) == {"x", "other/z"}
    folder.clear()
    assert set(_tree(tmp_path / "a")) == {MANIFEST, "data/mine"}
    folder.delete()
    assert set(_tree(tmp_path / "a")) == {MANIFEST, "data/mine"}
    folder.claim()


def test_a_folder_without_the_users_files_goes_whole(tmp_path):
    _owned(tmp_path / "a", x="1", data__y="2")
    delete_folder(tmp_path / "a")
    delete_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_marked_is_not_deleted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    with pytest.raises(MaskLoomError, match="did not write"):
        delete_folder(tmp_path / "a")
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_processes_that_write_side_by_side_keep_a_list_each(tmp_path):
    _owned(tmp_path / "a", x="1")
    OwnedFolder(tmp_path / "a", process=1).write_text("y", "2")
    main = OwnedFolder(tmp_path / "a")
    assert set(main.files()) == {"x", "y"}
    OwnedFolder(tmp_path / "a", process=2).write_text("y", "3")
    assert main.problem("y") is None
    main.remove(["y"])
    assert set(main.files()) == {"x"}
    assert not (tmp_path / "a" / "y").exists()


def test_a_failed_writing_leaves_the_old_file_and_its_digest(tmp_path):
    folder = _owned(tmp_path / "a", x="1")

    def fail() -> None:
        with folder.writing("x") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert folder.problem("x") is None
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_a_file_is_listed_before_it_takes_its_name(tmp_path, monkeypatch):
    folder = _owned(tmp_path / "a")
    monkeypatch.setattr("pathlib.Path.replace", _refuse_for("x"))
    with pytest.raises(OSError, match="killed"):
        folder.write_text("x", "1")
    monkeypatch.undo()
    assert folder.problem("x") == f"{tmp_path / 'a' / 'x'}: missing"


def _refuse_for(name):
    from pathlib import Path

    replace = Path.replace

    def refusing(self, target):
        if Path(target).name == name:
            raise OSError("killed")
        return replace(self, target)

    return refusing


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"maskloom": "0", "files": {"x": "1"}, "digest": "0"}',
        '{"maskloom": "0", "files": {"../x": "1"}, "digest": "0"}',
        '{"maskloom": "0", "files": {"/x": "1"}, "digest": "0"}',
        '{"maskloom": "0", "files": {"": "1"}, "digest": "0"}',
        '{"maskloom": "0", "files": {"x": 1}, "digest": "0"}',
        '{"files": {}}',
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    folder = _owned(tmp_path / "a", x="1")
    (tmp_path / "a" / MANIFEST).write_text(content)
    with pytest.raises(MaskLoomError, match=r"\.maskloom\.json: .*move the folder away"):
        folder.files()


def test_a_changed_entry_of_a_manifest_is_noticed(tmp_path):
    folder = _owned(tmp_path / "a", x="1")
    path = tmp_path / "a" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["y"] = "0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(MaskLoomError, match="changed since it was written"):
        folder.files()


def test_a_whole_folder_takes_the_place_of_an_older_one_and_keeps_the_users_files(tmp_path):
    for text in ("one", "two"):
        with whole_folder(tmp_path / "model") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "w").write_text(text)
            (temporary / text).touch()
        if text == "one":
            (tmp_path / "model" / "sub" / "notes").write_text("mine")
    found = _tree(tmp_path / "model")
    assert found.pop(MANIFEST)
    assert found == {"sub/w": b"two", "two": b"", "sub/notes": b"mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert set(OwnedFolder(tmp_path / "model").files()) == {"sub/w", "two"}
    assert foreign_files(tmp_path / "model") == ["sub/notes"]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with whole_folder(tmp_path / "model") as temporary:
        (temporary / "w").write_text("old")

    def fail() -> None:
        with whole_folder(tmp_path / "model") as temporary:
            (temporary / "w").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "model" / "w").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_an_interrupted_folder_left_is_cleared_away(tmp_path):
    (tmp_path / ".model.maskloom-tmp").mkdir()
    (tmp_path / ".model.maskloom-tmp" / "stray").touch()
    with whole_folder(tmp_path / "model") as temporary:
        (temporary / "w").touch()
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [MANIFEST, "w"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_folder_takes_its_name_loses_nothing(tmp_path, monkeypatch, renames):
    """The renames: the old folder away, the new one in its place, the user's file over."""
    _owned(tmp_path / "model", w="old")
    (tmp_path / "model" / "notes").write_text("mine")
    rename, done = Path.rename, []

    def killed(self, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(self)
        return rename(self, target)

    def write(text: str) -> None:
        with whole_folder(tmp_path / "model") as temporary:
            (temporary / "w").write_text(text)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    monkeypatch.undo()
    remove_leftovers(tmp_path)  # as the next training does
    write("newer")
    found = _tree(tmp_path / "model")
    assert found.pop(MANIFEST) and found == {"w": b"newer", "notes": b"mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_was_moved_out_of_the_way_gets_its_name_back(tmp_path):
    _owned(tmp_path / ".model.maskloom-old", w="old")
    restore_outgoing(tmp_path / "model")
    assert OwnedFolder(tmp_path / "model").problem("w") is None
    restore_outgoing(tmp_path / "model")
    _owned(tmp_path / ".model.maskloom-old")
    (tmp_path / ".model.maskloom-old" / "w").write_text("mine")
    with pytest.raises(
        MaskLoomError, match=r"maskloom-old/w: your file, and .*model/w has the same name; move it away"
    ):
        restore_outgoing(tmp_path / "model")


@pytest.mark.parametrize("kind", ["file", "link to nowhere"])
def test_no_folder_takes_the_name_of_a_file(tmp_path, kind):
    _owned(tmp_path / "new", w="1")
    if kind == "file":
        (tmp_path / "checkpoint-4").write_text("mine")
    else:
        (tmp_path / "checkpoint-4").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MaskLoomError, match=r"checkpoint-4: (not a folder|a link)"):
        put_in_place(tmp_path / "new", tmp_path / "checkpoint-4")


def test_a_folder_of_the_program_that_the_user_puts_into_another_moves_over_whole(tmp_path):
    _owned(tmp_path / "model", w="old")
    _owned(tmp_path / "model" / "kept", w="copied")
    assert foreign_files(tmp_path / "model") == ["kept/.maskloom.json", "kept/w"]
    with whole_folder(tmp_path / "model") as temporary:
        (temporary / "w").write_text("new")
    assert OwnedFolder(tmp_path / "model" / "kept").problem("w") is None


def test_of_several_digests_the_one_that_the_file_has_counts(tmp_path):
    for process, text in enumerate("bca"):
        folder = OwnedFolder(tmp_path / "a", process)
        folder.mark()
        folder.write_text("x", text)
    assert file_problem(tmp_path / "a" / "x", OwnedFolder(tmp_path / "a").digests()["x"]) is None


@pytest.mark.parametrize("kind", ["strangers", "link", "clash"])
def test_a_folder_of_the_users_is_not_replaced(tmp_path, kind):
    if kind == "strangers":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "w").write_text("mine")
    elif kind == "link":
        _owned(tmp_path / "elsewhere", w="mine")
        (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    else:
        _owned(tmp_path / "model")
        (tmp_path / "model" / "w").write_text("mine")

    def write() -> None:
        with whole_folder(tmp_path / "model") as temporary:
            (temporary / "w").write_text("new")

    with pytest.raises(MaskLoomError, match=r"model.*(did not write|a link)"):
        write()
    assert (tmp_path / "model" / "w").read_text() == "mine"


def test_a_file_has_one_of_its_known_digests(tmp_path):
    folder = _owned(tmp_path / "a", x="1")
    digest = folder.digests()["x"]
    assert file_problem(tmp_path / "a" / "x", digest) is None
    assert file_problem(tmp_path / "a" / "x", frozenset({"0", digest})) is None
    assert file_problem(tmp_path / "a" / "x", "0") is not None


@pytest.mark.parametrize(
    ("given", "output", "relation"),
    [
        ("run", "run", "is"),
        ("run", "run/out", "holds"),
        ("run/out/raw", "run/out", "lies in"),
        ("link", "run/out", "holds"),
    ],
)
def test_inputs_and_outputs_lie_apart(tmp_path, given, output, relation):
    (tmp_path / "run" / "out" / "raw").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(MaskLoomError, match=rf"^data\.raw_dir={tmp_path / given}: {relation} {tmp_path / output}, "):
        check_places({"data.raw_dir": tmp_path / given}, [tmp_path / output])
    check_places({"data.raw_dir": tmp_path / "run" / "other", "none": None}, [tmp_path / "run" / "out"])
