"""Runs over every generator found in `generate/generators`; a new one is tested by existing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from generate.generate import GENERATORS, generate, open_generators
from generate.generator import Condition, ImageGenerator, Options
from pipeline.errors import MaskLoomError
from pipeline.plugins import load_plugin, plugin_names
from pipeline.verification import verify_fully
from tests.generate.workbench import SIDE, Bench
from tests.tiny_backbone import build_tiny_backbone, build_tiny_controlnet
from tests.tiny_datasets import tiny_description

pytestmark = pytest.mark.parametrize("name", plugin_names(GENERATORS))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_tiny_controlnet(build_tiny_backbone(folder / "backbone"), folder / "controlnet")
    return folder


@pytest.fixture
def bench(tmp_path: Path, models: Path) -> Bench:
    return Bench(tmp_path, models)


def open_one(bench: Bench, name: str) -> ImageGenerator:
    return open_generators(bench.config(generators={name: {}}), bench.run)[name]


def conditions() -> list[Condition]:
    square = np.zeros((SIDE, SIDE), np.uint8)
    square[8:20, 8:20] = 1
    return [Condition("a disc", square * i, np.repeat(square[..., None] * 255 * i, 3, 2), i, seed=i) for i in (0, 1)]


def test_it_declares_what_the_protocol_asks_for(name: str):
    plugin = load_plugin(GENERATORS, name, "generator")
    assert issubclass(plugin.Options, Options)
    assert issubclass(plugin.Generator, ImageGenerator)
    assert isinstance(plugin.Generator.uses_mask, bool)
    assert plugin.Generator.__doc__
    assert plugin.__doc__


@pytest.mark.parametrize("channels", [1, 3])
def test_it_returns_one_image_a_condition_in_the_size_and_channels_of_the_dataset(
    bench: Bench, name: str, channels: int
):
    generator = open_one(bench, name)
    generator.check()
    generator.load(torch.device("cpu"), tiny_description(channels=channels))
    images = generator.images(conditions())
    assert images.shape == ((2, SIDE, SIDE) if channels == 1 else (2, SIDE, SIDE, 3))
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, generator.images(conditions()))


def test_it_looks_at_the_mask_exactly_if_it_says_so(bench: Bench, name: str):
    generator = open_one(bench, name)
    generator.load(torch.device("cpu"), tiny_description())
    without, with_mask = (Condition(c.text, c.mask, c.conditioning_image, 0, seed=5) for c in conditions())
    first, second = generator.images([without]), generator.images([with_mask])
    assert bool((first != second).any()) == generator.uses_mask


def test_its_digest_is_that_of_the_weights(bench: Bench, name: str):
    before = open_one(bench, name).digest
    assert open_one(bench, name).digest == before
    build_tiny_backbone(bench.folder / "other", seed=1)
    config = bench.config([f"train.pretrained_model_name_or_path={bench.folder / 'other'}"], generators={name: {}})
    assert open_generators(config, bench.run)[name].digest != before


def test_a_missing_backbone_is_an_error_that_names_the_key(bench: Bench, name: str):
    config = bench.config(["train.pretrained_model_name_or_path=./nowhere"], generators={name: {}})
    with pytest.raises(MaskLoomError, match=r"train\.pretrained_model_name_or_path=\./nowhere"):
        open_generators(config, bench.run)[name].check()


def test_it_writes_a_dataset_that_verifies(bench: Bench, name: str):
    generate(bench.config(generators={name: {}}, num_images=4), force=False)
    assert verify_fully(bench.run.synthetic / name).splits["train"].rows == 4
