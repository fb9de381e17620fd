"""The filter: its scores, its thresholds, and what it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.filtering import calibration
from maskloom.evaluate.filtering.calibration import Calibration, calibrate
from maskloom.evaluate.filtering.criteria import mask_match
from maskloom.evaluate.filtering.criteria.realism import nearest_mean, power_spectra
from maskloom.evaluate.filtering.criterion import log_odds
from maskloom.evaluate.filtering.crossfit import Folds
from maskloom.evaluate.filtering.filter import filter_synthetic, without_test
from maskloom.evaluate.filtering.judge import Judge, check_criterion, open_criteria, require_criteria
from maskloom.evaluate.filtering.ledger import SMALL, Draw, loss_warnings, subsets
from maskloom.evaluate.filtering.mask_shapes import mask_shapes
from maskloom.evaluate.filtering.pooling import BANDS, distance_bands, low_level_maps, pooled_features
from maskloom.evaluate.filtering.probe import LinearProbe
from maskloom.evaluate.filtering.tails import LowerTail
from maskloom.evaluate.inputs import ImageSet, open_inputs
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.filter_summary import FilterSummary
from maskloom.pipeline.report.stage import write_report
from maskloom.pipeline.runs.stage import StageChecked, check_only
from tests.evaluate.runs import faithful, small_options, tiny_config, unfaithful
from tests.tiny_datasets import Picture, Sample, tiny_samples, write_dataset, write_tiny_run

CRITERIA: dict[str, dict[str, Any]] = {
    "mask_match": {"extractor_size": 64},
    "realism": {"extractor_size": 32},
    "class_agreement": {"extractor_size": 64},
    "copies": {},
}
QUICK: dict[str, dict[str, Any]] = {
    "realism": {"extractor_size": 32},
    "class_agreement": {"extractor_size": 32},
}
COUNTS = {"train": 30, "validation": 24, "test": 4}
MORE = {"train": 60, "validation": 60, "test": 40}


def config(
    run: Path, rounds: int = 0, generators: tuple[str, ...] = ("controlnet",), **section: Any
) -> ExperimentConfig:
    tiny = tiny_config(run, {"faithfulness": small_options("faithfulness")}, generators)
    values = tiny.model_dump(mode="json")
    return ExperimentConfig(**{**values, "filter": {"criteria": QUICK, "rounds": rounds, **section}})


def half_bad(parent: Sample, index: int) -> Picture:
    """A generator every third image of which is noise."""
    if index % 3 == 0:
        return np.random.default_rng(index).integers(0, 256, parent.image.shape[:2], dtype=np.uint8)
    return faithful(parent, index)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tiny_run(tmp_path, {"controlnet": half_bad}, COUNTS)
    return tmp_path


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "filter" / "controlnet.jsonl").read_text().splitlines()]


def summary(run: Path) -> FilterSummary:
    return FilterSummary.model_validate_json((run / "filter" / "controlnet.json").read_bytes())


def written(run: Path) -> dict[str, bytes]:
    places = [run / "filter", run / "synthetic" / "controlnet-filtered"]
    files = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_noise_is_rejected_and_the_rows_that_stay_are_unchanged(run: Path) -> None:
    filter_synthetic(config(run), force=False)
    lines = ledger(run)
    noise = [line["accepted"] for line in lines if line["row"] % 3 == 0]
    assert len(lines) == 30
    assert not any(noise)
    kept = verify_fully(run / "synthetic" / "controlnet-filtered")
    before = {row["sample_id"]: row for row in MaskPromptDataset.open(run / "synthetic" / "controlnet").rows("train")}
    after = list(kept.rows("train"))
    assert [row["sample_id"] for row in after] == [line["sample_id"] for line in lines if line["accepted"]]
    assert all(row == before[row["sample_id"]] for row in after)
    assert kept.contract.parent == MaskPromptDataset.open(run / "synthetic" / "controlnet").contract.parent
    assert kept.contract.rejected == sum(not line["accepted"] for line in lines)
    found = summary(run)
    assert found.images == 30
    assert found.kept == len(after)
    assert sum(one.rejected for one in found.subsets if one.name != SMALL) == 30 - len(after)
    assert all(set(line["thresholds"]) == set(QUICK) for line in lines)
    assert all(bool(line["reason"]) != line["accepted"] for line in lines)
    assert found.accepted >= 0.9
    assert "could not be replaced" in (kept.folder / "README.md").read_text()


def test_the_report_shows_what_was_rejected(run: Path) -> None:
    filter_synthetic(config(run), force=False)
    write_report(config(run), force=False)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"Filtered: {summary(run).sentence()}" in page
    assert "by class_agreement" in page
    assert "rejected by realism" in page


def test_a_damaged_summary_is_named(run: Path) -> None:
    plain = MaskPromptDataset.open(run / "synthetic" / "controlnet")
    assert FilterSummary.of(plain) is None
    about = plain.description.model_copy(update={"preprocessing": {"filter": {"images": "many"}}})
    damaged = replace(plain, contract=plain.contract.model_copy(update={"description": about}))
    with pytest.raises(MaskLoomError, match=r"preprocessing\.filter: .*run filter again with --force"):
        FilterSummary.of(damaged)


def test_a_second_run_is_skipped_and_a_forced_one_writes_the_same_bytes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filter_synthetic(config(run), force=False)
    before = written(run)
    filter_synthetic(config(run), force=False)
    assert "up to date" in capsys.readouterr().err
    filter_synthetic(config(run), force=True)
    assert written(run) == before
    with pytest.raises(StageChecked, match="stale"), check_only():
        filter_synthetic(config(run, acceptance=0.9), force=False)
    monkeypatch.setattr(calibration, "VERSION", 0)
    with pytest.raises(StageChecked, match="stale"), check_only():
        filter_synthetic(config(run), force=False)


def test_interrupted_after_the_scores_it_trains_nothing_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filter_synthetic(config(run), force=False)
    expected = written(run)

    def untrained(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(Folds, "train", untrained)
    filter_synthetic(config(run), force=True)
    assert written(run) == expected


def test_evaluate_compares_filtered_with_unfiltered_images(run: Path) -> None:
    filter_synthetic(config(run), force=False)
    evaluate(config(run), force=False)
    answer = json.loads((run / "evaluation" / "faithfulness.json").read_text())
    assert {"controlnet", "controlnet-filtered"} <= set(answer["n"])
    assert answer["n"]["controlnet-filtered"] < answer["n"]["controlnet"]


def test_without_the_section_nothing_is_done_and_nothing_is_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_config(run, {}, ("controlnet",))
    filter_synthetic(plain, force=False)
    assert "nothing to do" in capsys.readouterr().err
    assert "filter" not in plain.model_dump(mode="json")
    assert plain.synthetic_sets == ["controlnet"]
    with pytest.raises(MaskLoomError, match="no section `filter`"):
        require_criteria(plain)


def test_no_test_image_is_read(run: Path) -> None:
    inputs = without_test(open_inputs(MaskPromptDataset.open(run / "dataset"), {}, None, 0))
    assert len(inputs.test) == 0
    other = run / "other"
    changed = {**COUNTS, "test": 2}
    write_tiny_run(other, {"controlnet": half_bad}, changed)
    filter_synthetic(config(run), force=False)
    filter_synthetic(config(other), force=False)
    assert summary(run).thresholds == summary(other).thresholds


def test_no_images_pass(tmp_path: Path) -> None:
    def noise(parent: Sample, index: int) -> Picture:
        return np.random.default_rng(index).integers(0, 256, parent.image.shape[:2], dtype=np.uint8)

    write_tiny_run(tmp_path, {"controlnet": noise}, COUNTS)
    with pytest.raises(MaskLoomError, match=r"no image is accepted, and \w+ rejects most .*lower filter\.acceptance"):
        filter_synthetic(config(tmp_path, criteria={"realism": CRITERIA["realism"]}), force=False)
    assert len(ledger(tmp_path)) == 30


def test_no_validation_images(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"controlnet": faithful}, {"train": 12, "test": 4})
    with pytest.raises(MaskLoomError, match="the validation split is empty"):
        filter_synthetic(config(tmp_path), force=False)


def test_criteria_that_do_not_apply_are_named(tmp_path: Path) -> None:
    def bare(sample: Sample) -> None:
        sample.label, sample.mask = None, None

    write_tiny_run(tmp_path, {"controlnet": unfaithful}, COUNTS, change=bare)
    every = {"mask_match": {}, "faithfulness": {}, **QUICK}
    filter_synthetic(config(tmp_path, criteria=every), force=False)
    assert summary(tmp_path).not_applied == ["mask_match", "faithfulness", "class_agreement"]
    with pytest.raises(MaskLoomError, match="none of class_agreement applies"):
        filter_synthetic(config(tmp_path, criteria={"class_agreement": CRITERIA["class_agreement"]}), force=False)


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"criteria": {"realisme": {}}}, "unknown criterion 'realisme': .*realism"),
        ({"criteria": {"realism": {"neighbors": 3}}}, "filter.criteria.realism: unknown key 'neighbors'"),
        ({"criteria": {}}, "filter.criteria is empty"),
    ],
)
def test_mistakes_in_the_section(run: Path, section: dict[str, Any], error: str) -> None:
    with pytest.raises(MaskLoomError, match=error):
        open_criteria(config(run, **section))
    with pytest.raises(MaskLoomError, match="unknown extractor"):
        check_criterion("realism", {"extractor": "none"})


def judge(run: Path, criteria: dict[str, Any]) -> Judge:
    inputs = without_test(open_inputs(MaskPromptDataset.open(run / "dataset"), {}, None, 0))
    return Judge(inputs, open_criteria(config(run, criteria=criteria)), 0.95)


def planted(run: Path, name: str, samples: list[Sample]) -> ImageSet:
    real = MaskPromptDataset.open(run / "dataset")
    write_dataset(run / "planted" / name, real.description, {"train": samples})
    return ImageSet(name, MaskPromptDataset.open(run / "planted" / name), "train")


def test_planted_bad_rows_are_rejected_and_good_ones_are_not(tmp_path: Path) -> None:
    run = tmp_path
    write_tiny_run(run, {}, MORE)
    one = judge(run, CRITERIA)
    good = tiny_samples("test", MORE["test"])
    random = np.random.default_rng(0)

    def accepted(name: str, samples: list[Sample]) -> float:
        return float(one.judge(planted(run, name, samples)).accepted.mean())

    assert accepted("good", good) >= 0.85
    others = [replace(a, mask=b.mask) for a, b in zip(good, good[1:] + good[:1], strict=True)]
    assert accepted("masks", others) <= 0.05
    assert accepted("noise", [replace(a, image=random.integers(0, 256, (32, 32)).astype(np.uint8)) for a in good]) == 0
    assert accepted("blur", [replace(a, image=gaussian_filter(a.image, 1.5)) for a in good]) == 0
    assert accepted("classes", [replace(a, label=1 - (a.label or 0)) for a in good]) <= 0.1
    copies = [replace(a, sample_id=f"copy-{a.sample_id}") for a in tiny_samples("train", 40)]
    assert accepted("copies", copies) <= 0.05


def test_folds_never_let_a_network_see_the_group_that_it_scores() -> None:
    groups = [f"g{i // 2}" for i in range(20)]
    folds = Folds(groups, 3, seed=0)
    seen: list[set[str]] = []

    def trainer(kept: Any, seed: int) -> Any:
        seen.append({groups[one] for one in kept})
        return None

    folds.train("nothing", trainer)
    unknown = ["x", "y"]
    for group, fold in zip([*groups, *unknown], folds.of([*groups, *unknown]), strict=True):
        assert group not in seen[fold]
    assert set(folds.of(groups).tolist()) == {0, 1, 2}
    scores = folds.apply(groups, lambda fold, images: images + 0.5)
    assert scores.tolist() == [i + 0.5 for i in range(20)]


def test_bands_follow_the_distance_to_the_border() -> None:
    mask = np.zeros((1, 80, 80), np.uint8)
    mask[0, 20:60, 20:60] = 1
    bands = distance_bands(mask, 3)
    assert bands.shape == (1, 2, 80, 80)
    assert [bands[0, 0, 40, column] for column in (40, 20, 19, 16, 10, 0)] == [0, 1, 2, 3, 4, 5]
    assert (bands[0, 1] == BANDS - 1).all()


def test_pooled_features_by_hand() -> None:
    bands = torch.arange(BANDS).repeat_interleave(2)[None, None, :, None].expand(1, 1, 2 * BANDS, 12).clone()
    bright = torch.tensor([9.0, 5.0, 4.0, 4.0, 1.0, 0.0]).repeat_interleave(2)[:, None].expand(12, 12)
    found = pooled_features([bright[None]], bands).reshape(2 * BANDS)
    assert found[:BANDS].tolist() == pytest.approx([9, 4, 1, 0, 3, 1], abs=1e-5)
    assert found[BANDS:].tolist() == pytest.approx([0] * BANDS, abs=1e-2)
    bands[bands == 0] = 1  # a mask without a core
    assert pooled_features([bright[None]], bands)[0, :2].tolist() == pytest.approx([7, 0], abs=1e-5)
    smaller = torch.nn.functional.avg_pool2d(bright[None], 2)
    assert pooled_features([smaller], bands)[0, :3].tolist() == pytest.approx([7, 0, 3], abs=1e-5)


def test_low_level_maps_do_not_depend_on_brightness_and_contrast() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 100
    assert low_level_maps(images).shape == (2, 5, 16, 16)
    assert torch.allclose(low_level_maps(images), low_level_maps(2 * images + 30), atol=1e-3)


def test_shapes_by_hand() -> None:
    mask = np.zeros((2, 40, 40), np.uint8)
    mask[0, 10:20, 10:30] = 2
    shapes = mask_shapes(mask, 3).reshape(2, 2, -1)
    assert not shapes[1].any() and not shapes[0, 0].any()
    assert shapes[0, 1, [0, 1, 2, 5, 8]] == pytest.approx([np.log(200), np.log(0.5), 1, 14.5 / 40, 1])


def test_few_features_count_beside_many() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(60) % 2
    many, few = random.normal(size=(60, 3000)), (labels + random.normal(0, 0.2, 60))[:, None]
    probe = LinearProbe.fit([many, few], labels)
    unseen = [random.normal(size=(40, 3000)), (np.arange(40) % 2 + random.normal(0, 0.2, 40))[:, None]]
    found = probe.probabilities(unseen, 3)
    assert (found.argmax(axis=1) == np.arange(40) % 2).mean() > 0.9
    assert not found[:, 2].any()
    assert found.sum(axis=1) == pytest.approx(1)


def test_masks_of_held_out_groups_train_no_probe(tmp_path: Path) -> None:
    """As a wrong mask, a parent's mask would be learnt."""
    write_tiny_run(tmp_path, {}, {"train": 12, "validation": 6, "test": 2})
    inputs = without_test(open_inputs(MaskPromptDataset.open(tmp_path / "dataset"), {}, None, 0))
    one = mask_match.Criterion(inputs, mask_match.Options(extractor_size=32))
    rows, masks = one._pairs
    groups, labels = np.array(inputs.train.groups), inputs.train.labels
    assert (masks[:, 0] == rows).all()
    assert (groups[masks[:, 1:]] != groups[rows][:, None]).all()
    assert (labels[masks] == labels[rows][:, None]).all()
    used: list[Any] = []

    def fitted(features: Any, pairs: Any) -> None:
        used.append(pairs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_match, "fitted", fitted)
        assert one._probes == [None] * 5
    fold = one._folds.of(inputs.train.groups)
    for out, pairs in enumerate(used):
        assert pairs.any() and not (fold[masks[pairs]] == out).any()
        assert not pairs[fold[rows] == out].any()


