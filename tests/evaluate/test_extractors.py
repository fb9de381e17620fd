import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from maskloom.evaluate.scores.extractors import efficientnet_lite0, inception
from maskloom.evaluate.scores.features import ExtractorOptions, batch_features, load_extractor, set_features
from maskloom.models.efficientnet_lite0 import weights_file
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import file_digest
from tests.evaluate.runs import faithful, tiny_inputs
from tests.tiny_datasets import write_tiny_run


@pytest.mark.parametrize(
    ("side", "sums", "norms", "largest"),
    [
        (224, (148.2117, 149.8258), (16.17954, 16.13110), {455: 5.3698, 113: 4.9753, 434: 3.8514}),
        # An odd side, whose maps have odd sides as well: there `SAME` pads by other amounts.
        (75, (88.0495, 246.5858), (10.16321, 19.43663), {1236: 5.1454, 455: 4.0163, 659: 3.2097}),
    ],
)
def test_efficientnet_equals_the_package_it_was_taken_from(
    side: int, sums: tuple[float, float], norms: tuple[float, float], largest: dict[int, float]
) -> None:
    """The values are those of `efficientnet-lite-pytorch` 0.1.0; every feature was equal."""
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    extractor = efficientnet_lite0.load(side, "cpu")
    features = batch_features(extractor, [list(images)], "cpu")
    assert features.shape == (2, efficientnet_lite0.DIMENSIONS)
    assert features.sum(axis=1) == pytest.approx(sums, rel=1e-5)
    assert np.linalg.norm(features, axis=1) == pytest.approx(norms, rel=1e-5)
    assert features[1].argsort()[::-1][:3].tolist() == list(largest)
    assert features[1][list(largest)] == pytest.approx(list(largest.values()), rel=1e-4)
    assert extractor.digest == file_digest(weights_file())
    assert extractor.digest[:12] in extractor.title
    assert f"{side} px" in extractor.title


def test_grey_images_equal_their_rgb_copies_and_are_resized() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 40, 40), dtype=np.uint8)
    extractor = efficientnet_lite0.load(32, "cpu")
    colour = np.repeat(grey[..., None], 3, axis=3)
    left, right = batch_features(extractor, [list(grey)], "cpu"), batch_features(extractor, [list(colour)], "cpu")
    assert left == pytest.approx(right)


def test_features_are_computed_once(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"controlnet": faithful}, {"train": 4})
    inputs = tiny_inputs(tmp_path, ("controlnet",))
    extractor = load_extractor(inputs, ExtractorOptions(extractor_size=32))
    assert load_extractor(inputs, ExtractorOptions(extractor_size=32)) is extractor
    assert set_features(inputs, extractor, inputs.train) is set_features(inputs, extractor, inputs.train)
    assert len(set_features(inputs, extractor, inputs.test)) == 0


def test_unknown_extractor_names_the_nearest(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 4})
    with pytest.raises(MaskLoomError, match="did you mean 'efficientnet_lite0'"):
        load_extractor(tiny_inputs(tmp_path, ()), ExtractorOptions(extractor="efficientnet"))


def test_inception_of_another_size() -> None:
    with pytest.raises(MaskLoomError, match="takes 299 only"):
        inception.load(128, "cpu")


def test_inception_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MaskLoomError, match="needs torch-fidelity"):
        inception.load(299, "cpu")


def fake_fidelity(monkeypatch: pytest.MonkeyPatch, network: object) -> None:
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object) -> None:
        raise OSError("no route to host")

    fake_fidelity(monkeypatch, no_network)
    with pytest.raises(MaskLoomError, match="no route to host"):
        inception.load(299, "cpu")


def test_inception_sees_8_bit_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's network wants uint8 NCHW and returns a tuple.

    A stand-in checks that it gets it.
    """

    class StandIn(torch.nn.Module):
        def __init__(self, name: str, features: list[str]) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor]:
            assert pixels.dtype == torch.uint8
            assert pixels.shape[1:] == (3, 299, 299)
            return (pixels.double().mean(dim=(2, 3)),)

    fake_fidelity(monkeypatch, StandIn)
    extractor = inception.load(299, "cpu")
    assert batch_features(extractor, [[np.full((299, 299), 9, np.uint8)]], "cpu").tolist() == [[9, 9, 9]]
    assert len(extractor.digest) == 64
