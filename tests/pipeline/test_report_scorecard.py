"""The scorecard of the report: the run's answers under seven criteria, and what is missing."""

import inspect
import re

import numpy as np
import pytest

from maskloom.evaluate.downstream import subgroups
from maskloom.evaluate.downstream.by_column import compare_subgroups
from maskloom.evaluate.metrics import SCORECARD
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.report import write_report
from maskloom.pipeline.report.scorecard import CRITERIA, DIFFERENCE, METRICS, figure_rows, scorecard, subgroup_rows
from maskloom.pipeline.report.sources import find_sources
from maskloom.pipeline.results import Evaluation, Interval
from maskloom.pipeline.runs.run import Run
from tests.evaluate.cases import dice_cases
from tests.pipeline import fake_run

FIGURES = [
    {"of": "real images", "name": "Fréchet distance", "better": "lower", "value": 12.5, "low": 10.0, "high": 15.0},
    {"of": "real images", "name": "recall", "better": "higher", "value": 0.9},
    {"of": "first", "name": "Fréchet distance", "better": "lower", "value": 40.5, "low": 30.0, "high": 51.0},
    {"of": "first", "name": "recall", "better": "higher", "value": 0.25},
]
PARTS = {
    "title": "Where it helps",
    "columns": ["part", DIFFERENCE, "finding"],
    "rows": [
        ["all of the test", {"value": 0.01, "low": -0.02, "high": 0.04}, "no clear benefit"],
        ["class benign", {"value": 0.05, "low": 0.01, "high": 0.09}, "helped"],
        ["class malignant", {"value": -0.03, "low": -0.08, "high": 0.02}, "no clear benefit"],
        ["smallest third", {"value": None}, "cannot tell"],
    ],
}


@pytest.fixture
def run_and_config(tmp_path):
    """A run with one synthetic set and no answer."""
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    real = fake_run.write_real(run)
    digests = {"real": real.digest, "first": fake_run.write_synthetic(run, "first", real).digest}
    return run, config, digests


def answer(metric, **changes):
    return Evaluation.model_validate(fake_run.evaluation(metric, **changes))


def scored_of(run, *answers):
    return {one.criterion.name: one for one in scorecard(find_sources(run), answers)}


def test_metrics_and_criteria_are_those_that_exist():
    assert {name for metrics in SCORECARD.values() for name in metrics} <= set(plugin_names(METRICS))
    assert set(SCORECARD) <= {one.name for one in CRITERIA}
    assert [one.name for one in CRITERIA] == [
        "Congruence", "Coverage", "Constraint", "Completeness", "Compliance", "Comprehension", "Consistency",
    ]  # fmt: skip


def test_the_tables_of_subgroups_have_the_column_that_is_read():
    assert f'"{DIFFERENCE}"' in inspect.getsource(subgroups)
    cases = dice_cases({arm: np.full((3, 12), 0.5) for arm in ("real", "real_synthetic")})
    columns = {"scanner": {"A": cases.samples[:6], "B": cases.samples[6:]}}
    assert DIFFERENCE in compare_subgroups(cases, "Dice", "higher", columns).tables()[0].columns


def test_a_figure_stands_beside_that_of_real_images():
    rows = figure_rows(answer("quality", figures=FIGURES), ("Fréchet distance",))
    expected = [
        "Fréchet distance",
        "first",
        Interval(value=40.5, low=30, high=51),
        Interval(value=12.5, low=10, high=15),
    ]
    assert rows == [[*expected, "lower", "quality"]]


def test_counts_have_no_decimals():
    figures = [
        {"of": of, "name": "copies", "better": "lower", "value": value}
        for of, value in (("real images", 0.0), ("first", 7.0))
    ]
    assert figure_rows(answer("memorisation", figures=figures), ("",)) == [
        ["copies", "first", 7, 0, "lower", "memorisation"]
    ]


def test_the_parts_that_change_least_and_most_are_named():
    rows = subgroup_rows(
        answer("downstream_segmentation", subgroups=[PARTS, {**PARTS, "columns": ["part", "n", "finding"]}])
    )
    assert [(row[1], row[2].value, row[3], row[4].value) for row in rows] == [
        ("class malignant", -0.03, "class benign", 0.05)
    ]


