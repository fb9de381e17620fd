"""The report shows nothing that is about another state of the run than the present one."""

import pytest

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.report import write_report
from maskloom.pipeline.results import TUNED_VAE
from maskloom.pipeline.runs.run import Run
from tests.pipeline import fake_run
from tests.records import write_record


def page_of(run: Run, config) -> str:
    write_report(config, False)
    return run.report.read_text(encoding="utf-8")


@pytest.fixture
def probed(tmp_path):
    """A run whose answer `b_help` is about the weights `w`, and its configuration."""
    run, config = fake_run.whole_run(tmp_path)
    write_record(run, "train", results={"weights_digest": "w"})
    answer = fake_run.evaluation("help", headline=True, weights={"train": "w"}, verdict="It knows them.")
    fake_run.write_evaluation(run, "b_help", answer)
    return run, config


def test_an_answer_about_other_weights_is_not_shown(probed) -> None:
    run, config = probed
    assert "It knows them." in page_of(run, config)
    write_record(run, "train", results={"weights_digest": "retrained"})
    page = page_of(run, config)
    assert "It knows them." not in page
    sentence = "help: the answer is about other weights than train has trained since, and is not shown"
    assert f"{sentence}; run maskloom evaluate." in page


def test_images_of_older_weights_are_named(tmp_path) -> None:
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    made = {"stage": "train", "dataset": "d", "weights": "w"}
    real = fake_run.write_real(run, preprocessing={"generation": {"training": made}})
    fake_run.write_synthetic(run, "copier", real)
    write_record(run, "train", results={"weights_digest": "w"})
    assert "made with other weights" not in page_of(run, config)
    write_record(run, "train", results={"weights_digest": "retrained"})
    sentence = "synthetic/copier: made with other weights than train has trained since; run maskloom generate."
    assert sentence in page_of(run, config)


def test_an_answer_that_lacks_a_generator_or_is_about_another_vae_says_so(tmp_path) -> None:
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder)
    real = fake_run.write_real(run)
    digests = {"real": real.digest, "first": fake_run.write_synthetic(run, "first", real).digest}
    fake_run.write_evaluation(run, "help", fake_run.evaluation("help", inputs=digests))
    assert "does not cover" not in page_of(run, config)
    fake_run.write_synthetic(run, "second", real)
    assert "help: the answer does not cover second; run maskloom evaluate." in page_of(run, config)
    fake_run.write_evaluation(run, "help", fake_run.evaluation("help", inputs={**digests, TUNED_VAE: "v"}))
    sentence = "help: answered with another fine-tuned VAE than the run has now; run maskloom evaluate."
    assert sentence in page_of(run, config)


def test_settings_that_differ_from_those_of_the_answers_are_stated(tmp_path) -> None:
    run, config = fake_run.whole_run(tmp_path)
    fake_run.write_records(run, ("evaluate",))
    Run(run.folder, config).keep_config()
    before = page_of(run, config)
    assert "other settings" not in before
    changed = load_experiment(tmp_path / "config.yaml", ["evaluate.on_copies=keep"])
    page = page_of(run, changed)
    sentence = "other settings than the configuration has now: evaluate.on_copies (there drop, now keep); run"
    assert sentence in page
    assert page_of(run, config) == before
