import numpy as np
import pytest
from sklearn import metrics

from maskloom.evaluate.scores.classification import classification_contributions, operating_scores

NAMES = ("a", "b", "c")


def example(count: int = 80, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, count)
    logits = random.normal(0, 1, (count, classes)) + 1.2 * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities.round(2) / probabilities.round(2).sum(axis=1, keepdims=True)  # rounded: with ties


def naive_calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for lower in np.arange(10) / 10:
        inside = (confidence >= lower) & ((confidence < lower + 0.1 - 1e-12) | (lower == 0.9))
        if inside.any():
            total += inside.sum() / len(labels) * abs(right[inside].mean() - confidence[inside].mean())
    return total


def reference(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    predicted = probabilities.argmax(axis=1)
    recalls = metrics.recall_score(labels, predicted, average=None)
    if probabilities.shape[1] == 2:
        area = metrics.roc_auc_score(labels, probabilities[:, 1])
    else:
        area = metrics.roc_auc_score(labels, probabilities, multi_class="ovr")
    return {
        "balanced accuracy": metrics.balanced_accuracy_score(labels, predicted),
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro F1": metrics.f1_score(labels, predicted, average="macro"),
        "AUROC": area,
        "calibration error (ECE)": naive_calibration_error(labels, probabilities),
        **{f"recall of {name}": recall for name, recall in zip(NAMES, recalls, strict=False)},
    }


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_equal_scikit_learns(classes: int) -> None:
    labels, probabilities = example(classes=classes)
    found = classification_contributions(labels, probabilities, NAMES[:classes])
    expected = reference(labels, probabilities)
    assert {name: values.mean() for name, values in found.items()} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_contributions_are_what_a_case_adds(classes: int) -> None:
    """A case that is there a little more often moves scikit-learn's weighted score by its contribution."""
    labels, probabilities = example(40, classes)
    found = classification_contributions(labels, probabilities, NAMES[:classes])
    step = 1e-6
    for case in range(0, 40, 3):
        weights = np.ones(40)
        weights[case] += step
        before, after = (weighted_reference(labels, probabilities, one) for one in (np.ones(40), weights))
        for name, score in before.items():
            slope = (after[name] - score) / step * 40
            assert found[name][case] - score == pytest.approx(slope, abs=1e-3), name


def weighted_reference(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    predicted = probabilities.argmax(axis=1)
    found = {
        "balanced accuracy": metrics.balanced_accuracy_score(labels, predicted, sample_weight=weights),
        "accuracy": metrics.accuracy_score(labels, predicted, sample_weight=weights),
        "macro F1": metrics.f1_score(labels, predicted, average="macro", sample_weight=weights),
    }
    kinds = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    areas = [metrics.roc_auc_score(labels == k, probabilities[:, k], sample_weight=weights) for k in kinds]
    return found | {"AUROC": float(np.mean(areas))}


def test_a_class_without_test_images_is_left_out() -> None:
    labels, probabilities = example()
    labels[labels == 2] = 0
    found = classification_contributions(labels, probabilities, NAMES)
    assert "recall of c" not in found
    recalls = metrics.recall_score(labels, probabilities.argmax(axis=1), average=None, labels=[0, 1])
    assert found["balanced accuracy"].mean() == pytest.approx(recalls.mean())
    assert np.isfinite(found["AUROC"].mean())


def test_f1_is_averaged_over_the_classes_that_have_test_images() -> None:
    """No image is of class c, though one is taken for it."""
    labels = np.array([0, 1, 0])
    found = classification_contributions(labels, np.eye(3)[[0, 1, 2]], NAMES)
    assert found["macro F1"].mean() == pytest.approx(np.mean([2 / 3, 1]))


def test_auroc_of_one_class_alone_is_not_defined() -> None:
    labels, probabilities = example(classes=2)
    found = classification_contributions(np.zeros_like(labels), probabilities, NAMES[:2])
    assert np.isnan(found["AUROC"]).all()


def test_operating_points_are_chosen_on_validation_images_alone() -> None:
    random = np.random.default_rng(3)
    true, seen = random.integers(0, 3, 400), random.dirichlet(np.ones(3), 400)
    labels, probabilities = random.integers(0, 3, 200), random.dirichlet(np.ones(3), 200)
    names, at = ["a", "b", "c"], " at 80 % specificity (validation)"
    found = operating_scores((true, seen), labels, probabilities, names, 0.8)
    for k, name in enumerate(names):
        others = seen[true != k, k]
        threshold = min(one for one in others if (others <= one).mean() >= 0.8)
        chosen = probabilities[:, k] > threshold
        for score, positive in ((f"recall of {name}{at}", True), (f"specificity of {name}{at}", False)):
            expected = metrics.recall_score(labels == k, chosen, pos_label=positive)
            assert np.nanmean(found[score]) == pytest.approx(expected, abs=1e-12)
        assert np.isnan(found[f"recall of {name}{at}"]).tolist() == (labels != k).tolist()
        assert np.isnan(found[f"specificity of {name}{at}"]).tolist() == (labels == k).tolist()
        own = operating_scores((true, seen), true, seen, names, 0.8)
        assert 0.8 <= np.nanmean(own[f"specificity of {name}{at}"]) < 0.81


def test_a_class_that_validation_lacks_has_no_operating_point() -> None:
    true, seen = np.array([0, 1, 1]), np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.4, 0.5, 0.1]])
    found = operating_scores((true, seen), true, seen, ["a", "b", "c"], 0.9)
    assert {name.split()[2] for name in found} == {"a", "b"}
    assert operating_scores((true[1:], seen[1:]), true, seen, ["a", "b", "c"], 0.9) == {}
