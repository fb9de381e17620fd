"""No file of the package imports itself by way of others, and the rule that says so sees a planted
cycle.
"""

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from tests.import_cycles import find_cycles

ROOT = Path(__file__).parents[1]


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert find_cycles(grimp.build_graph("maskloom", cache_dir=None)) == []


def test_a_planted_cycle_is_found() -> None:
    graph = grimp.build_graph("maskloom", cache_dir=None)
    graph.add_import(importer="maskloom.pipeline.errors", imported="maskloom.pipeline.files.atomic")
    assert find_cycles(graph) == [
        ["maskloom.pipeline.errors", "maskloom.pipeline.files.atomic", "maskloom.pipeline.errors"]
    ]


@pytest.mark.parametrize("guarded", [True, False])
def test_lint_fails_on_a_cycle(tmp_path: Path, guarded: bool) -> None:
    package = tmp_path / "small"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from small import two\n")
    back = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from small import one\n"
    (package / "two.py").write_text(back if guarded else "def late():\n    from small import one\n    return one\n")
    (tmp_path / ".importlinter").write_text(
        "[importlinter]\nroot_package = small\ncontract_types =\n    acyclic_files: tests.import_cycles.AcyclicFiles\n"
        "[importlinter:contract:files]\nname = no cycles\ntype = acyclic_files\n"
    )
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    found = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1, found.stdout + found.stderr
    assert "small.one -> small.two -> small.one" in found.stdout
