"""Files that the user names: nothing of the user's is replaced, nothing is written into a dataset
or a run.
"""

import json
import re

import pytest

from maskloom.data_prep.__main__ import main as data_prep
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.command import EXIT_CODE
from maskloom.pipeline.runs.named_files import NamedFile, named_file


def test_only_its_own_earlier_file_is_replaced(tmp_path):
    for value in (1, 2):
        NamedFile("--json", tmp_path / "new" / "found.json", "plan").write_json({"figure": value})
    found = json.loads((tmp_path / "new" / "found.json").read_text())
    assert re.fullmatch(r"written by MaskLoom: plan \(content [0-9a-f]{16}\)", found.pop("about"))
    assert found == {"figure": 2}
    with pytest.raises(MaskLoomError, match=r"--json .*found\.json: exists, and is not an earlier audit"):
        NamedFile("--json", tmp_path / "new" / "found.json", "audit").write_json({})
    for text in ("<p>1</p>", "<p>2</p>"):
        NamedFile("--contact-sheet", tmp_path / "sheet.html", "contact sheet").write_page(text)
    assert (tmp_path / "sheet.html").read_text().startswith("<p>2</p>")


@pytest.mark.parametrize("edit", ["changed", "without its digest"])
@pytest.mark.parametrize("kind", ["json", "list", "yaml", "page"])
def test_what_the_user_has_edited_is_kept(tmp_path, kind, edit):
    file = NamedFile("--yaml", tmp_path / "mine", "plan")
    write = {
        "json": lambda: file.write_json({"modality": "TODO"}),
        "list": lambda: file.write_json_list([{"modality": "TODO"}, {"modality": "none"}]),
        "yaml": lambda: file.write_yaml({"modality": "TODO"}),
        "page": lambda: file.write_page("<p>TODO</p>"),
    }[kind]
    write()
    write()
    text = file.path.read_text()
    edited = text.replace("TODO", "MRI") if edit == "changed" else re.sub(r" \(content \w+\)", "", text)
    file.path.write_text(edited)
    with pytest.raises(
        MaskLoomError, match=r"--yaml .*mine: has been edited since MaskLoom wrote it; nothing was changed"
    ):
        write()
    assert file.path.read_text() == edited


@pytest.mark.parametrize("kind", ["file", "folder", "link to nowhere", "link"])
def test_what_is_there_is_refused(tmp_path, kind):
    path = tmp_path / "mine"
    if kind == "file":
        path.write_text('{"mine": 1}')
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
        if kind == "link":
            (tmp_path / "elsewhere").write_text("mine")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(MaskLoomError, match=r"^--json .*mine: exists, .*move it away, or give another file"):
        named_file("--json", path, "plan")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("mark", ["manifest", "contract"])
def test_a_dataset_or_run_is_not_written_to(tmp_path, mark):
    folder = tmp_path / "runs"
    if mark == "manifest":
        OwnedFolder(folder).claim()
    else:
        folder.mkdir()
        (folder / "contract.json").touch()
    (tmp_path / "link").symlink_to(folder)
    for place in (folder / "data" / "found.json", tmp_path / "link" / "found.json"):
        with pytest.raises(MaskLoomError, match=r"--json .*found\.json: lies in .*runs, which MaskLoom manages"):
            named_file("--json", place, "plan")
    assert len(list(folder.iterdir())) == 1
    assert named_file("--json", None, "plan") is None


@pytest.mark.parametrize("option", ["--json", "--contact-sheet"])
def test_verify_refuses_before_it_looks(tmp_path, option, capsys):
    (tmp_path / "thesis.html").write_text("mine")
    with pytest.raises(SystemExit, match=str(EXIT_CODE)):
        data_prep(["verify", str(tmp_path / "no dataset"), option, str(tmp_path / "thesis.html")])
    assert f"{option} {tmp_path / 'thesis.html'}: exists" in capsys.readouterr().err
    assert (tmp_path / "thesis.html").read_text() == "mine"