def test_masks_that_are_all_the_same_cannot_be_wrong(tmp_path: Path) -> None:
    def same(sample: Sample) -> None:
        sample.mask = np.eye(32, dtype=np.uint8)

    write_tiny_run(tmp_path, {}, COUNTS, change=same)
    one = judge(tmp_path, {"mask_match": {"extractor_size": 32}, "realism": QUICK["realism"]})
    assert list(one.calibration.thresholds) == ["realism"]


def test_empty_masks_have_no_score(tmp_path: Path) -> None:
    def empty(sample: Sample) -> None:
        if sample.sample_id.endswith("3"):
            sample.mask = np.zeros((32, 32), np.uint8)

    write_tiny_run(tmp_path, {}, COUNTS, change=empty)
    inputs = without_test(open_inputs(MaskPromptDataset.open(tmp_path / "dataset"), {}, None, 0))
    found = mask_match.Criterion(inputs, mask_match.Options(extractor_size=32)).scores(inputs.validation)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 13, 23]


def test_tails_go_on_beyond_the_rarest_score() -> None:
    scores = np.random.default_rng(0).exponential(size=2000)
    tail = LowerTail.of(-scores)
    assert tail.probabilities(np.array([-5.0, -0.5, 1.0])) == pytest.approx([np.exp(-5), np.exp(-0.5), 1], rel=0.4)
    assert np.isnan(tail.probabilities(np.array([np.nan]))[0])
    for probability in (1e-6, 0.01, 0.3, 1.0):
        assert tail.probabilities(np.array([tail.score_at(probability)]))[0] == pytest.approx(probability, abs=1e-3)
    assert tail.score_at(0) == -np.inf
    assert LowerTail.of(np.zeros(3)).probabilities(np.array([0.0, -1.0])).tolist() == [1, 0]


