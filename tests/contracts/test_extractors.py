"""Runs over every feature extractor found in `evaluate/scores/extractors`.

A new one is tested by existing.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.scores.features import PACKAGE, Extractor, batch_features
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import load_plugin, plugin_names

EXTRACTORS = plugin_names(PACKAGE)
pytestmark = pytest.mark.parametrize("name", EXTRACTORS)


@pytest.fixture
def plugin(name: str) -> Any:
    return load_plugin(PACKAGE, name, "extractor")


@pytest.fixture
def extractor(plugin: Any) -> Extractor:
    """The extractor, where its package and its weights are installed."""
    try:
        plugin.check(plugin.INPUT_SIZE)
        loaded: Extractor = plugin.load(plugin.INPUT_SIZE, "cpu")
    except MaskLoomError as error:
        pytest.skip(str(error))
    return loaded


def test_it_declares_what_the_protocol_asks_for(plugin: Any) -> None:
    assert isinstance(plugin.INPUT_SIZE, int)
    assert plugin.INPUT_SIZE >= 32
    assert plugin.__doc__
    assert callable(plugin.check)
    assert callable(plugin.load)


def test_importing_it_imports_no_torch(name: str) -> None:
    script = f"import sys, {PACKAGE}.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_it_says_what_it_is(name: str, plugin: Any, extractor: Extractor) -> None:
    assert (extractor.name, extractor.side) == (name, plugin.INPUT_SIZE)
    assert len(extractor.digest) == 64


def test_the_features_of_an_image_do_not_depend_on_its_batch(extractor: Extractor) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 48), dtype=np.uint8)
    together = batch_features(extractor, [list(images)], "cpu")
    alone = batch_features(extractor, [[images[2]]], "cpu")
    assert together.dtype == np.float32
    assert together.shape[0] == 3
    assert np.isfinite(together).all()
    np.testing.assert_allclose(together[2:], alone, rtol=1e-3, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 1e-3


def test_colour_and_grey_images_give_the_same_number_of_features(extractor: Extractor) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (1, 40, 40), dtype=np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=3)
    np.testing.assert_array_equal(
        batch_features(extractor, [list(grey)], "cpu"), batch_features(extractor, [list(colour)], "cpu")
    )
