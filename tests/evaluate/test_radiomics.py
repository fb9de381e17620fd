"""Radiomic features against definitions written out, and the metrics that rest on them."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.preprocessing import StandardScaler

from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.histograms import histogram_grid
from maskloom.evaluate.metrics.radiomics_distance import radiomic_features
from maskloom.evaluate.metrics.tumour_characteristics import CHARACTERISTICS, wasserstein
from maskloom.evaluate.scores.radiomics import (
    FIRST_ORDER,
    LEVELS,
    NAMES,
    TEXTURE,
    co_occurrence,
    contrast_to_surroundings,
    first_order,
    largest_region,
    region_features,
    set_radiomics,
)
from maskloom.pipeline.results import REAL
from tests.evaluate.runs import answer, faithful, noise, tiny_inputs
from tests.tiny_datasets import tiny_description, write_tiny_run


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(3)


def disc(size: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def haralick(image: np.ndarray, inside: np.ndarray) -> dict[str, float]:
    """Pixel by pixel, pair by pair."""
    found: dict[str, list[float]] = {name: [] for name in TEXTURE}
    height, width = image.shape
    for step in [(0, 1), (1, 1), (1, 0), (1, -1)]:
        counts = np.zeros((LEVELS, LEVELS))
        for y in range(height):
            for x in range(width):
                v, u = y + step[0], x + step[1]
                if 0 <= v < height and 0 <= u < width and inside[y, x] and inside[v, u]:
                    i, j = int(image[y, x] // 8), int(image[v, u] // 8)
                    counts[i, j] += 1
                    counts[j, i] += 1
        p = counts / counts.sum()
        level = np.arange(LEVELS)
        mean = sum(p[i, j] * i for i in level for j in level)
        variance = sum(p[i, j] * (i - mean) ** 2 for i in level for j in level)
        covariance = sum(p[i, j] * (i - mean) * (j - mean) for i in level for j in level)
        found["GLCM contrast"].append(sum(p[i, j] * (i - j) ** 2 for i in level for j in level))
        found["dissimilarity"].append(sum(p[i, j] * abs(i - j) for i in level for j in level))
        found["homogeneity"].append(sum(p[i, j] / (1 + (i - j) ** 2) for i in level for j in level))
        found["energy"].append(np.sqrt((p**2).sum()))
        found["correlation"].append(covariance / variance)
        found["GLCM entropy"].append(stats.entropy(p.ravel(), base=2))
    return {name: float(np.mean(values)) for name, values in found.items()}


def test_texture_equals_haralick_pair_by_pair(random: np.random.Generator) -> None:
    image = random.normal(120, 30, (17, 14)).clip(0, 255)
    for inside in (disc(17, (8, 6), 6)[:, :14], np.ones((17, 14), dtype=bool)):
        found = dict(zip(TEXTURE, co_occurrence(image, inside), strict=True))
        assert found == pytest.approx(haralick(image, inside), abs=1e-6)


def test_first_order_equals_the_definitions(random: np.random.Generator) -> None:
    values = random.gamma(2, 30, 400).clip(0, 255)
    found = dict(zip(FIRST_ORDER, first_order(values), strict=True))
    centred = values - sum(values) / len(values)
    spread = (centred**2).mean()
    ranked = sorted(values)

    def quantile(share: float) -> float:
        place = share * (len(ranked) - 1)
        low = int(place)
        return float(ranked[low] + (place - low) * (ranked[min(low + 1, len(ranked) - 1)] - ranked[low]))

    bins = [sum(8 * k <= value < 8 * k + 8 for value in values) / len(values) for k in range(LEVELS)]
    assert found == pytest.approx(
        {
            "mean": sum(values) / len(values),
            "standard deviation": spread**0.5,
            "skewness": (centred**3).mean() / spread**1.5,
            "kurtosis": (centred**4).mean() / spread**2 - 3,
            "10th percentile": quantile(0.1),
            "median": quantile(0.5),
            "90th percentile": quantile(0.9),
            "interquartile range": quantile(0.75) - quantile(0.25),
            "range": max(values) - min(values),
            "entropy": stats.entropy(bins, base=2),
        },
        abs=1e-6,
    )


def test_shape_place_and_contrast_of_known_regions() -> None:
    image = np.full((101, 121), 50.0)
    region = disc(121, (40, 60), 20)[:101]
    image[region] = 152
    found = dict(zip(NAMES, region_features(image, region), strict=True))
    assert found["size"] == region.sum() / region.size
    assert found["eccentricity"] == pytest.approx(0, abs=1e-6)
    assert found["solidity"] > 0.95
    assert found["compactness"] > 0.9
    assert found["major axis"] == pytest.approx(40 / np.hypot(101, 121), rel=0.02)
    assert (found["row"], found["column"]) == pytest.approx((40.5 / 101, 60.5 / 121))
    assert found["contrast to surroundings"] == pytest.approx(102 / 255)
    assert (found["standard deviation"], found["skewness"], found["kurtosis"]) == (0, 0, 0)
    bar = np.zeros((101, 121), dtype=bool)
    bar[50:54, 20:100] = True
    long = dict(zip(NAMES, region_features(image, bar), strict=True))
    assert long["eccentricity"] > 0.99
    assert long["compactness"] < 0.3


def test_only_the_ring_around_a_region_is_its_surroundings() -> None:
    region = disc(100, (50, 50), 10)
    image = np.where(disc(100, (50, 50), 15), 100.0, 255.0)
    assert contrast_to_surroundings(image, region) == 0
    assert np.isnan(contrast_to_surroundings(image, np.ones((100, 100), dtype=bool)))


def test_the_largest_region_counts() -> None:
    pixels = disc(40, (10, 10), 6) | disc(40, (30, 30), 4)
    assert (largest_region(pixels) == disc(40, (10, 10), 6)).all()
    assert not largest_region(np.zeros((5, 5), dtype=bool)).any()


def test_an_image_without_region_has_no_features_and_a_pixel_no_texture() -> None:
    image = np.full((20, 20), 9.0)
    assert np.isnan(region_features(image, np.zeros((20, 20), dtype=bool))).all()
    point = np.zeros((20, 20), dtype=bool)
    point[3, 3] = True
    found = dict(zip(NAMES, region_features(image, point), strict=True))
    assert [name for name in NAMES if np.isnan(found[name])] == list(TEXTURE)


def test_a_whole_image_has_first_order_and_texture_only(random: np.random.Generator) -> None:
    found = region_features(random.uniform(0, 255, (12, 9)), None)
    defined = len(FIRST_ORDER) + len(TEXTURE)
    assert np.isfinite(found[:defined]).all()
    assert np.isnan(found[defined:]).all()


def test_wasserstein_equals_the_area_between_distributions(random: np.random.Generator) -> None:
    left, right = random.normal(size=13), random.normal(0.7, 2, size=8)
    places = np.sort(np.concatenate([left, right]))
    area = sum((high - low) * abs((left <= low).mean() - (right <= low).mean()) for low, high in pairwise(places))
    assert wasserstein(left[:, None], right[:, None]) == pytest.approx(area, abs=1e-9)
    assert wasserstein(left[:8, None], right[:, None]) == pytest.approx(
        np.abs(np.sort(left[:8]) - np.sort(right)).mean(), abs=1e-9
    )


def test_features_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_run(tmp_path / "run", {}, {"train": 4})
    inputs = tiny_inputs(tmp_path / "run", ())
    inputs.feature_cache = FeatureCache(tmp_path / "cache")
    first = set_radiomics(inputs, inputs.train, 1)
    again = tiny_inputs(tmp_path / "run", ())
    again.feature_cache = inputs.feature_cache
    monkeypatch.setattr("maskloom.evaluate.scores.radiomics.region_features", None)
    np.testing.assert_array_equal(set_radiomics(again, again.train, 1), first)
    assert first.shape == (4, len(NAMES))


def dim(parent, index):
    """A generator whose lesions hardly differ from their surroundings."""
    return (faithful(parent, index) // 3 + 60).astype(np.uint8)


def test_planted_differences_are_found_and_others_are_not(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful, "dim": dim}, {"train": 40, "test": 40}, size=48)
    result = answer(tiny_inputs(tmp_path, ("faithful", "dim")), "tumour_characteristics")
    assert list(result.values["classes"]) == ["lesion", "lesion, disc", "lesion, square"]
    for found in result.values["classes"].values():
        assert list(found) == list(CHARACTERISTICS.values())
        contrast = found["contrast to surroundings"]["generators"]
        assert contrast["dim"]["above_floor"]["low"] > 1
        assert contrast["faithful"]["above_floor"]["value"] < 1
        # The masks are those of the train images, and all sets have equally many images.
        assert found["size"]["generators"]["dim"]["above_floor"]["value"] == pytest.approx(0, abs=1e-9)
    assert "dim" in result.verdict
    assert "contrast to surroundings of lesion" in result.verdict
    means = {figure.of: figure.value for figure in result.figures}
    assert means["dim"] > means["faithful"] > 0
    assert set(means) == {REAL, "faithful", "dim"}
    assert [table.title for table in result.tables] == ["Characteristics: lesion"]
    assert [table.title for table in result.subgroups] == [
        "Characteristics: lesion, disc",
        "Characteristics: lesion, square",
    ]
    assert len(result.pictures) == 3


def test_without_image_classes_the_mask_classes_remain(tmp_path: Path) -> None:
    def unlabelled(sample):
        sample.label = None

    about = tiny_description(labels=())
    write_tiny_run(tmp_path, {"noise": noise}, {"train": 12, "test": 9}, description=about, change=unlabelled)
    result = answer(tiny_inputs(tmp_path, ("noise",)), "tumour_characteristics")
    assert [table.title for table in result.tables] == ["Characteristics: lesion"]
    assert result.values["classes"]["lesion"]["size"]["n"] == 9


def test_classes_of_few_images_are_named(tmp_path: Path) -> None:
    def mostly_disc(sample):
        sample.label = 1 if sample.sample_id.endswith("0001") else 0

    write_tiny_run(tmp_path, {"noise": noise}, {"train": 12, "test": 10}, change=mostly_disc)
    result = answer(tiny_inputs(tmp_path, ("noise",)), "tumour_characteristics")
    assert (
        "too few real train and real test images with a region, left out: lesion, square (1 and 1)" in result.warnings
    )


def test_without_masks_there_is_no_characteristic(tmp_path: Path) -> None:
    def unmasked(sample):
        sample.mask = None

    write_tiny_run(tmp_path, {"noise": noise}, {"train": 12, "test": 10}, change=unmasked)
    found = answer(tiny_inputs(tmp_path, ("noise",)), "tumour_characteristics")
    assert found.skipped == "no mask class has a region in 8 real train images and 8 real test images"
    write_tiny_run(tmp_path / "few", {"noise": noise}, {"train": 12, "test": 7})
    found = answer(tiny_inputs(tmp_path / "few", ("noise",)), "tumour_characteristics")
    assert found.skipped == "real train, and test or validation, need 8 images each"


def test_histograms_are_drawn_the_same_every_time(random: np.random.Generator) -> None:
    panels = {f"panel {i}": {"real": random.normal(size=20), "made": np.zeros(9)} for i in range(4)}
    pixels = histogram_grid(panels)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert (pixels == histogram_grid(panels)).all()
    assert len(histogram_grid(dict(list(panels.items())[:3]))) < len(pixels)


def test_radiomics_distance_equals_a_matrix_square_root(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful, "noise": noise}, {"train": 20, "test": 20})
    inputs = tiny_inputs(tmp_path, ("faithful", "noise"))
    result = answer(inputs, "radiomics_distance")
    train, test, made = (
        radiomic_features(inputs, one, True).features for one in (inputs.train, inputs.test, inputs.synthetic["noise"])
    )
    scaler = StandardScaler().fit(train)
    real, synthetic = scaler.transform(test), scaler.transform(made)
    product = np.cov(real.T) @ np.cov(synthetic.T)
    root = np.sqrt(np.clip(np.linalg.eigvals(product).real, 0, None)).sum()
    shift = ((real.mean(axis=0) - synthetic.mean(axis=0)) ** 2).sum()
    expected = shift + np.trace(np.cov(real.T)) + np.trace(np.cov(synthetic.T)) - 2 * root
    generators = result.values["generators"]
    assert generators["noise"]["distance"]["value"] == pytest.approx(expected, rel=1e-6)
    assert generators["noise"]["above_floor"]["low"] > 0
    assert generators["faithful"]["distance"]["value"] < 0.2 * expected
    assert "scikit-image" in result.tables[0].title
    assert len(result.values["features"]) == 40
    assert result.values["left_out"] == {"real train": 0, "real test": 0, "faithful": 0, "noise": 0}


def test_radiomics_distance_without_masks_is_of_whole_images(tmp_path: Path) -> None:
    def unmasked(sample):
        sample.mask = None

    write_tiny_run(tmp_path, {"noise": noise}, {"train": 12, "test": 10}, change=unmasked)
    found = answer(tiny_inputs(tmp_path, ("noise",)), "radiomics_distance")
    assert found.skipped is None
    assert all(name.startswith("image: ") for name in found.values["features"])


def test_radiomics_distance_names_images_without_a_region(tmp_path: Path) -> None:
    def some_unmasked(sample):
        if sample.sample_id.endswith("0"):
            sample.mask = None

    write_tiny_run(tmp_path, {"noise": noise}, {"train": 20, "test": 12}, change=some_unmasked)
    found = answer(tiny_inputs(tmp_path, ("noise",)), "radiomics_distance")
    assert any("left out: real train 2, real test 2, noise 2" in warning for warning in found.warnings)
    write_tiny_run(tmp_path / "few", {"noise": noise}, {"train": 12, "test": 7})
    found = answer(tiny_inputs(tmp_path / "few", ("noise",)), "radiomics_distance")
    assert found.skipped == "real train, and test or validation, need 8 images each"
