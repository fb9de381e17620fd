import numpy as np
import pytest
from sklearn import metrics

from maskloom.evaluate.scores.classification import classification_statistics
from maskloom.evaluate.scores.statistics import estimate

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
    found = classification_statistics(labels, probabilities, NAMES[:classes])
    expected = reference(labels, probabilities)
    assert {name: estimate(statistic, len(labels)) for name, statistic in found.items()} == pytest.approx(expected)


def test_weights_equal_repeated_images() -> None:
    labels, probabilities = example()
    weights = np.random.default_rng(1).integers(0, 4, len(labels))
    repeated = np.repeat(labels, weights), np.repeat(probabilities, weights, axis=0)
    found = classification_statistics(labels, probabilities, NAMES)
    weighted = {name: float(statistic(weights[None].astype(float))[0]) for name, statistic in found.items()}
    assert weighted == pytest.approx(reference(*repeated))


def test_a_class_without_test_images_is_left_out() -> None:
    labels, probabilities = example()
    labels[labels == 2] = 0
    found = classification_statistics(labels, probabilities, NAMES)
    assert "recall of c" not in found
    recalls = metrics.recall_score(labels, probabilities.argmax(axis=1), average=None, labels=[0, 1])
    assert estimate(found["balanced accuracy"], len(labels)) == pytest.approx(recalls.mean())
    assert np.isfinite(estimate(found["AUROC"], len(labels)))


def test_f1_is_averaged_over_the_classes_that_a_draw_holds() -> None:
    """In the second draw no image is of class c, though one is taken for it."""
    labels = np.array([0, 1, 2, 0])
    probabilities = np.eye(3)[[0, 1, 2, 2]]
    f1 = classification_statistics(labels, probabilities, NAMES)["macro F1"]
    found = f1(np.array([[1.0, 1, 1, 1], [1, 1, 0, 1]]))
    assert found == pytest.approx([np.mean([2 / 3, 1, 2 / 3]), np.mean([2 / 3, 1])])


def test_auroc_of_one_class_is_not_defined() -> None:
    found = classification_statistics(np.zeros(4, dtype=int), np.full((4, 2), 0.5), NAMES[:2])
    assert np.isnan(estimate(found["AUROC"], 4))
