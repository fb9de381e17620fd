"""The number of synthetic images, chosen on validation images before any test image is scored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.downstream.arms import ArmOptions, random_part
from maskloom.evaluate.downstream.phases import Phase
from maskloom.evaluate.downstream.ratios import RatioChoice, choose_ratio
from maskloom.evaluate.metrics import downstream_classification, downstream_segmentation
from maskloom.evaluate.model_cache import ModelCache
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import write_tiny_run

TRAINERS = {
    "downstream_segmentation": (downstream_segmentation, "train_segmenter"),
    "downstream_classification": (downstream_classification, "train_classifier"),
}
REAL, SYNTHETIC = 10, 15


def pair(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), np.arange(count)


def chosen(scores: dict[int, float], ratios: tuple[float, ...], **more: Any) -> tuple[RatioChoice, list[Any]]:
    """Return the choice where a training with so many images reaches a score, and every training."""
    trained: list[Any] = []

    def score(phases: Sequence[Phase], seed: int) -> float:
        (phase,) = phases
        assert phase.steps == 7
        trained.append((len(phase.data[0]) - REAL, seed, set(phase.data[1][REAL:].tolist())))
        return scores[trained[-1][0]]

    options = ArmOptions(synthetic_ratios=ratios, **more)
    found = choose_ratio(options, pair(REAL), pair(SYNTHETIC), 3, 7, ("Dice", score), (6, "a mask"))
    assert found is not None
    return found, trained


def test_the_ratio_of_the_best_validation_score_is_chosen() -> None:
    found, trained = chosen({2: 0.4, 5: 0.6, 10: 0.5}, (1, 0.25, 0.5), ratio_seeds=2)
    assert (found.chosen, found.count) == (0.5, 5)
    assert [(count, seed) for count, seed, _ in trained] == [(2, 3), (2, 4), (5, 3), (5, 4), (10, 3), (10, 4)]
    assert trained[0][2] < trained[2][2] < trained[4][2]  # the images of a smaller ratio are among the larger's
    assert found.sentence == (
        "Synthetic images per real one: 0.5 (5 images), chosen by Dice on 6 real validation images, 2 seed(s), before "
        "any test image was scored. Tried: 0.25 (0.400), 0.5 (0.600), 1 (0.500). Arms with real and synthetic images "
        "in one batch use it, the others all images."
    )
    assert [row[-1] for row in found.table().rows] == ["", "chosen", ""]
    assert found.as_json()["tried"][1] == {"ratio": 0.5, "images": 5, "value": 0.6}


def test_ratios_beyond_all_images_are_trained_once_and_of_equal_ones_the_smallest_is_chosen() -> None:
    found, trained = chosen({10: 0.5, 15: 0.9}, (1, 2, 4))
    assert [count for count, *_ in trained] == [10, 15]
    assert found.images == {1: 10, 2: 15, 4: 15}
    assert found.chosen == 2
    assert found.table().note.endswith("Ratios that need more images than there are use all of them.")
    assert chosen({10: 0.9, 15: 0.9}, (2, 1))[0].chosen == 1
    assert "all of them" not in chosen({5: 0.9, 10: 0.9}, (0.5, 1))[0].table().note


def test_the_images_of_a_part_keep_their_targets() -> None:
    images, targets = random_part(pair(20), 6, 1)
    assert images[:, 0, 0, 0].tolist() == targets.tolist() == sorted(targets.tolist())
    assert len(set(targets.tolist())) == 6
    assert random_part(pair(4), None, 1)[1].tolist() == random_part(pair(4), 9, 1)[1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"synthetic_ratios": [0.5]}, "give two or more, each once; a single one is synthetic_per_real"),
        ({"synthetic_ratios": [0.5, 0.5]}, "give two or more, each once"),
        ({"synthetic_ratios": [0.5, 1], "synthetic_per_real": 1}, "both limit the synthetic images; keep one of them"),
        (
            {"synthetic_ratios": [0.5, 1], "arms": ["real", "synthetic"]},
            "are chosen for real_synthetic; add it to arms",
        ),
        ({"synthetic_ratios": [0, 1]}, "synthetic_ratios.0=0"),
        ({"synthetic_ratios": [1, 2], "ratio_seeds": 0}, "ratio_seeds=0"),
    ],
)
def test_ratios_that_are_no_choice(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(MaskLoomError, match=problem):
        validated(values, ArmOptions, "here")


@pytest.mark.parametrize(
    ("metric", "lacking"), [("segmentation", "a mask with a foreground"), ("classification", "a label")]
)
def test_a_choice_needs_validation_images(metric: str, lacking: str, tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "test": 16})
    with pytest.raises(
        MaskLoomError,
        match=f"synthetic_ratios: no real validation image has {lacking} .*; give one ratio as synthetic_per",
    ):
        answer(tiny_inputs(tmp_path, ("faithful",)), f"downstream_{metric}", synthetic_ratios=[0.5, 1], seeds=1)


def test_ratios_leave_no_trace_where_there_are_none() -> None:
    for metric in TRAINERS:
        identity: Any = open_question(metric, {}).identity
        assert not {"synthetic_ratios", "ratio_seeds"} & identity[2].keys()
        assert {"synthetic_ratios", "ratio_seeds"} <= open_question(metric, {"synthetic_ratios": [1, 2]}).identity[
            2
        ].keys()


@pytest.mark.parametrize("metric", TRAINERS)
def test_the_ratio_is_chosen_before_a_test_image_is_scored_and_is_that_of_the_mixing_arms(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "validation": 8, "test": 16})
    module, trainer = TRAINERS[metric]
    train, score, events = getattr(module, trainer), module.image_scores, list[Any]()

    def noted_training(images: np.ndarray, *more: Any) -> Any:
        events.append(len(images))
        return train(images, *more)

    def noted_scores(*values: Any) -> Any:
        events.append("test")
        return score(*values)

    monkeypatch.setattr(module, trainer, noted_training)
    monkeypatch.setattr(module, "image_scores", noted_scores)
    arms = ["real", "real_synthetic", "real_synthetic_equal_exposure", "pretrain_synthetic", "synthetic"]
    options = {"arms": arms, "seeds": 1, "ratio_seeds": 2}
    result = answer(tiny_inputs(tmp_path, ("faithful",)), metric, synthetic_ratios=[0.25, 0.5, 0.75], **options)
    assert events[:7] == [20, 20, 24, 24, 28, 28, 16]
    ratio = result.values["ratio"]
    best = max(ratio["tried"], key=lambda one: (one["value"], -one["ratio"]))
    assert ratio["chosen"] == best["ratio"]
    assert events[6:] == [
        16,
        "test",
        16 + best["images"],
        "test",
        16 + best["images"],
        "test",
        16,
        16,
        "test",
        16,
        "test",
    ]
    assert any(text.startswith(f"Synthetic images per real one: {ratio['chosen']:g} ") for text in result.limits)
    assert result.tables[-1].title == "Choice of the number of synthetic images"
    options = {"arms": ["real", "real_synthetic"], "seeds": 1}
    alone = answer(tiny_inputs(tmp_path, ("faithful",)), metric, synthetic_per_real=ratio["chosen"], **options)
    assert alone.values["arms"]["real_synthetic"] == result.values["arms"]["real_synthetic"]


@pytest.mark.parametrize("metric", TRAINERS)
def test_models_of_an_interrupted_choice_are_read_back(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "validation": 8, "test": 16})
    options = {"arms": ["real", "real_synthetic"], "seeds": 1, "synthetic_ratios": [0.25, 0.5]}
    whole = answer(tiny_inputs(tmp_path, ("faithful",)), metric, **options)
    module, trainer = TRAINERS[metric]
    train, done, most = getattr(module, trainer), list[int](), 1

    def limited(*values: Any) -> Any:
        if len(done) == most:
            raise KeyboardInterrupt
        done.append(1)
        return train(*values)

    monkeypatch.setattr(module, trainer, limited)
    inputs = tiny_inputs(tmp_path, ("faithful",))
    inputs.model_cache = ModelCache(tmp_path / "models")
    with pytest.raises(KeyboardInterrupt):
        answer(inputs, metric, **options)
    most = 100
    assert answer(inputs, metric, **options).as_json() == whole.as_json()
    assert len(done) == 4  # two ratios and two arms; none twice
