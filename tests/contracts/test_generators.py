"""Runs over every generator found in `generate/generators`; a new one is tested by existing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maskloom.generate.baseline import BaselineGenerator
from maskloom.generate.generate import PACKAGE, generate, open_generators
from maskloom.generate.generator import Condition, ImageGenerator, JointGenerator, JointOptions, Options
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import seal_folder
from maskloom.pipeline.plugins import load_plugin, plugin_names
from tests.generate.workbench import ARCHITECTURES, SIDE, Bench
from tests.pipeline.line_task import forget_accelerator
from tests.records import record_outputs
from tests.tiny_backbone import build_tiny_backbone, build_tiny_controlnet
from tests.tiny_datasets import Sample, tiny_description

NAMES = plugin_names(PACKAGE)
KINDS = {name: load_plugin(PACKAGE, name, "generator").Generator for name in NAMES}
BASELINES = [name for name, kind in KINDS.items() if issubclass(kind, BaselineGenerator)]
JOINT = [name for name, kind in KINDS.items() if issubclass(kind, JointGenerator)]
every_generator = pytest.mark.parametrize("name", NAMES)
every_baseline = pytest.mark.parametrize("name", BASELINES)
every_backbone = pytest.mark.parametrize("name", [name for name in NAMES if name not in BASELINES])
every_joint = pytest.mark.parametrize("name", JOINT)
every_other = pytest.mark.parametrize("name", [name for name in NAMES if name not in JOINT])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_tiny_controlnet(build_tiny_backbone(folder / "backbone"), folder / "controlnet")
    return folder


@pytest.fixture
def bench(tmp_path: Path, models: Path) -> Iterator[Bench]:
    yield Bench(tmp_path, models)
    forget_accelerator()


@pytest.fixture
def colour_bench(tmp_path: Path, models: Path) -> Iterator[Bench]:
    """A bench whose images are RGB."""

    def colour(sample: Sample) -> None:
        assert isinstance(sample.image, np.ndarray)
        sample.image = np.repeat(sample.image[..., None], 3, axis=2)

    yield Bench(tmp_path, models, description=tiny_description(channels=3), change=colour)
    forget_accelerator()


def open_one(bench: Bench, name: str) -> ImageGenerator:
    """Return a generator whose weights exist."""
    if name in ARCHITECTURES:
        bench.train_architecture(name)
    return open_generators(bench.config(generators={name: {}}), bench.run)[name]


def loaded(bench: Bench, name: str, channels: int = 1) -> ImageGenerator:
    generator = open_one(bench, name)
    generator.check()
    generator.load(torch.device("cpu"), tiny_description(channels=channels))
    return generator


def conditions() -> list[Condition]:
    """Return one condition a class: the first without a lesion, the second with a square one."""
    square = np.zeros((SIDE, SIDE), np.uint8)
    square[8:20, 8:20] = 1
    return [Condition("a disc", square * i, np.repeat(square[..., None] * 255 * i, 3, 2), i, seed=i) for i in (0, 1)]


def test_every_architecture_has_a_generator():
    assert set(ARCHITECTURES) <= set(BASELINES)


@every_generator
def test_it_declares_what_the_protocol_asks_for(name: str):
    plugin = load_plugin(PACKAGE, name, "generator")
    assert issubclass(plugin.Options, JointOptions if name in JOINT else Options)
    assert issubclass(plugin.Generator, ImageGenerator)
    assert isinstance(plugin.Generator.uses_mask, bool)
    assert plugin.Generator.__doc__
    assert plugin.__doc__


@every_baseline
def test_a_trained_generator_bears_the_name_of_its_architecture(name: str):
    assert KINDS[name].architecture == name
    assert name in ARCHITECTURES


@every_generator
@pytest.mark.parametrize("channels", [1, 3])
def test_it_returns_one_image_a_condition_in_the_size_and_channels_of_the_dataset(
    request: pytest.FixtureRequest, name: str, channels: int
):
    generator = loaded(request.getfixturevalue("bench" if channels == 1 else "colour_bench"), name, channels)
    images = generator.images(conditions())
    assert images.shape == ((2, SIDE, SIDE) if channels == 1 else (2, SIDE, SIDE, 3))
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, generator.images(conditions()))


@every_other
def test_it_looks_at_the_mask_exactly_if_it_says_so(bench: Bench, name: str):
    generator = loaded(bench, name)
    without, with_mask = (replace(condition, label=0, seed=5) for condition in conditions())
    first, second = generator.images([without]), generator.images([with_mask])
    assert bool((first != second).any()) == generator.uses_mask


@every_joint
def test_a_joint_one_draws_masks_of_the_datasets_classes_and_size(bench: Bench, name: str):
    generator = loaded(bench, name)
    assert isinstance(generator, JointGenerator)
    assert generator.uses_mask
    images, masks = generator.pairs(conditions())
    np.testing.assert_array_equal(images, generator.images(conditions()))
    np.testing.assert_array_equal(masks, generator.pairs(conditions())[1])
    assert masks.shape == (2, SIDE, SIDE)
    assert masks.dtype == np.uint8
    assert masks.max() <= 1


@every_joint
def test_a_joint_one_looks_at_class_and_seed_and_at_nothing_else(bench: Bench, name: str):
    generator = loaded(bench, name)
    assert isinstance(generator, JointGenerator)
    asked = conditions()[0]
    blank = Condition("", None, np.zeros((SIDE, SIDE, 3), np.uint8), asked.label, asked.seed)
    images, masks = generator.pairs([asked])
    for mine, same in zip((images, masks), generator.pairs([blank]), strict=True):
        np.testing.assert_array_equal(mine, same)
    for changed in (replace(asked, label=1), replace(asked, seed=asked.seed + 1)):
        other_images, _ = generator.pairs([changed])
        assert (images != other_images).any()


@every_baseline
def test_the_other_images_of_a_batch_do_not_matter(bench: Bench, name: str):
    generator = loaded(bench, name)
    together, alone = generator.images(conditions()), generator.images(conditions()[1:])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-4)


@every_backbone
def test_its_digest_is_that_of_the_weights(bench: Bench, name: str):
    before = open_one(bench, name).digest
    assert open_one(bench, name).digest == before
    build_tiny_backbone(bench.folder / "other", seed=1)
    config = bench.config([f"train.pretrained_model_name_or_path={bench.folder / 'other'}"], generators={name: {}})
    assert open_generators(config, bench.run)[name].digest != before


@every_backbone
def test_a_missing_backbone_is_an_error_that_names_the_key(bench: Bench, name: str):
    config = bench.config(["train.pretrained_model_name_or_path=./nowhere"], generators={name: {}})
    with pytest.raises(MaskLoomError, match=r"train\.pretrained_model_name_or_path=\./nowhere"):
        open_generators(config, bench.run)[name].check()


@every_baseline
def test_an_architectures_digest_is_that_of_its_weights(bench: Bench, name: str):
    before = open_one(bench, name).digest
    assert open_one(bench, name).digest == before
    file = next((bench.run.baselines / name / "weights").rglob("*.safetensors"))
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    config = bench.config(generators={name: {}})
    with pytest.raises(MaskLoomError, match=rf"{file.name}: changed since it was written: .*run baselines again"):
        _ = open_generators(config, bench.run)[name].digest
    seal_folder(bench.run.baselines / name / "weights")
    record_outputs(bench.run, f"baselines/{name}", [bench.run.baselines / name / "weights"])
    assert open_generators(config, bench.run)[name].digest != before


@every_baseline
def test_an_architecture_that_is_not_trained_is_an_error_that_says_what_to_do(bench: Bench, name: str):
    config = bench.config(generators={name: {}})
    with pytest.raises(MaskLoomError, match=r"run baselines first \(maskloom baselines\)"):
        open_generators(config, bench.run)[name].check()
    not_configured = config.model_copy(update={"baselines": {}})
    with pytest.raises(MaskLoomError, match=rf"does not train it; add baselines\.{name}="):
        _ = open_generators(not_configured, bench.run)[name].digest


@every_baseline
def test_damaged_weights_are_an_error_that_says_what_to_do(bench: Bench, name: str):
    generator = open_one(bench, name)
    next((bench.run.baselines / name / "weights").rglob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(MaskLoomError, match="run baselines again with --force"):
        generator.load(torch.device("cpu"), tiny_description())


@every_generator
def test_it_writes_a_dataset_that_verifies(bench: Bench, name: str):
    open_one(bench, name)
    generate(bench.config(generators={name: {}}, num_images=4), force=False)
    assert verify_fully(bench.run.synthetic / name).contract.splits["train"].rows == 4
