"""Test sets of other datasets: the same trained models are scored on them, and the own test's
figures stay what they were.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.downstream.comparison import ComparisonResult, compare_test_sets
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.results import Evaluation
from tests.evaluate.cases import dice_cases
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import Sample, write_tiny_run

OWN = {"train": 24, "validation": 4, "test": 12}
EXTERNAL = {"external_abroad": 10, "external_twin": 12}
METRICS = ("downstream_segmentation", "downstream_classification")
ABROAD, TWIN = "external test set abroad", "external test set twin"


def from_another_scanner(sample: Sample) -> None:
    """Let the images of the set `abroad` be negatives: what is bright elsewhere is dark there.

    The set `twin` is like the own test.
    """
    if sample.sample_id.startswith("external_abroad"):
        assert isinstance(sample.image, np.ndarray)
        sample.image = 255 - sample.image


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvaluationInputs]:
    """Return the same run without and with external test sets."""
    found = {}
    for name, counts in (("without", OWN), ("with", {**OWN, **EXTERNAL})):
        folder: Path = tmp_path_factory.mktemp(name)
        write_tiny_run(folder, {"controlnet": faithful}, counts, change=from_another_scanner)
        found[name] = tiny_inputs(folder, ("controlnet",))
    return found


def test_external_splits_are_inputs_of_their_own(runs: dict[str, EvaluationInputs]) -> None:
    inputs = runs["with"]
    assert {name: (one.name, one.split, len(one)) for name, one in inputs.externals.items()} == {
        "abroad": (ABROAD, "external_abroad", 10),
        "twin": (TWIN, "external_twin", 12),
    }
    assert runs["without"].externals == {}
    assert inputs.counts() == runs["without"].counts()


@pytest.mark.parametrize("metric", METRICS)
def test_the_own_tests_figures_do_not_depend_on_external_sets(runs: dict[str, EvaluationInputs], metric: str) -> None:
    without, with_sets = (answer(runs[name], metric, seeds=2).as_json() for name in ("without", "with"))
    assert set(with_sets["values"]) - set(without["values"]) == {"external"}
    assert {key: with_sets["values"][key] for key in without["values"]} == without["values"]
    assert with_sets["tables"][:2] == without["tables"]
    assert len(without["tables"]) == 2
    assert with_sets["subgroups"][: len(without["subgroups"])] == without["subgroups"]
    assert with_sets["verdict"].startswith(without["verdict"])
    assert without["n"].items() <= with_sets["n"].items()
    assert without["warnings"] == [text for text in with_sets["warnings"] if not text.startswith("external")]


@pytest.mark.parametrize("metric", METRICS)
def test_every_arm_is_compared_on_each_external_set(runs: dict[str, EvaluationInputs], metric: str) -> None:
    result = answer(runs["with"], metric, seeds=2)
    for number, picture in enumerate(result.pictures):
        picture.path = f"{metric}-{number}.png"  # as the stage names its file
    Evaluation.model_validate(json.loads(json.dumps({"metric": metric, "version": 2, **result.as_json()})))
    assert [table.title for table in result.tables] == [
        f"{title}{place}"
        for place in ("", f" on the {ABROAD}", f" on the {TWIN}")
        for title in ("Change against training on real images only", "Scores of each arm")
    ]
    assert f"on 10 images of the {ABROAD} in 5 groups" in result.tables[3].note
    assert "on 12 real test images in 6 groups" in result.tables[1].note
    assert {ABROAD: 10, TWIN: 12, "real test": 12}.items() <= result.n.items()
    for name, count in ((ABROAD, 10), (TWIN, 12)):
        values = result.values["external"][name]
        assert values["n"] == count
        assert set(values["arms"]) == set(result.values["arms"])
        assert set(values["differences"]) == {"real_augmented", "real_synthetic", "synthetic"}
        assert values["differences"]["synthetic"][values["primary"]]["p_holm"] is not None
        assert result.verdict.count(f"On the {name} it changed {values['primary']} by ") == 1
        few = f"{name}: the test images "
        needed = 6 if metric == METRICS[0] else 10  # of each class, for means over classes
        assert any(text.startswith(few) for text in result.warnings) == (count // 2 < needed)
    assert sum("seed(s): at least" in text for text in result.warnings) == 1


def test_a_shift_of_domain_shows_and_a_twin_of_the_test_does_not(runs: dict[str, EvaluationInputs]) -> None:
    options = {"steps": 60, "seeds": 1, "arms": ["real", "real_synthetic"]}
    result = answer(runs["with"], "downstream_segmentation", **options)
    own, (abroad, twin) = result.values, (result.values["external"][name] for name in (ABROAD, TWIN))
    dice = [one["arms"]["real"]["Dice"]["value"] for one in (own, abroad, twin)]
    assert dice[0] > 0.8
    assert dice[1] < 0.3
    assert abs(dice[2] - dice[0]) < 0.1
    repeated = answer(runs["with"], "downstream_segmentation", **options)
    assert repeated.as_json() == result.as_json()


@pytest.mark.parametrize("metric", METRICS)
def test_each_model_is_trained_once(
    runs: dict[str, EvaluationInputs], metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = open_question(metric, {}).module
    train = "train_segmenter" if metric == METRICS[0] else "train_classifier"
    original, trained = getattr(module, train), []

    def counted(images: Any, *rest: Any) -> Any:
        trained.append(len(images))
        return original(images, *rest)

    monkeypatch.setattr(module, train, counted)
    answer(runs["with"], metric, steps=1, seeds=2)
    assert trained == [24, 24, 24, 24, 48, 48, 24, 24]  # four arms of two seeds, and never an external image


@pytest.mark.parametrize(("metric", "lacking"), [(METRICS[0], "mask"), (METRICS[1], "label")])
def test_an_external_set_without_masks_or_labels_is_left_out_and_told(
    tmp_path: Path, metric: str, lacking: str
) -> None:
    def drop(sample: Sample) -> None:
        if sample.sample_id.startswith("external_abroad"):
            setattr(sample, lacking, None)

    write_tiny_run(tmp_path, {"controlnet": faithful}, {**OWN, **EXTERNAL}, change=drop)
    result = answer(tiny_inputs(tmp_path, ("controlnet",)), metric, steps=1, seeds=1)
    assert f"{ABROAD}: no image has a {lacking}, so it is left out" in result.warnings
    assert list(result.values["external"]) == [TWIN]
    assert "abroad" not in result.verdict
    assert ABROAD not in result.n


def test_other_metrics_never_open_an_external_split(
    runs: dict[str, EvaluationInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def seen(dataset: MaskPromptDataset, name: str) -> Any:
        opened.append(name)
        return split(dataset, name)

    split = MaskPromptDataset.split
    monkeypatch.setattr(MaskPromptDataset, "split", seen)
    unread = {name: tiny_inputs(inputs.real.folder.parent, ("controlnet",)) for name, inputs in runs.items()}
    results = {
        name: {metric: answer(inputs, metric).as_json() for metric in ("faithfulness", "memorisation", "quality")}
        for name, inputs in unread.items()
    }
    assert opened
    assert not [split for split in opened if split.startswith("external")]
    assert results["with"] == results["without"]


def compared(own: float, external: float, groups: int = 40, external_groups: int = 40) -> ComparisonResult:
    """Return the comparison of simulated Dice scores: real + synthetic is better by `own` and `external` on average."""
    random = np.random.default_rng(0)

    def arms(gain: float) -> dict[str, np.ndarray]:
        base = random.uniform(0.6, 0.9, 40)
        return {
            arm: np.stack([base + shift + random.normal(0, 0.05, 40) for _ in range(3)])
            for arm, shift in (("real", 0.0), ("real_synthetic", gain))
        }

    test_sets = [
        dice_cases(arms(gain), [str(index % count) for index in range(40)], test_set=name)
        for name, gain, count in (("real test", own, groups), (TWIN, external, external_groups))
    ]
    return compare_test_sets(test_sets, "Dice", None, "controlnet")


@pytest.mark.parametrize(
    ("own", "external", "said"),
    [
        (0.05, 0.05, ["helped. ", "On the {} it changed Dice by +0.0", ": helped, the same conclusion."]),
        (0.05, 0.0, ["helped. ", "On the {} it changed Dice by ", ": no clear benefit, another conclusion."]),
        (0.0, -0.05, ["no clear benefit. ", "On the {} it changed Dice by -0.0", ": hurt, another conclusion."]),
    ],
)
def test_the_verdict_says_whether_the_conclusion_holds_abroad(own: float, external: float, said: list[str]) -> None:
    comparison = compared(own, external)
    found, place, end = said
    assert comparison.verdict.startswith(f"{found}Real + synthetic changed Dice by ")
    assert place.format(TWIN) in comparison.verdict
    assert comparison.verdict.endswith(end)
    assert comparison.warnings == []


@pytest.mark.parametrize(("groups", "external_groups"), [(40, 1), (1, 40)])
def test_no_conclusion_is_compared_where_one_side_cannot_tell(groups: int, external_groups: int) -> None:
    verdict = compared(0.05, 0.05, groups, external_groups).verdict
    assert "cannot tell" in verdict
    assert "conclusion" not in verdict
    assert verdict.endswith(("cannot tell.", "helped."))
