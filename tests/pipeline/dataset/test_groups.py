"""What an interval over groups covers, in words."""

import pytest

from maskloom.evaluate.downstream.result import interval_limit
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.groups import PACKAGE, group_sentence, group_words
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.runs.run import Run
from tests.pipeline import fake_run
from tests.pipeline.test_report_stale import page_of


def test_every_dataset_says_what_its_groups_are_or_nothing() -> None:
    words = {name: group_words(name) for name in plugin_names(PACKAGE)}
    assert {name for name, told in words.items() if told == "patients"} == {"acdc", "brats", "busbra", "lidc"}
    assert set(words.values()) == {"patients", "groups", "slabs of one average brain"}


def test_slabs_of_one_brain_are_not_patients() -> None:
    limit = interval_limit("mni152")
    assert limit.startswith("The interval covers other test slabs of one average brain and other seeds")
    assert limit.endswith(
        "They are not patients: intervals cover other slices of that brain, and nothing here says anything about other patients."
    )


@pytest.mark.parametrize(("dataset", "words"), [("acdc", "patients"), ("mine", "groups")])
def test_groups_are_called_patients_only_where_they_are(dataset: str, words: str) -> None:
    assert group_words(dataset) == words
    assert f"covers other test {words} and other seeds" in interval_limit(dataset)
    start = {"patients": "Groups of acdc are patients: ", "groups": "Groups are what was kept in one split: "}[words]
    assert group_sentence(dataset).startswith(start)


def test_the_report_says_below_its_verdict_what_a_group_is(tmp_path) -> None:
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    fake_run.write_real(run, dataset="mni152")
    assert "slabs of one average brain" not in page_of(run, config)
    fake_run.write_evaluation(run, "help", fake_run.evaluation("help"))
    assert "Groups of mni152 are slabs of one average brain. They are not patients" in page_of(run, config)