def calibrated(scores: dict[str, Any], fixed: dict[str, float], acceptance: float = 0.95) -> Calibration:
    random = np.random.default_rng(1)
    reference = {name: random.normal(size=3000) for name in scores if name not in fixed}
    groups = [str(i) for i in range(len(next(iter(scores.values()))))]
    return calibrate(scores, reference, {name: 1.0 + (name == "a") for name in reference}, fixed, groups, acceptance)


def test_thresholds_accept_the_stated_share_together() -> None:
    random = np.random.default_rng(0)
    scores = {name: random.normal(size=2000) for name in "abc"}
    found = calibrated(scores, {})
    assert found.accepted == pytest.approx(0.95, abs=0.001)
    assert found.accepted_unseen == pytest.approx(0.95, abs=0.01)
    assert found.warnings == []
    each = {name: float((scores[name] < found.thresholds[name]).mean()) for name in "abc"}
    assert each["a"] > 1.5 * each["b"] > 0
    fixed = calibrated({**scores, "d": np.where(np.arange(2000) < 40, -1.0, 1.0)}, {"d": 0.0})
    assert fixed.accepted == pytest.approx(0.95, abs=0.001)
    assert fixed.thresholds["d"] == 0
    absent = calibrated({**scores, "a": np.full(2000, np.nan)}, {})
    assert "a" not in absent.thresholds and absent.accepted == pytest.approx(0.95, abs=0.001)


