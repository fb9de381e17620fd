"""What the documentation names is there: files by their paths, and in the architecture's tables the
functions beside them.
"""

import re
from pathlib import Path
from typing import get_args

import pytest

from maskloom.pipeline.config.generate import SchedulerName

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "src|assets|benchmarks|configs|data_prep|docs|evaluate|generate|models|pipeline|tests|train_backbone|train_baselines|train_controlnet"
PATH = re.compile(rf"(?<![\w/.:-])(?:\.\./)?((?:{FOLDERS})/[\w./*-]*[\w*/])")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
MADE_UP = re.compile(r"NAME|\*")  # stands for a name of the reader's
ROW = re.compile(r"^\| [^|]+ \| [^|]*`([\w/]+\.(?:py|j2|toml))`[^|]* \| (.*) \|$")
FOLDER = re.compile(r"^PACKAGE = \"maskloom\.([\w.]+)\"", re.MULTILINE)  # of plug-ins


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_in_the_documentation_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {match for match in PATH.findall(text) if not MADE_UP.search(match)}
    missing = sorted(path for path in named if not (ROOT / path).exists())
    linked = {link for link in LINK.findall(text) if not link.startswith(("http", "mailto"))}
    assert not missing + sorted(link for link in linked if not (page.parent / link).exists())


def test_every_function_in_the_architecture_lies_where_the_table_says() -> None:
    rows = [ROW.match(line) for line in (ROOT / "docs/architecture.md").read_text(encoding="utf-8").splitlines()]
    found = [row.groups() for row in rows if row and not MADE_UP.search(row[1])]
    assert len(found) > 35
    lost = []
    for path, words in found:
        for name in re.findall(r"`([a-z]\w*_\w+|[A-Z]\w+)`", words):
            files = [path, *re.findall(r"`(\w+/[\w/]+\.py)`", words)]
            texts = [(ROOT / file).read_text(encoding="utf-8") for file in files]
            defined = re.compile(rf"^ *(def |class )?{name}\b *[(:=]", re.MULTILINE)
            lost += [] if any(defined.search(text) for text in texts) else [(path, name)]
    assert lost == []


def test_every_folder_of_plugins_is_where_a_reader_looks_for_it() -> None:
    sources = [path for stage in FOLDERS.split("|") for path in (ROOT / stage).rglob("*.py") if stage != "src"]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    folders = {
        name.replace(".", "/") for text in texts if "load_plugin(PACKAGE" in text for name in FOLDER.findall(text)
    }
    assert len(folders) == 7
    for page in ("docs/architecture.md", "docs/extending.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [folder for folder in sorted(folders) if f"`{folder}/NAME.py`" not in text] == []


def test_every_sampling_scheduler_is_documented() -> None:
    text = (ROOT / "docs/generators.md").read_text(encoding="utf-8")
    assert [name for name in get_args(SchedulerName) if f"`{name}`" not in text] == []
