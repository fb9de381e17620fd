"""Plug-ins are found by file name, and the spine knows none by its name."""

import ast
import re
from pathlib import Path

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import default_plugins, load_plugin, plugin_names

SPINE = Path(__file__).parents[2] / "pipeline"
PACKAGES = ("data_prep.datasets", "generate.generators", "train_baselines.architectures", "evaluate.metrics")
EXCEPTIONS = {
    "config/train.py": {"controlnet", "lora"},  # values of diffusers' own options
    "hub/cards.py": {"controlnet", "lora"},  # kinds of weights folders, as in the template
    "hub/model_card.md.j2": {"controlnet", "lora"},
}
WORDS = {"folder"}  # a dataset's name that is an ordinary word, too


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


def test_the_defaults_are_the_packages_own_and_stay_in_their_order():
    assert default_plugins("maskloom.generate.generators") == ("controlnet", "text_only")
    assert default_plugins("maskloom.evaluate.metrics") == (
        "quality", "vae_ceiling", "faithfulness", "memorisation", "downstream_segmentation", "downstream_classification",
    )  # fmt: skip
    for package in ("maskloom.generate.generators", "maskloom.evaluate.metrics"):
        assert set(default_plugins(package)) <= set(plugin_names(package))


def test_defaults_are_read_without_importing_a_plugin(tmp_path, monkeypatch):
    (tmp_path / "tiny_defaults").mkdir()
    (tmp_path / "tiny_defaults" / "__init__.py").write_text("DEFAULTS = ('broken',)\n")
    (tmp_path / "tiny_defaults" / "broken.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert default_plugins("tiny_defaults") == ("broken",)


def test_the_spine_knows_no_plugin_by_its_name():
    names = {name for package in PACKAGES for name in plugin_names(f"maskloom.{package}")} - WORDS
    assert {"busi", "controlnet", "pix2pix", "quality"} <= names
    named = re.compile(rf"(?<![\w-])({'|'.join(sorted(names))})(?![\w-])")
    found = {}
    for path in sorted(SPINE.rglob("*")):
        texts = texts_of(path) if path.suffix == ".py" else [path.read_text()] if path.suffix == ".j2" else []
        file = path.relative_to(SPINE).as_posix()
        known = {match for text in texts for match in named.findall(text)} - EXCEPTIONS.get(file, set())
        found |= {file: known} if known else {}
    assert found == {}


def texts_of(path):
    """Return all texts in a file's code, docstrings left out."""
    tree = ast.parse(path.read_text())
    loose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in loose
    ]
