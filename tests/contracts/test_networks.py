"""Runs over every network found in `models/segmenters` and `models/classifiers`.

A new one is tested by existing.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from maskloom.evaluate.downstream.classifier import (
    ClassifierOptions,
    build_classifier,
    predicted_probabilities,
    train_classifier,
)
from maskloom.evaluate.questions import check_question
from maskloom.models.network_options import NetworkOptions
from maskloom.models.segmenter import SegmenterOptions, build_segmenter, predicted_masks, train_segmenter
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import load_plugin, plugin_names

SEGMENTERS, CLASSIFIERS = (plugin_names(kind.PACKAGE) for kind in (SegmenterOptions, ClassifierOptions))
NETWORKS = [(SegmenterOptions, name) for name in SEGMENTERS] + [(ClassifierOptions, name) for name in CLASSIFIERS]
every_network = pytest.mark.parametrize(("kind", "name"), NETWORKS, ids=lambda one: one if isinstance(one, str) else "")


def chosen(kind: type[NetworkOptions], name: str, **values: Any) -> Any:
    """Return the options of a network at its smallest size; skips where its package is missing."""
    plugin = load_plugin(kind.PACKAGE, name, kind.KIND)
    side = max(plugin.sides(plugin.Options())[1], 32)
    options = kind(**{kind.CHOOSER: name, "image_size": side, "steps": 3, "batch_size": 2} | values)
    try:
        options.check_packages()
    except MaskLoomError as error:
        pytest.skip(str(error))
    return options


def pixels(options: NetworkOptions, count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *options.image_size, channels), dtype=np.uint8)


@every_network
def test_it_declares_what_its_folder_asks_for(kind: type[NetworkOptions], name: str) -> None:
    plugin = load_plugin(kind.PACKAGE, name, kind.KIND)
    assert plugin.__doc__
    assert issubclass(plugin.Options, Section)
    assert 0 < plugin.LEARNING_RATE < 1
    assert callable(plugin.build)


@every_network
def test_importing_it_imports_no_torch(kind: type[NetworkOptions], name: str) -> None:
    script = f"import sys, {kind.PACKAGE}.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@every_network
def test_its_settings_survive_a_round_trip(kind: type[NetworkOptions], name: str) -> None:
    options = kind(**{kind.CHOOSER: name, "learning_rate": None, "image_size": 64})
    assert options.learning_rate == options.plugin.LEARNING_RATE
    again = kind.model_validate(options.model_dump(mode="json"))
    assert again == options
    assert again.settings == options.settings


@every_network
def test_a_size_that_it_cannot_take_is_refused_early(kind: type[NetworkOptions], name: str) -> None:
    plugin = load_plugin(kind.PACKAGE, name, kind.KIND)
    factor, smallest = plugin.sides(plugin.Options())
    refused = [(smallest - factor, 4 * smallest)] + ([(4 * smallest, 4 * smallest + 1)] if factor > 1 else [])
    for size in refused if smallest > 1 else []:
        with pytest.raises(
            ValidationError, match=rf"image_size=\({size[0]}, {size[1]}\): both sides must be .* {name}"
        ):
            kind(**{kind.CHOOSER: name, "image_size": size})


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmentation_network_trains_and_repeats(name: str) -> None:
    options = chosen(SegmenterOptions, name)
    images = pixels(options, 3, channels=3)
    masks = (images[..., 0] > 200).astype(np.uint8) * 2
    trained = [train_segmenter(images, masks, 3, options, 5, "cpu") for _ in range(2)]
    assert trained[0][1] == trained[1][1]
    predictions = [predicted_masks(network, images, "cpu") for network, _ in trained]
    assert predictions[0].shape == masks.shape
    assert predictions[0].max() <= 2
    assert (predictions[0] == predictions[1]).all()


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmentation_network_takes_sides_that_differ(name: str) -> None:
    side = chosen(SegmenterOptions, name).image_size[0]
    options = chosen(SegmenterOptions, name, image_size=(side, 2 * side))
    network = build_segmenter(options, 1, 2, 0).eval()
    assert predicted_masks(network, pixels(options, 1), "cpu").shape == (1, side, 2 * side)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classification_network_trains_and_repeats(name: str) -> None:
    options = chosen(ClassifierOptions, name)
    images, labels = pixels(options, 4), np.array([0, 1, 2, 0])
    trained = [train_classifier(images, labels, 3, options, 5, "cpu") for _ in range(2)]
    assert trained[0][1] == trained[1][1]
    probabilities = [predicted_probabilities(network, images, "cpu") for network, _ in trained]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=0)
    assert probabilities[0].sum(axis=1) == pytest.approx(np.ones(4))


@every_network
def test_its_weights_follow_the_seed_and_leave_the_global_random_state(kind: type[NetworkOptions], name: str) -> None:
    build = build_segmenter if kind is SegmenterOptions else build_classifier
    options = chosen(kind, name)

    def weights(seed: int) -> torch.Tensor:
        return torch.cat([one.detach().flatten() for one in build(options, 1, 2, seed).parameters()])

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = weights(1)
    assert torch.rand(1) == expected
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@pytest.mark.parametrize(
    ("metric", "options", "problem"),
    [
        ("downstream_segmentation", {"network": "unett"}, "unknown segmentation network 'unett'.*unet"),
        ("downstream_classification", {"architecture": "resnet11"}, "unknown classification network 'resnet11'"),
        ("downstream_segmentation", {"network": ["unet"]}, "network=.*string"),
        ("downstream_segmentation", {"network_options": 3}, "network_options=3.*dictionary"),
        ("downstream_segmentation", {"network": "segresnet", "network_options": {"filter": 8}}, "'filter': .*filters"),
        ("downstream_segmentation", {"network": "segresnet", "network_options": {"filters": 9}}, "filters=9"),
        ("downstream_segmentation", {"network_options": {"steps": 3}}, "network_options of unet: unknown key 'steps'"),
    ],
)
def test_a_wrong_choice_is_one_line(metric: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(MaskLoomError, match=problem) as caught:
        check_question(metric, options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"evaluate.metrics.{metric}")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(MaskLoomError, match=r"network=swin_unetr needs einops.*maskloom\[swin\]"):
        check_question("downstream_segmentation", {"network": "swin_unetr"})


def test_settings_of_the_default_network_stand_in_either_place() -> None:
    here = SegmenterOptions(image_size=32, channels=(8, 16), residual_units=0)
    there = SegmenterOptions(image_size=32, network_options={"channels": [8, 16], "residual_units": 0})
    assert here == there
    assert "network" not in here.model_dump()
    assert "network_options" not in here.model_dump()


def test_keys_of_the_default_network_have_no_effect_on_another() -> None:
    options = SegmenterOptions(network="segresnet", channels=(8, 16, 32))
    assert options.model_dump().keys() >= {"network", "network_options"}
    assert not options.model_dump().keys() & {"channels", "residual_units"}
    assert options.settings == options.plugin.Options()


def test_a_learning_rate_that_is_given_stays() -> None:
    assert SegmenterOptions(network="swin_unetr", learning_rate=0.1).learning_rate == 0.1
    assert SegmenterOptions(network="swin_unetr").learning_rate == 5e-4
    assert SegmenterOptions(learning_rate=None).learning_rate == 1e-3


class Outside(torch.nn.Module):
    """Stands for an outside network that returns its final logits and coarser ones."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Conv2d(1, 2, 2, stride=2)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.fine(images), self.coarse(images)]