def test_unseen_images_are_rejected_no_more_than_stated() -> None:
    """Conformal: exact on average over small validation sets, where a quantile is not."""
    random = np.random.default_rng(0)
    rejected = []
    for _ in range(400):
        scores = {name: random.normal(size=30) for name in "ab"}
        thresholds = calibrated(scores, {}).thresholds
        rejected.append(np.any([random.normal(size=200) < thresholds[name] for name in "ab"], axis=0).mean())
    assert 0.02 < np.mean(rejected) < 0.039  # 1 of 31


def test_images_without_a_criterion_leave_their_part_to_nobody() -> None:
    scores = np.where(np.arange(1000) < 900, np.nan, np.random.default_rng(0).normal(size=1000))
    found = calibrated({"a": scores}, {})
    assert (scores < found.thresholds["a"]).sum() == 4


def test_too_few_validation_images_reject_nothing() -> None:
    few = calibrated({"a": np.arange(18.0)}, {})
    assert (np.array([-1e30]) >= few.thresholds["a"]).all()
    assert "18 real validation images are too few" in few.warnings[0] and "at least 19 are needed" in few.warnings[0]
    enough = calibrated({"a": np.arange(19.0)}, {})
    assert enough.thresholds["a"] == pytest.approx(0, abs=1e-2) and enough.accepted == 1
    assert "rest on 19 real" in enough.warnings[0]
    assert "at least 9 are" in calibrated({"a": np.arange(8.0)}, {}, 0.9).warnings[0]
    copies = calibrated({"a": np.arange(40.0), "d": np.arange(40.0) - 4}, {"d": 0.0})
    assert "fixed threshold reject 4 of 40" in copies.warnings[0] and copies.accepted == 0.9


