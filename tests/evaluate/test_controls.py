"""Known controls are caught, and are reported where a check is blind."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from maskloom.evaluate import controls
from maskloom.evaluate.copies import CopyJudge, copy_judge
from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.metrics import faithfulness
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.audit import held_out
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.report.stage import write_report
from maskloom.pipeline.results import Evaluation, MetricResult, read_evaluation
from tests.evaluate.runs import faithful, small_options, tiny_config, tiny_inputs
from tests.evaluate.test_copies import picture, resized
from tests.tiny_datasets import Sample, write_tiny_run

COUNTS = {"train": 40, "validation": 20, "test": 24}
SETTINGS = {"steps": 60, "resamples": 200}


def structured(sample: Sample) -> None:
    """Give an image a texture of its own, brighter where its mask is."""
    split, number = sample.sample_id.split("-")
    texture = resized(picture(int(number) + {"train": 0, "validation": 1000, "test": 2000}[split]), 64)
    sample.image = (0.5 * texture + (0 if sample.mask is None else 110 * sample.mask)).clip(0, 255).astype(np.uint8)


def without_mask(sample: Sample) -> None:
    structured(sample)
    sample.mask = None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    run: Path = tmp_path_factory.mktemp("controls")
    write_tiny_run(run, {"some": faithful}, COUNTS, size=64, change=structured)
    return tiny_inputs(run, ("some",))


@pytest.fixture(scope="module")
def options() -> controls.Options:
    return controls.Options(faithfulness=faithfulness.Options(**small_options("faithfulness", **SETTINGS)))


@pytest.fixture(scope="module")
def result(inputs: EvaluationInputs, options: controls.Options) -> MetricResult:
    return controls.evaluate(inputs, options)


def config(run: Path, metrics: tuple[str, ...] = ("faithfulness",), **options: Any) -> ExperimentConfig:
    return tiny_config(run, {name: small_options(name, **options) for name in metrics}, ("some",))


def answer_of(run: Path) -> Evaluation:
    return read_evaluation(run / "evaluation" / "controls.json")


def test_every_control_is_caught(result: MetricResult) -> None:
    assert list(result.values) == [*controls.COPIES, *controls.LEAKS, "masks shuffled"]
    for name in (*controls.COPIES, *controls.LEAKS):
        assert result.values[name]["planted"] == 20
        assert result.values[name]["found"] >= (19 if "cropped" in name else 20)
        assert result.values[name]["named"] >= (18 if "cropped" in name else 20)
    assert all(one["caught"] for one in result.values.values())
    assert result.warnings == []
    assert result.verdict.startswith("Controls caught: copies of training images: 20 of 20 found; ")
    assert "masks shuffled: faithfulness (Dice) falls from 0." in result.verdict
    assert [row[3] for row in result.tables[0].rows] == ["yes"] * 13
    assert result.n == {"real train": 40, "planted": 240}


def test_the_same_inputs_give_the_same_answer(
    inputs: EvaluationInputs, options: controls.Options, result: MetricResult
) -> None:
    assert controls.evaluate(inputs, options) == result


def test_the_search_of_the_evaluation_is_shared(
    inputs: EvaluationInputs, result: MetricResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskloom.evaluate.scores.copies.CopySearch", None)  # no other can be made
    assert controls.copy_controls(inputs, tmp_path)[0].found == result.values["copies of training images"]["found"]


def test_a_released_search_is_made_again_and_not_calibrated_again(
    inputs: EvaluationInputs, result: MetricResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = copy_judge(inputs)
    monkeypatch.setattr("maskloom.evaluate.copies.calibration", None)
    inputs.release()
    again = copy_judge(inputs)
    assert again.search is not first.search
    assert (again.thresholds, again.held_out) == (first.thresholds, first.held_out)
    shown = ImageSet("shown", inputs.real, "train")
    assert again.copies_in(shown) == first.copies_in(shown) != []


def test_blind_copy_detection_is_reported(
    inputs: EvaluationInputs, options: controls.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CopyJudge, "copies_in", lambda judge, image_set: [])
    result = controls.evaluate(inputs, options)
    assert {name for name, one in result.values.items() if one["caught"] is False} == set(controls.COPIES)
    assert result.verdict.startswith("NOT CAUGHT in this dataset: copies of training images: 0 of 20 found; ")
    assert len(result.warnings) == 3
    assert [row[3] for row in result.tables[0].rows][:3] == ["NO: this check is blind in this dataset"] * 3


def test_a_detector_that_finds_no_crops_is_reported(inputs: EvaluationInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskloom.evaluate.scores.copies.copy_threshold", lambda best, train, least, margin: 0.9995)
    monkeypatch.setattr(
        "maskloom.evaluate.scores.copies.registered_similarities",
        lambda fixed, moving, start, image: np.zeros((len(fixed), 2)),
    )
    result = controls.evaluate(replace(inputs, _memo={}), controls.Options())
    assert result.values["copies of training images"]["caught"]
    assert not result.values["copies of training images, cropped by 10 %"]["caught"]
    assert result.tables[0].rows[1][3].endswith("blind in this dataset")


def test_blind_leak_detection_is_reported(
    inputs: EvaluationInputs, options: controls.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "find_held_out_copies", lambda real, synthetic: [])
    monkeypatch.setattr(controls, "leaked_in", lambda inputs, judge, image_set: [])
    result = controls.evaluate(inputs, options)
    assert {name for name, one in result.values.items() if one["caught"] is False} == set(controls.LEAKS)


def test_blind_faithfulness_is_reported(
    inputs: EvaluationInputs, options: controls.Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        faithfulness, "dice_scores", lambda predicted, masks, classes: np.full((len(masks), classes - 1), 0.7)
    )
    result = controls.evaluate(inputs, options)
    assert {name for name, one in result.values.items() if one["caught"] is False} == {"masks shuffled"}
    assert "goes from 0.70 to 0.70, a fall of " in result.verdict


def half_empty(sample: Sample) -> None:
    if int(sample.sample_id[-4:]) % 2 and sample.mask is not None:
        sample.mask = np.zeros_like(sample.mask)


def test_empty_masks_are_not_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their Dice is 1 or 0, which faithfulness leaves out as well."""
    write_tiny_run(tmp_path, {"some": faithful}, {"train": 8, "test": 8}, change=half_empty)
    scored = []
    own = controls.score_set
    monkeypatch.setattr(
        controls, "score_set", lambda name, one, *more: scored.append(one.masks) or own(name, one, *more)
    )
    options = faithfulness.Options(**small_options("faithfulness", steps=1))
    controls.mask_control(tiny_inputs(tmp_path, ("some",)), options)
    assert [(len(masks), bool(masks.any(axis=(1, 2)).all())) for masks in scored] == [(4, True), (4, True)]


