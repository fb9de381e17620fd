"""Plug-ins are found by file name."""

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import load_plugin, plugin_names


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three files, one of them private."""
    folder = tmp_path / "tiny_plugins"
    folder.mkdir()
    for name in ("__init__", "beta", "alpha", "_private"):
        (folder / f"{name}.py").write_text(f"NAME = {name!r}\n")
    (folder / "broken.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "tiny_plugins"


def test_names_are_found_without_importing(package):
    assert plugin_names(package) == ["alpha", "beta", "broken"]


def test_a_plugin_is_loaded_by_its_name(package):
    assert load_plugin(package, "beta", "toy").NAME == "beta"


def test_an_unknown_name_lists_the_known_and_the_nearest(package):
    with pytest.raises(MaskLoomError, match=r"unknown toy 'betta': did you mean 'beta'\? known: alpha, beta, broken"):
        load_plugin(package, "betta", "toy")
    with pytest.raises(MaskLoomError, match="unknown toy '_private'"):
        load_plugin(package, "_private", "toy")