def test_scores_by_hand() -> None:
    odds = log_odds(np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), np.array([0, 2]))
    assert odds == pytest.approx([np.log(5 / 3), np.log(1 / 8)])
    points, reference = np.array([[0.0], [10.0]]), np.array([[1.0], [3.0], [12.0]])
    usable = np.array([[True, True, True], [False, False, False]])
    means = nearest_mean(points, reference, usable, 2)
    assert means[0] == pytest.approx(2)
    assert np.isnan(means[1])
    y = np.arange(64)
    waves = np.stack([np.tile(127 + 100 * np.sin(2 * np.pi * y * f), (64, 1)) for f in (1 / 32, 7 / 16)])
    assert power_spectra(waves.round().astype(np.uint8)).argmax(axis=1).tolist() == [0, 7]


def test_what_loses_more_than_the_rest_is_warned_of(run: Path) -> None:
    image_set = open_synthetic(run)
    members = subsets(image_set)
    assert {"disc", "square", SMALL} == set(members)
    one = judge(run, {"realism": QUICK["realism"]}).judge(image_set)
    only_discs = replace(one, rejected={"realism": members["disc"]})
    draw = Draw(0, image_set, np.arange(30), only_discs)
    assert any(
        text.startswith("disc: 100% of 15 images are rejected, and 0% of the others") for text in loss_warnings(draw)
    )
    assert loss_warnings(replace(draw, judgement=replace(one, rejected={"realism": np.zeros(30, bool)}))) == []


def open_synthetic(run: Path) -> ImageSet:
    return ImageSet("controlnet", MaskPromptDataset.open(run / "synthetic" / "controlnet"), "train")
