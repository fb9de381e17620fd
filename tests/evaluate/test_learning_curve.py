"""Parts of the train images, and the arms that are trained on them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.downstream.cases import learning_curve_of, read_cases, write_cases
from maskloom.evaluate.downstream.columns import split_of
from maskloom.evaluate.downstream.compare import compare
from maskloom.evaluate.downstream.learning_curve import Curriculum
from maskloom.evaluate.downstream.shares import (
    TrainSet,
    kept_groups,
    rarest_class,
    share_of_class,
    share_of_groups,
)
from maskloom.evaluate.downstream.tables import compare_files
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.metrics.downstream_segmentation import image_kinds
from maskloom.evaluate.model_cache import ModelCache
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.report.curves import line_chart
from maskloom.pipeline.results import Curve
from tests.evaluate.cases import dice_cases
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import tiny_description, write_tiny_run

GROUPS = [f"g{i // 3:02}" for i in range(60)]
KINDS = np.array([1 if i // 3 in (2, 5, 7, 11) and i % 3 else 0 for i in range(60)])
METRICS = ("downstream_segmentation", "downstream_classification")
COUNTS = {"train": 16, "test": 12, "external_abroad": 12}


@pytest.mark.parametrize("seed", range(5))
def test_shares_keep_whole_groups_and_are_nested(seed: int) -> None:
    kept = [kept_groups(GROUPS, share, seed) for share in (0.01, 0.1, 0.25, 0.5, 1.0)]
    assert [len(one) for one in kept] == [1, 2, 5, 10, 20]
    assert all(small <= large for small, large in pairwise(kept))
    rows = share_of_groups(GROUPS, 0.25, seed)
    assert {GROUPS[i] for i in rows} == kept[2]
    assert len(rows) == 15
    assert kept_groups(GROUPS[::-1], 0.25, seed) == kept[2]  # the order of the images says nothing
    assert kept[3] != kept_groups(GROUPS, 0.5, seed + 100)


@pytest.mark.parametrize("seed", range(5))
def test_only_the_rarest_class_is_cut(seed: int) -> None:
    assert rarest_class(GROUPS, KINDS) == 1
    rows = [share_of_class(GROUPS, KINDS, 1, share, seed) for share in (0.25, 0.5, 1.0)]
    for part, groups in zip(rows, (1, 2, 4), strict=True):
        assert (KINDS[part] == 0).sum() == (KINDS == 0).sum()
        assert len({GROUPS[i] for i in part if KINDS[i] == 1}) == groups
    assert set(rows[0]) <= set(rows[1]) <= set(rows[2])
    assert len(rows[2]) == 60


def test_of_equally_rare_classes_the_first_counts_and_images_without_a_class_do_not() -> None:
    assert rarest_class(["a", "b", "c", "d", "e"], np.array([0, 1, 1, 2, -1])) == 0
    assert rarest_class(["a", "b", "c", "d"], np.array([2, 1, 1, -1])) == 2
    assert rarest_class(["a", "b", "b", "c"], np.array([0, 0, 1, 2])) == 1  # one group each, of fewer images first


def test_synthetic_images_follow_their_parents() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    whole = TrainSet(
        (pixels, np.arange(6)),
        [f"s{i}" for i in range(6)],
        ["a", "a", "b", "b", "c", "c"],
        np.zeros(6, np.int64),
        {"one": (pixels[:4], np.arange(4)), "other": (pixels[:1], np.arange(1))},
        {"one": ["s0", "s5", None, "s2"], "other": ["s9"]},
    )
    part = whole.reduced(np.array([0, 1, 4, 5]))
    assert part.samples == ["s0", "s1", "s4", "s5"]
    assert part.real[1].tolist() == [0, 1, 4, 5]
    assert part.generated["one"][1].tolist() == [0, 1]
    assert part.parents == {"one": ["s0", "s5"], "other": []}
    assert len(part.generated["other"][0]) == 0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    folder: Path = tmp_path_factory.mktemp("shares")
    write_tiny_run(folder, {"controlnet": faithful}, COUNTS)
    return tiny_inputs(folder, ("controlnet",))


@pytest.mark.parametrize("metric", METRICS)
def test_an_answer_with_learning_curves_is_the_one_without_and_more(
    inputs: EvaluationInputs, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answer(inputs, metric, arms=["real", "real_synthetic"], steps=2)
    asked: dict[str, Any] = {"train_shares": [1.0, 0.25, 0.5], "rare_class_shares": [0.5]}
    inputs.model_cache = ModelCache(tmp_path / "models")
    found = answer(inputs, metric, arms=["real", "real_synthetic"], steps=2, **asked)
    module = open_question(metric, {}).module
    monkeypatch.setattr(module, "train_segmenter" if "segment" in metric else "train_classifier", None)
    again = answer(inputs, metric, arms=["real", "real_synthetic"], steps=2, **asked)  # every model is read back
    inputs.model_cache = None
    assert again.as_json() == found.as_json()

    curves = found.values.pop("learning_curves")
    assert found.values == plain.values
    assert (found.verdict, found.tables[: len(plain.tables)]) == (plain.verdict, plain.tables)
    assert found.limits[:-1] == plain.limits
    assert found.limits[-1].startswith(
        "Learning curves: controlnet learnt from all train images, so shares below 1 flatter"
    )
    score, test_sets = module.PRIMARY, ["real test", "external test set abroad"]
    assert {option: list(one) for option, one in curves.items()} == dict.fromkeys(asked, test_sets)
    by_share = curves["train_shares"]["real test"]
    assert {share: (one["real_images"], one["synthetic_images"]) for share, one in by_share.items()} == {
        "0.25": (4, 4),
        "0.5": (8, 8),
        "1": (16, 16),
    }
    assert by_share["1"]["arms"]["real"]["value"] == plain.values["arms"]["real"][score]["value"]
    assert (
        by_share["1"]["differences"]["real_synthetic"]["finding"]
        == (plain.values["differences"]["real_synthetic"][score]["finding"])
    )
    table, chart = found.tables[len(plain.tables)], found.curves[1]
    assert [row[:4] for row in table.rows[:2]] == [["0.25", "real", "4", "4"], ["0.25", "real + synthetic", "4", "4"]]
    assert [x for x, _ in chart.series["real + synthetic"]] == [0.25, 0.5, 1]
    assert "svg" in line_chart(chart)

    write_cases(tmp_path / "cases.parquet", found.cases)
    places = {one.test_set: one for one in read_cases(tmp_path / "cases.parquet")}
    assert len(places) == 2 * (1 + 2 + 1)
    place = "external test set abroad, 0.5 of the train groups"
    assert split_of(place) == "external_abroad"
    same = compare(places[place], scores=[score])[0]
    stated = curves["train_shares"]["external test set abroad"]["0.5"]["differences"]["real_synthetic"]
    assert (same.difference, same.p, same.seeds) == (stated["difference"], stated["p"], 3)
    entries = {one.test_set: one.as_json() for _, one in compare_files([tmp_path / "cases.parquet"], "real", [score])}
    for curve in curves.values():
        for test_set, by_share in curve.items():
            for share, part in by_share.items():
                name = test_set if share == "1" else part["differences"]["real_synthetic"]["test_set"]
                assert entries[name] == part["differences"]["real_synthetic"]
    assert len(entries) == len(places)


def test_compare_adjusts_over_the_shares_of_each_learning_curve(tmp_path: Path) -> None:
    random, train = np.random.default_rng(3), TrainSet((np.zeros(1), np.zeros(1)), [], [], np.zeros(0), {}, {})
    curves = [Curriculum("", (), train, None, name) for name in ("the train groups", "the train groups with a, b")]
    names = [
        curve.place(test_set, share)
        for curve in curves
        for test_set in ("real test", "abroad, west")
        for share in (0.05, 1e-5)
    ]
    assert [learning_curve_of(name) for name in names[::2]] == [
        (test_set, curve.name) for curve in curves for test_set in ("real test", "abroad, west")
    ]
    assert learning_curve_of("real test") == ("real test", "")
    base = random.uniform(0.4, 0.6, (3, 30))
    sets = [
        dice_cases({"real": base, "real_synthetic": base + random.normal(0.01, 0.02, base.shape)}, test_set=name)
        for name in [*names, "real test"]
    ]
    write_cases(tmp_path / "cases.parquet", sets)
    found = {one.test_set: one for _, one in compare_files([tmp_path / "cases.parquet"], "real", None)}
    assert len(found) == 9
    assert found["real test"].p_holm == found["real test"].p
    for first, second in zip(names[::2], names[1::2], strict=True):
        assert min(found[first].p_holm, found[second].p_holm) == 2 * min(found[first].p, found[second].p)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"train_shares": [0.5, 0.5]}, "each share stands there once"),
        ({"train_shares": [0]}, "greater than 0"),
        ({"rare_class_shares": [1.5]}, "less than or equal to 1"),
    ],
)
def test_shares_that_are_refused(options: dict[str, Any], problem: str) -> None:
    for metric in METRICS:
        with pytest.raises(MaskLoomError, match=problem):
            open_question(metric, options)


def test_without_shares_the_digest_stays() -> None:
    for metric in METRICS:
        written = open_question(metric, {}).options.model_dump(mode="json")
        assert not written.keys() & {"train_shares", "rare_class_shares"}
        asked = open_question(metric, {"train_shares": [0.5, 0.1]}).options.model_dump(mode="json")
        assert asked["train_shares"] == [0.1, 0.5]


def test_what_cannot_be_cut_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = open_question("downstream_segmentation", {}).module
    monkeypatch.setattr(module, "train_models", None)
    about = tiny_description(labels=())

    def without_label(sample: Any) -> None:
        sample.label = None

    write_tiny_run(tmp_path, {"controlnet": faithful}, {"train": 8, "test": 8}, description=about, change=without_label)
    inputs = tiny_inputs(tmp_path, ("controlnet",))
    with pytest.raises(
        MaskLoomError, match="rare_class_shares: the train images are of one class; leave the option out"
    ):
        answer(inputs, "downstream_segmentation", rare_class_shares=[0.5])
    inputs.synthetic["controlnet"].columns["parent_id"][:] = [None] * 8
    with pytest.raises(
        MaskLoomError, match=r"train_shares: 0\.5: no image of controlnet has its parent among the 4 real"
    ):
        answer(inputs, "downstream_segmentation", train_shares=[0.5])
    masks = np.array([[[0, 1]], [[0, 0]]], np.uint8)
    kinds, names = image_kinds(inputs, ["a", "b"], masks)
    assert (kinds.tolist(), names) == ([1, -1], ["background", "lesion"])


def test_intervals_of_a_chart_are_of_its_points() -> None:
    series = {"a": [(0.5, 0.1), (1.0, 0.2)]}
    chart = Curve(title="T", series=series, intervals={"a": [(0.0, 0.2), (None, None)]})
    assert Curve.model_validate(chart.model_dump(mode="json")) == chart
    assert "intervals" not in Curve(title="T", series=series).model_dump()
    assert line_chart(chart) != line_chart(Curve(title="T", series=series))
    for wrong in ({"b": [(0.0, 0.2)]}, {"a": [(0.0, 0.2)]}):
        with pytest.raises(ValueError, match="intervals must be of lines of the chart, one for each point"):
            Curve(title="T", series=series, intervals=wrong)
