"""The perceptual distance against loops, and the diversity of sets that vary and that repeat themselves."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.metrics import perceptual_diversity
from maskloom.evaluate.metrics.perceptual_diversity import pair_distances
from maskloom.evaluate.scores.features import ExtractorOptions, load_extractor
from maskloom.evaluate.scores.perceptual import perceptual_distances
from maskloom.models.efficientnet_lite0 import load_efficientnet_lite0
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.results import REAL
from tests.evaluate.runs import answer, faithful, noise, tiny_inputs
from tests.tiny_datasets import write_tiny_run


def lpips_with_unit_weights(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    """Zhang et al. 2018, eq. 1, with w = 1: layer by layer and place by place, for one pair of (C, H, W) maps."""
    total = 0.0
    for one, other in zip(left, right, strict=True):
        places = [(h, w) for h in range(one.shape[1]) for w in range(one.shape[2])]
        for h, w in places:
            x, y = one[:, h, w], other[:, h, w]
            difference = x / np.sqrt((x**2).sum()) - y / np.sqrt((y**2).sum())
            total += float((difference**2).sum()) / len(places)
    return total / len(left)


def test_distance_equals_place_by_place() -> None:
    random = np.random.default_rng(0)
    shapes = [(3, 5, 4), (7, 2, 3)]
    left, right = ([random.normal(size=(6, *shape)) for shape in shapes] for _ in "ab")
    found = perceptual_distances([torch.from_numpy(one) for one in left], [torch.from_numpy(one) for one in right])
    expected = [lpips_with_unit_weights([m[i] for m in left], [m[i] for m in right]) for i in range(6)]
    assert found.numpy() == pytest.approx(expected, abs=1e-6)
    tokens = [torch.from_numpy(one).flatten(2) for one in left], [torch.from_numpy(one).flatten(2) for one in right]
    assert perceptual_distances(*tokens).numpy() == pytest.approx(expected, abs=1e-6)
    zeros = [torch.zeros(1, 3, 2, 2)]
    assert perceptual_distances(zeros, zeros).tolist() == [0]


def test_maps_of_the_network_are_those_at_each_resolution() -> None:
    network, images = load_efficientnet_lite0(), torch.rand(1, 3, 64, 64)
    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        outputs.append(output)

    for block in network.blocks:
        block.register_forward_hook(keep)
    with torch.inference_mode():
        found = network.maps_by_resolution(images)
    sides = [one.shape[2] for one in outputs]
    last = [i for i, side in enumerate(sides) if i + 1 == len(sides) or sides[i + 1] < side]
    assert [one.shape[1:] for one in found] == [outputs[i].shape[1:] for i in last]
    assert all(torch.equal(one, outputs[i]) for one, i in zip(found, last, strict=True))


def same(parent, index):
    """A generator whose images are all but the same."""
    return np.clip(faithful(replace(parent, mask=None), 0).astype(int) + index % 2, 0, 255).astype(np.uint8)


def test_a_generator_that_repeats_itself_is_less_varied(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful, "same": same, "noise": noise}, {"train": 20, "test": 8})
    result = answer(tiny_inputs(tmp_path, ("faithful", "same", "noise")), "perceptual_diversity")
    means = {name: one["distance"]["value"] for name, one in result.values["sets"].items()}
    assert means["same"] < 0.2 * means[REAL]
    assert means["faithful"] == pytest.approx(means[REAL], rel=0.25)
    assert "same" in result.verdict
    assert result.tables[0].rows[0][0] == "real train"
    assert {figure.better for figure in result.figures} == {"higher"}


def test_few_images_are_read_at_a_time_and_distances_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_run(tmp_path / "run", {}, {"train": 12})
    inputs = tiny_inputs(tmp_path / "run", ())
    extractor = load_extractor(inputs, ExtractorOptions(extractor_size=32))
    pairs = np.array([[i, j] for i in range(4) for j in range(5, 9)])
    expected = pair_distances(inputs, extractor, inputs.train, pairs)
    inputs.feature_cache = FeatureCache(tmp_path / "cache")
    monkeypatch.setattr(perceptual_diversity, "PAIRS_AT_A_TIME", 3)
    assert pair_distances(inputs, extractor, inputs.train, pairs) == pytest.approx(expected, abs=1e-6)
    kept = replace(extractor, maps=lambda pixels: pytest.fail("computed again"))
    assert pair_distances(inputs, kept, inputs.train, pairs) == pytest.approx(expected, abs=1e-6)


def test_an_extractor_without_maps_is_refused(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 4})
    inputs = tiny_inputs(tmp_path, ())
    extractor = replace(load_extractor(inputs, ExtractorOptions(extractor_size=32)), name="inception", maps=None)
    with pytest.raises(MaskLoomError, match="extractor=inception gives no feature maps of its layers"):
        pair_distances(inputs, extractor, inputs.train, np.array([[0, 1]]))


def test_without_pairs_nothing_is_measured(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"noise": noise}, {"train": 2})
    result = answer(tiny_inputs(tmp_path, ("noise",)), "perceptual_diversity")
    assert result.skipped == "no class has two real train images"
