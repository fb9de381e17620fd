"""Parts of the metrics that tiny runs do not tell apart: groups, true classes, batches, and which
images are read.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maskloom.evaluate.downstream.masked import MaskedImages
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.metrics import downstream_classification, downstream_segmentation, quality
from maskloom.evaluate.scores.features import load_extractor, set_features
from maskloom.evaluate.scores.frechet import group_blocks
from tests.evaluate.runs import answer, copied, faithful, small_options, tiny_inputs
from tests.tiny_datasets import Sample, write_tiny_run

COUNTS = {"train": 16, "validation": 8, "test": 16}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    run: Path = tmp_path_factory.mktemp("parts")
    write_tiny_run(run, {"copied": copied, "faithful": faithful}, COUNTS)
    return tiny_inputs(run, ("copied", "faithful"))


def test_images_are_drawn_once_each_with_their_groups() -> None:
    one = quality.Featured("train", np.arange(30.0)[:, None], [f"{i // 3}" for i in range(30)])
    drawn = one.drawn(20, [0])
    numbers = drawn.features[:, 0].astype(int).tolist()
    assert len(set(numbers)) == len(drawn) == 20
    assert drawn.groups == [f"{number // 3}" for number in numbers]
    for other in (one.drawn(20, [1]), replace(one, name="test").drawn(20, [0])):
        assert numbers != other.features[:, 0].tolist()
    assert one.drawn(30, [0]).features.tolist() == one.features.tolist()


def test_intervals_of_quality_are_over_groups(inputs: EvaluationInputs) -> None:
    """A set against itself, of which a group always leaves both sides, has a distance of 0 without
    doubt.
    """
    values = answer(inputs, "quality", jackknife_blocks=8).values
    (found,) = values["rounds"]
    assert (found["n"], found["draws"]) == (16, 1)
    distance = found["train"]["copied"]["frechet_distance"]
    assert (distance["low"], distance["high"]) == pytest.approx((0, 0), abs=1e-6)
    alone = replace(inputs, train=replace(inputs.train), synthetic={}, _memo={})
    alone.train.__dict__["columns"] = {**inputs.train.columns, "group_id": ["one"] * COUNTS["train"]}
    similarity = answer(alone, "quality").values["diversity"]["real train"]["ms_ssim"]
    assert similarity["value"] is not None
    assert similarity["low"] is None


def test_precision_and_recall_are_of_synthetic_and_real_images() -> None:
    """Synthetic images that are all one real image lie among the real ones, and reach none of the
    others.
    """
    random = np.random.default_rng(0)
    real = random.normal(size=(20, 3))
    groups = [f"{i}" for i in range(20)]
    collapsed = quality.Featured("collapsed", real[:1] + random.normal(0, 1e-3, (20, 3)), groups)
    draws = [(collapsed, quality.Featured("real test", real, groups))]
    values = quality.compare_sets(draws, group_blocks(groups, 2), quality.Options(subsets=2), 0).scores
    assert values["precision"] == 1
    assert values["recall"] < 0.2


def test_features_of_another_size_are_computed_anew(inputs: EvaluationInputs) -> None:
    found = []
    for side in (32, 48):
        options = quality.Options(extractor_size=side)
        found.append(set_features(inputs, load_extractor(inputs, options), inputs.test))
    assert not np.allclose(found[0], found[1])


def test_a_classifiers_rows_are_its_probabilities_and_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    monkeypatch.setattr(downstream_classification, "predicted_probabilities", lambda *_: probabilities)
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    test = downstream_classification.LabelledImages(images, np.array([0, 1, 1]), ["x", "y", "z"], ["g", "g", "h"])
    found = downstream_classification.image_scores(nn.Identity(), test, ["a", "b"], "cpu")
    assert {name: values.tolist() for name, values in found.items()} == {
        "probability of a": [0.9, 0.8, 0.3],
        "probability of b": [0.1, 0.2, 0.7],
        "is a": [1, 0, 0],
        "is b": [0, 1, 1],
    }


def test_labelled_images_keep_their_groups(tmp_path: Path) -> None:
    def without_some_labels(sample: Sample) -> None:
        if sample.sample_id in ("train-0000", "train-0003"):
            sample.label = None

    samples = write_tiny_run(tmp_path, {}, {"train": 8}, change=without_some_labels)["train"]
    found = downstream_classification.labelled_images(tiny_inputs(tmp_path, ()).train, (32, 32))
    kept = [sample for sample in samples if sample.label is not None]
    assert found.labels.tolist() == [sample.label for sample in kept]
    assert 0 in found.labels
    assert found.groups == [sample.group_id for sample in kept]
    assert found.samples == [sample.sample_id for sample in kept]
    assert all((image[..., 0] == sample.image).all() for image, sample in zip(found.images, kept, strict=True))


class Bright(nn.Module):
    """Sees a lesion where the image is bright."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([-images, images], dim=1)


def test_every_test_image_is_scored_in_its_place() -> None:
    random = np.random.default_rng(0)
    masks = random.integers(0, 2, (70, 8, 8), dtype=np.uint8)
    images = (255 * masks)[..., None]
    images[66] = 255 - images[66]
    test = MaskedImages(images, masks, [f"{i}" for i in range(70)], ["a"] * 70, [None] * 70, 0)
    found = downstream_segmentation.image_scores(Bright(), test, ["background", "lesion"], "cpu")
    assert {name: np.flatnonzero(found[name] < 1).tolist() for name in ("Dice", "IoU")} == {"Dice": [66], "IoU": [66]}
    assert np.flatnonzero(found["HD95 (pixels)"]).tolist() == [66]
    assert {len(values) for values in found.values()} == {70}


@pytest.mark.parametrize(
    ("module", "trains"),
    [(downstream_segmentation, "train_segmenter"), (downstream_classification, "train_classifier")],
)
def test_models_are_trained_on_train_rows_and_scored_on_test_rows(
    inputs: EvaluationInputs, monkeypatch: pytest.MonkeyPatch, module: type, trains: str
) -> None:
    original, trained = getattr(module, trains), []

    def noted(images: np.ndarray, *rest: object) -> object:
        trained.append(images)
        return original(images, *rest)

    monkeypatch.setattr(module, trains, noted)
    name = module.__name__.rpartition(".")[2]
    options = small_options(name, steps=1, seeds=1, arms=["real", "synthetic"], generator="faithful")
    result = module.evaluate(inputs, module.Options(**options))
    assert (trained[0] == inputs.train.images()).all()
    assert (trained[1] == inputs.synthetic["faithful"].images()).all()
    assert result.values["n"] == COUNTS["test"]
    assert result.n["real test"] == COUNTS["test"]