def test_present_and_missing_answers(run_and_config):
    run, _, digests = run_and_config
    found = scored_of(run, answer("quality", figures=FIGURES, inputs=digests, verdict="Further than the floor."))
    assert found["Congruence"].findings == {"quality": "Further than the floor."}
    assert found["Congruence"].gaps == [
        "Not measured: cmmd, radiomics_distance; add to evaluate.metrics and run maskloom evaluate."
    ]
    assert found["Coverage"].findings == {}, "the verdict of quality is about distances"
    assert [row[0] for row in found["Coverage"].tables[0].rows] == ["recall"]
    assert found["Constraint"].tables == []
    assert found["Constraint"].gaps[0].startswith("Not measured: faithfulness, tumour_characteristics;")


def test_a_metric_that_did_not_apply_says_why(run_and_config):
    run, _, digests = run_and_config
    reason = {"skipped": "no masks", "verdict": "Not measured: no masks.", "figures": [], "subgroups": []}
    names = ("faithfulness", "downstream_segmentation")
    found = scored_of(run, *(answer(name, inputs=digests, **reason) for name in names))
    assert found["Constraint"].findings == {"faithfulness": "Not measured: no masks."}
    assert found["Consistency"].findings == {"downstream_segmentation": "Not measured: no masks."}
    assert "in subgroups" not in " ".join(found["Consistency"].gaps)


def test_an_answer_without_subgroups_or_without_a_set_says_so(run_and_config):
    run, _, digests = run_and_config
    plain = answer("downstream_segmentation", inputs={"real": digests["real"]})
    gaps = scored_of(run, plain)["Consistency"].gaps
    assert gaps[1] == (
        "Not measured in subgroups: downstream_segmentation; name columns in its option subgroups and run maskloom evaluate."
    )
    assert gaps[2] == "downstream_segmentation does not cover first; run maskloom evaluate."


def test_what_datasets_state_is_counted(run_and_config):
    run, _, _ = run_and_config
    found = scored_of(run)
    (complete,) = found["Completeness"].tables
    assert [row[:5] for row in complete.rows] == [["real images", 14, 14, "2 of 2", 3], ["first", 8, 8, "2 of 2", 0]]
    assert found["Compliance"].tables[-1].rows == [["real images", "CC0-1.0"], ["first", "CC0-1.0"]]
    assert found["Comprehension"].tables[0].rows[0][:5] == ["first", None, None, None, None]


def test_a_dataset_without_classes_has_none_to_count(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    fake_run.write_synthetic(run, "first", fake_run.write_real(run, labels=()))
    (complete,) = scored_of(run)["Completeness"].tables
    assert [row[:4] for row in complete.rows] == [["real images", 14, None, None], ["first", 8, None, None]]


def test_the_page_shows_it_and_nothing_that_is_out_of_date(run_and_config):
    run, config, digests = run_and_config

    def section(inputs):
        changes = {"figures": FIGURES, "inputs": inputs, "verdict": "Further than the floor."}
        fake_run.write_evaluation(run, "quality", fake_run.evaluation("quality", **changes))
        write_report(config, force=False)
        return re.search(
            r'<section id="scorecard">.*?</section>', run.report.read_text(encoding="utf-8"), re.DOTALL
        ).group()

    shown = section(digests)
    assert "10.1038/s44172-025-00450-1" in shown
    assert "40.5 [30.0,\u00a051.0]" in shown
    assert "12.5 [10.0,\u00a015.0]" in shown
    stale = section({**digests, "first": "0" * 64})
    assert "40.5" not in stale
    assert "Further than the floor." not in stale
    assert "Out of date: quality; run maskloom evaluate." in stale


def test_without_synthetic_images_there_is_nothing_to_score(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    fake_run.write_real(run)
    write_report(config, force=False)
    assert "There are no synthetic images to score." in run.report.read_text(encoding="utf-8")