def test_controls_that_do_not_apply_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_run(tmp_path, {"some": faithful}, {"train": 40, "validation": 20}, size=64, change=without_mask)
    inputs = tiny_inputs(tmp_path, ("some",))
    maskless = controls.Options(faithfulness=faithfulness.Options(**small_options("faithfulness")))
    result = controls.evaluate(inputs, maskless)
    assert result.values["masks shuffled"]["caught"] is None
    assert "Masks shuffled: not applicable: fewer than two images have masks with a foreground." in result.verdict
    assert result.values["held-out images among synthetic ones"]["found"] == 20  # those of validation
    assert result.tables[0].rows[-1] == [
        "masks shuffled",
        "fewer than two images have masks with a foreground",
        None,
        "not applicable",
    ]
    monkeypatch.setattr(controls, "NEAR_LIMIT", 99)
    unasked = controls.evaluate(inputs, controls.Options())
    assert "not applicable: faithfulness is not among evaluate.metrics." in unasked.verdict
    assert "not applicable: beyond 99 images only identical ones are looked for" in unasked.verdict


def test_uniform_images_are_not_planted(tmp_path: Path) -> None:
    def blank_held_out(sample: Sample) -> None:
        structured(sample)
        if not sample.sample_id.startswith("train"):
            sample.image = np.full_like(sample.image, 90)

    write_tiny_run(tmp_path, {"some": faithful}, {"train": 12, "test": 1}, size=64, change=blank_held_out)
    result = controls.evaluate(tiny_inputs(tmp_path, ("some",)), controls.Options())
    assert result.values["copies of training images"]["planted"] == 12
    assert result.values["held-out images among synthetic ones"]["caught"] is None
    assert "not applicable: there is no held-out image that is not uniform" in result.verdict