def test_an_outside_network_is_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import maskloom.models.segmenters as folder

    text = (
        '"""An outside network."""\n'
        "from maskloom.pipeline.config.base import Section\n"
        "LEARNING_RATE = 0.02\n"
        "class Options(Section):\n    pass\n"
        "def sides(options):\n    return 2, 2\n"
        "def build(options, image_channels, classes, image_size):\n"
        "    from tests.contracts.test_networks import Outside\n"
        "    return Outside()\n"
    )
    (tmp_path / "outside.py").write_text(text)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    monkeypatch.setattr(folder, "__file__", str(tmp_path / "__init__.py"))
    options = SegmenterOptions(network="outside", image_size=16, steps=40, batch_size=4)
    images = pixels(options, 6)
    masks = (images[..., 0] > 127).astype(np.uint8)
    network, losses = train_segmenter(images, masks, 2, options, 0, "cpu")
    assert losses[-1] < losses[0]
    assert predicted_masks(network, images, "cpu").shape == masks.shape
    (tmp_path / "outside.py").write_text(f"{text}def loss(outputs, masks):\n    return outputs[1].square().mean()\n")
    monkeypatch.delitem(sys.modules, "maskloom.models.segmenters.outside")
    _, own = train_segmenter(images, masks, 2, options, 0, "cpu")
    assert own != losses
