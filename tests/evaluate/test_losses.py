"""Losses of downstream models: their bins, their chart, and whether they were still falling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.downstream.cases import TrainedModel
from maskloom.evaluate.downstream.losses import LossCurves, still_falling
from maskloom.evaluate.questions import open_question
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import write_tiny_run

FLAT = [1.0] * 4 + [0.5] * 16
FALLING = np.linspace(1.0, 0.5, 20).tolist()


def trained(**arms: list[list[float]]) -> dict[str, dict[int, TrainedModel]]:
    return {arm: {seed: TrainedModel(one, {}) for seed, one in enumerate(losses)} for arm, losses in arms.items()}


def test_losses_are_kept_as_means_of_equal_bins() -> None:
    curves = LossCurves.of(trained(real=[list(range(100)), [2.0] * 100]))
    assert curves.steps == list(range(5, 101, 5))
    assert curves.arms["real"][0] == [2.0 + 5 * number for number in range(20)]
    assert curves.mean("real") == [2.0 + 2.5 * number for number in range(20)]
    assert curves.as_json() == {"steps": curves.steps, "arms": {"real": dict(curves.arms["real"])}}


def test_every_step_is_a_bin_where_there_are_few() -> None:
    curves = LossCurves.of(trained(real=[[3.0, 2.0, 1.0]]))
    assert (curves.steps, curves.mean("real")) == ([1, 2, 3], [3.0, 2.0, 1.0])
    assert curves.warnings("downstream_segmentation") == []


def test_the_chart_has_a_line_for_each_arm() -> None:
    chart = LossCurves.of(trained(real=[FLAT], real_synthetic=[FALLING, FLAT])).chart()
    assert list(chart.series) == ["real", "real + synthetic"]
    assert chart.series["real"][-1] == (20, 0.5)
    assert len(chart.series["real + synthetic"]) == 20


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (FLAT, False),
        (FALLING, True),
        (FALLING[::-1], False),
        ([1.0] * 16 + [0.951] * 4, False),
        ([1.0] * 16 + [0.949] * 4, True),
        ([1.0] * 12 + [0.01] * 4 + [0.005] * 4, False),  # next to nothing is left to gain
        ([1.0] * 12 + [0.1] * 4 + [0.085] * 4, True),
        ([1.0, 0.9, 0.8, 0.7], False),  # too few to tell
        ([1.0, 0.9, 0.8, 0.7, 0.6], True),
    ],
)
def test_a_loss_still_falls_if_its_last_fifth_is_lower_by_5_percent(losses: list[float], expected: bool) -> None:
    assert still_falling(losses) == expected


def test_the_warning_names_the_arms_whose_loss_was_still_falling() -> None:
    curves = LossCurves.of(trained(real=[FALLING], real_augmented=[FLAT], synthetic=[FLAT, FALLING]))
    (warning,) = curves.warnings("downstream_segmentation")
    assert warning.startswith(
        "training loss still falling when training stopped: real, synthetic only (mean of the last fifth"
    )
    assert "harm and benefit may be hidden: raise evaluate.metrics.downstream_segmentation.steps" in warning


@pytest.mark.parametrize(
    ("metric", "train"),
    [("downstream_segmentation", "train_segmenter"), ("downstream_classification", "train_classifier")],
)
def test_a_result_has_the_losses_of_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, train: str
) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "test": 16})
    module: Any = open_question(metric, {}).module
    original = getattr(module, train)
    monkeypatch.setattr(module, train, lambda *values: (original(*values)[0], FALLING))
    result = answer(tiny_inputs(tmp_path, ("faithful",)), metric, steps=1, seeds=2, null_arm=True)
    losses = result.as_json()["values"]["losses"]
    assert losses["steps"] == list(range(1, 21))
    assert {arm: list(found) for arm, found in losses["arms"].items()} == {
        **{arm: ["0", "1"] for arm in ("real", "real_augmented", "real_synthetic", "synthetic")},
        "real_other_seeds": ["10000", "10001"],
    }
    assert losses["arms"]["real"]["0"] == pytest.approx(FALLING, abs=1e-9)
    assert list(result.curves[0].series) == [
        "real",
        "real + standard augmentation",
        "real + synthetic",
        "synthetic only",
        "real, other seeds",
    ]
    assert (
        sum(
            text.startswith("training loss still falling when training stopped: real, real + ")
            for text in result.warnings
        )
        == 1
    )
    assert result.verdict.endswith(
        ". The training loss was still falling when training stopped, which may hide harm and benefit: "
        f"raise evaluate.metrics.{metric}.steps."
    )