def test_colour_images_and_a_single_split(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert controls.cropped(image, random).shape == (20, 30, 3)
    for change in (*controls.COPIES.values(), *controls.LEAKS.values()):
        changed = change(image, random)
        assert changed.shape == (20, 30, 3) and changed.dtype == np.uint8
    assert (controls.padded(image, random, grey=128)[0] == 128).all()
    assert (controls.shifted(image, random)[1:, 2:] == image[:-1, :-2]).all()
    assert (controls.mirrored(image, random) == image[:, ::-1]).all()
    assert controls.unchanged(image, random) is image


def test_full_temporary_folder_is_one_line(inputs: EvaluationInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*values: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(controls, "copy_controls", full)
    with pytest.raises(
        MaskLoomError, match=r"control images cannot be written \(.*No space left.*\); free space there"
    ):
        controls.evaluate(inputs, controls.Options())


def test_both_commands_run_them_once(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"some": faithful}, COUNTS, size=64, change=structured)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path, **SETTINGS).model_dump(mode="json")))
    words = [sys.executable, "-m", "evaluate", "--config", str(path), "--controls"]
    first = subprocess.run(words, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "controls: Controls caught: copies of training images: 20 of 20 found" in first.stderr + first.stdout
    again = subprocess.run([sys.executable, "-m", "maskloom", *words[2:]], capture_output=True, text=True, check=True)
    assert "up to date" in again.stderr


def test_they_stay_while_valid_and_go_when_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_run(tmp_path, {"some": faithful}, COUNTS, size=64, change=structured)
    synthetic = {path: path.read_bytes() for path in (tmp_path / "synthetic").rglob("*") if path.is_file()}
    file = tmp_path / "evaluation" / "controls.json"
    evaluate(config(tmp_path), force=False)
    assert not file.exists()
    evaluate(config(tmp_path), force=False, controls=True)
    written = file.read_bytes()
    answer = answer_of(tmp_path)
    assert (answer.metric, list(answer.inputs)) == ("controls", ["real"])
    assert {path: path.read_bytes() for path in synthetic} == synthetic
    assert json.loads((tmp_path / "logs/evaluate/stage.json").read_text())["results"]["controls"] == answer.verdict
    evaluate(config(tmp_path), force=True)
    assert file.read_bytes() == written
    evaluate(config(tmp_path), force=True, controls=True)
    assert file.read_bytes() == written
    write_report(config(tmp_path), force=False)
    page = (tmp_path / "report.html").read_text()
    assert "Known controls" in page
    assert 'class="blind"' not in page
    evaluate(config(tmp_path, steps=5), force=False)
    assert not file.exists()
    assert "controls.json" not in OwnedFolder(tmp_path / "evaluation").files()
    write_report(config(tmp_path, steps=5), force=False)
    assert "Known controls" not in (tmp_path / "report.html").read_text()


def test_a_check_that_is_blind_is_shown_in_red_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_run(tmp_path, {"some": faithful}, {"train": 24, "test": 12}, size=64, change=structured)
    monkeypatch.setattr(CopyJudge, "copies_in", lambda judge, image_set: [])
    evaluate(config(tmp_path), force=False, controls=True)
    printed = capsys.readouterr().out
    assert "controls: copies of training images: 0 of 20 found; this check is blind in this dataset, so" in printed
    write_report(config(tmp_path), force=False)
    page = (tmp_path / "report.html").read_text()
    assert page.index('class="blind"') < page.index('id="images"')
    assert page.count("this check is blind in this dataset, so what it does not find may be there") >= 3


def test_a_damaged_answer_goes_and_a_users_file_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_run(tmp_path, {"some": faithful}, {"train": 12, "test": 12}, size=64, change=structured)
    evaluate(config(tmp_path), force=False, controls=True)
    file = tmp_path / "evaluation" / "controls.json"
    file.write_text("{}")
    evaluate(config(tmp_path), force=False)
    assert "controls.json: " in capsys.readouterr().err
    assert not file.exists()
    file.write_text("mine")
    with pytest.raises(MaskLoomError, match=r"controls\.json"):
        evaluate(config(tmp_path), force=False, controls=True)
    evaluate(config(tmp_path), force=False)
    assert file.read_text() == "mine"
