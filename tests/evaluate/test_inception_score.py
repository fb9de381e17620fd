"""The inception score against its definition, and what it says of clear and of unclear images."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy

from maskloom.evaluate.scores.inception_score import inception_score, linear_probabilities
from maskloom.evaluate.scores.statistics import estimate
from maskloom.pipeline.results import REAL
from tests.evaluate.runs import answer, faithful, noise, tiny_inputs
from tests.tiny_datasets import tiny_description, write_tiny_run


def salimans(probabilities: np.ndarray) -> float:
    """Salimans et al. 2016, image by image."""
    marginal = probabilities.sum(axis=0) / len(probabilities)
    return float(np.exp(sum(entropy(one, marginal) for one in probabilities) / len(probabilities)))


def test_score_equals_the_definition() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet([0.3, 0.5, 1.0], size=40)
    probabilities[0] = [1, 0, 0]
    score = inception_score(probabilities)
    assert estimate(score, 40) == pytest.approx(salimans(probabilities), abs=1e-9)
    counts = random.integers(0, 4, 40)
    weighted = score(counts[None].astype(np.float64))[0]
    assert weighted == pytest.approx(salimans(np.repeat(probabilities, counts, axis=0)), abs=1e-9)


def test_score_lies_between_one_and_the_number_of_classes() -> None:
    clear, unclear = np.eye(4)[np.arange(20) % 4], np.full((20, 4), 0.25)
    assert estimate(inception_score(clear), 20) == pytest.approx(4)
    assert estimate(inception_score(unclear), 20) == pytest.approx(1)
    assert estimate(inception_score(clear[::4]), 5) == pytest.approx(1)


def test_probabilities_are_those_of_a_fit_to_standardised_features() -> None:
    """At the optimum the gradient of the penalised loss vanishes."""
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = random.normal(size=(60, 3)) * [1, 100, 0.01] + labels[:, None] * [2, 0, 0]
    (found,) = linear_probabilities(features.astype(np.float32), labels, [features.astype(np.float32)])
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    odds = np.log(found[:, 1] / found[:, 0])
    design = np.column_stack([standard, np.ones(60)])
    weights, *_ = np.linalg.lstsq(design, odds, rcond=None)
    assert design @ weights == pytest.approx(odds, abs=1e-4)
    gradient = design.T @ (found[:, 1] - labels) + [*weights[:3], 0]
    assert np.abs(gradient).max() < 0.01


def test_clear_images_score_higher_than_noise(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful, "noise": noise}, {"train": 40, "test": 20}, size=48)
    result = answer(tiny_inputs(tmp_path, ("faithful", "noise")), "inception_score", extractor_size=64)
    scores = {name: one["value"] for name, one in result.values["inception_score"].items()}
    assert 1 <= scores["noise"] < scores["faithful"] <= 2
    assert scores[REAL] > 1.2
    assert result.values["class_found"][REAL] > 0.7
    assert result.values["classes"] == ["disc", "square"]
    assert result.tables[0].title == "Inception score, logistic regression on efficientnet_lite0"
    assert "real test images" in result.verdict


def test_a_classifier_that_finds_no_class_is_warned_of(tmp_path: Path) -> None:
    def random_label(sample):
        sample.label = int(np.random.default_rng(list(sample.sample_id.encode())).integers(2))

    write_tiny_run(tmp_path, {"noise": noise}, {"train": 24, "test": 16}, change=random_label)
    result = answer(tiny_inputs(tmp_path, ("noise",)), "inception_score")
    assert any("so that its score says little" in warning for warning in result.warnings)


def test_without_classes_nothing_is_measured(tmp_path: Path) -> None:
    def unlabelled(sample):
        sample.label = None

    about = tiny_description(labels=())
    write_tiny_run(tmp_path / "a", {"noise": noise}, {"train": 12, "test": 9}, description=about, change=unlabelled)
    found = answer(tiny_inputs(tmp_path / "a", ("noise",)), "inception_score")
    assert found.skipped == "the real train images are not of two image-level classes or more"
    write_tiny_run(tmp_path / "b", {"noise": noise}, {"train": 12, "test": 7})
    found = answer(tiny_inputs(tmp_path / "b", ("noise",)), "inception_score")
    assert found.skipped == "real train, and test or validation, need 8 images each"
