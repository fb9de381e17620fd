"""What is flagged, what it is compared with, and how near images are told to be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from maskloom.evaluate.metrics.memorisation import (
    FEATURES,
    PIXELS,
    Audit,
    Calibration,
    Options,
    audit_table,
    audit_verdict,
)
from maskloom.evaluate.scores import nearest
from maskloom.evaluate.scores.calibration import effective_count, too_few_held_out
from maskloom.evaluate.scores.nearest import Nearest, nearest_features, nearest_pixels
from maskloom.pipeline.results import CopyRow
from tests.evaluate.runs import answer, copied, tiny_inputs
from tests.tiny_datasets import Picture, Sample, tiny_picture, write_tiny_run

Floats = NDArray[np.float64]


def test_all_held_out_images_calibrate_the_threshold(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 8, "validation": 4, "test": 6})
    inputs = tiny_inputs(tmp_path, ("copied",))
    result = answer(inputs, "memorisation")
    assert inputs.made("copy search") is None, "its descriptors lie in memory beside features"
    assert result.values["held_out"]["n"] == 10
    assert "calibrated on only 10 held-out real images: the threshold is imprecise" in result.warnings


def test_what_is_no_nearer_than_held_out_images_is_not_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where held-out images are all but copies of training images themselves, a synthetic copy with
    as small a change is nothing unusual.
    """
    for check in ("require_no_held_out_copies", "require_no_altered_held_out_images"):  # they stop such a dataset
        monkeypatch.setattr(f"maskloom.evaluate.evaluate.{check}", lambda *_: None)

    def almost_same_everywhere(sample: Sample) -> None:
        number = int(sample.sample_id[-4:])
        sample.image, sample.mask = tiny_picture(number, 32, number % 2, 0)
        sample.image[0, 0] = {"train": 0, "validation": 60, "test": 120}[sample.sample_id.split("-")[0]]

    def almost_copied(parent: Sample, index: int) -> Picture:
        changed = parent.image.copy()
        changed[0, 0] = 90
        return changed

    write_tiny_run(
        tmp_path, {"copied": almost_copied}, {"train": 8, "validation": 4, "test": 4}, change=almost_same_everywhere
    )
    result = answer(tiny_inputs(tmp_path, ("copied",)), "memorisation")
    assert result.values["copied"][FEATURES]["flagged"] == 0


def test_shares_of_flagged_images(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 4})
    found = Nearest(np.zeros(4, np.int64), np.zeros(4))
    audit = Audit(
        tiny_inputs(tmp_path, ("copied",)).synthetic["copied"],
        {FEATURES: found, PIXELS: found},
        {FEATURES: np.array([True, True, False, False]), PIXELS: np.array([True, False, True, True])},
        {FEATURES: np.array([False, True, True, True]), PIXELS: np.array([True, True, True, False])},
        None,
    )
    values = audit_table(Options(), [audit])[1]["copied"]
    assert {space: values[space]["flagged"] for space in (FEATURES, PIXELS, "both")} == {
        FEATURES: 2,
        PIXELS: 3,
        "both": 1,
    }
    of_parents = [values[space]["parent_is_nearest"]["value"] for space in (FEATURES, PIXELS, "both")]
    assert of_parents == pytest.approx([1 / 2, 2 / 3, 0])
    # All four are flagged; the parent of three is nearest in a space that flags them.
    assert values["either"]["flagged"] == 4 and values["either"]["parent_is_nearest"]["value"] == 0.75
    verdict = audit_verdict([replace(audit, chance=0.2)], Options())
    assert "(for 75% of the flagged images, the nearest training image is the one whose mask was used)" in verdict


def test_the_verdict_says_how_many_copies_are_close(tmp_path: Path) -> None:
    """A copy of a part is not close as a whole image; without copies there is nothing to explain."""
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 4})
    found = Nearest(np.zeros(4, np.int64), np.zeros(4))
    image_set = tiny_inputs(tmp_path, ("copied",)).synthetic["copied"]
    flagged = dict.fromkeys((FEATURES, PIXELS), np.array([True, False, False, False]))
    names = image_set.columns["sample_id"]
    copies = [
        CopyRow(sample_id=name, original="o", transformation="", measure="part", similarity=1, threshold=0.9)
        for name in (names[0], names[2], names[3])
    ]
    audit = Audit(image_set, dict.fromkeys(flagged, found), flagged, flagged, None, copies)
    assert "The two rules differ" in audit_verdict([audit], Options())
    assert "A copy counts, close or not; close as well are: copied 1 of 3 copies." in audit_verdict([audit], Options())
    assert "The two rules differ" not in audit_verdict([replace(audit, copies=[])], Options())


@pytest.mark.parametrize(("flagged", "named"), [(2, False), (6, True)])
def test_a_generator_is_named_where_more_is_flagged_than_chance_explains(
    tmp_path: Path, flagged: int, named: bool
) -> None:
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 20})
    found = Nearest(np.zeros(20, np.int64), np.zeros(20))
    some = {space: np.arange(20) < flagged for space in (FEATURES, PIXELS)}
    image_set = tiny_inputs(tmp_path, ("copied",)).synthetic["copied"]
    audit = Audit(image_set, {FEATURES: found, PIXELS: found}, some, some, chance=0.2)
    verdict = audit_verdict([audit], Options())
    assert ("copied is closer to training images" in verdict) == named
    assert ("no sign of copying" in verdict) != named
    assert verdict.startswith("20 images, no copy of a training image. ")
    assert "chance reaches 20.0%" in verdict
    untold = audit_verdict([replace(audit, chance=None)], Options(), "7 held-out real images are fewer than 40")
    assert "Finding: cannot tell" in untold and "7 held-out real images are fewer than 40." in untold
    assert "no sign of copying" not in untold and "copied is closer" not in untold


def of_two_spaces(random: np.random.Generator, count: int, agreement: float) -> dict[str, Floats]:
    """Return distances as far from the training images as those of any other such call."""
    first, other = random.normal(size=(2, count))
    return {FEATURES: first, PIXELS: agreement * first + np.sqrt(1 - agreement**2) * other}


def judged_nearness(held_out: int, synthetic: int, planted: float, agreement: float) -> list[bool | None]:
    """Return, of many sets as far away as real images, whether they are called nearer; None: not told."""
    found: list[bool | None] = []
    for trial in range(150):
        random = np.random.default_rng([held_out, synthetic, trial])
        calibration = Calibration.of(of_two_spaces(random, held_out, agreement), [*map(str, range(held_out))], 5)
        distances = of_two_spaces(random, synthetic, agreement)
        flagged = np.any([distances[name] < calibration.thresholds[name] for name in distances], axis=0)
        flagged[: int(planted * synthetic)] = True
        chance = calibration.chance(distances, [*map(str, range(synthetic))])
        found.append(None if chance is None else bool(flagged.mean() > chance))
    return found


@pytest.mark.parametrize("agreement", [0, 0.7])
@pytest.mark.parametrize(("held_out", "synthetic"), [(18, 28), (40, 150), (81, 150), (81, 1000), (172, 4000)])
def test_nearness_is_rarely_found_in_sets_as_far_away_as_real_images(
    held_out: int, synthetic: int, agreement: float
) -> None:
    """The threshold rests on few held-out images, so that it varies too."""
    found = judged_nearness(held_out, synthetic, 0, agreement)
    assert np.mean([one is True for one in found]) <= 0.07
    assert all(one is None for one in found) == (held_out < 40)


def test_planted_nearness_is_found() -> None:
    assert np.mean(judged_nearness(81, 150, 0.3, 0.7)) > 0.95


def test_nearness_needs_groups() -> None:
    assert too_few_held_out(["a"] * 30 + ["b"] * 30, 5).endswith("are of 2 group(s), fewer than 10")
    assert too_few_held_out([*map(str, range(39))], 5) == "39 held-out real images are fewer than 40"
    assert too_few_held_out([*map(str, range(40))], 5) == ""
    assert too_few_held_out([*map(str, range(20))], 10) == ""


def test_images_of_a_group_count_as_fewer() -> None:
    """Ten slices each of ten brains that are all alike tell as much as ten images."""
    groups = [str(index // 10) for index in range(100)]
    random = np.random.default_rng(0)
    alike = {PIXELS: np.repeat(random.normal(size=10), 10) + 1e-6 * random.normal(size=100)}
    apart = {PIXELS: random.normal(size=100)}
    assert effective_count(alike, groups) == pytest.approx(10, rel=0.05)
    assert effective_count(apart, groups) > 60
    assert effective_count(apart, [str(index) for index in range(100)]) == pytest.approx(100)
    assert effective_count(apart, ["one"] * 100) == 100


def test_pixels_are_as_far_apart_as_plain_correlations_say() -> None:
    """A constant training image resembles nothing."""
    random = np.random.default_rng(0)
    images, train = (random.integers(0, 256, (count, 64, 64), dtype=np.uint8) for count in (4, 6))
    train[2] = 255
    found = nearest_pixels(images, train)
    varied = [row for row in range(6) if row != 2]
    expected = np.max(
        [
            [[np.corrcoef(one.ravel(), train[row].ravel())[0, 1] for row in varied] for one in variant]
            for whole in nearest.variants(images)
            for variant in (whole, whole[:, :, ::-1])
        ],
        axis=0,
    )
    assert found.index.tolist() == [varied[column] for column in expected.argmax(axis=1)]
    assert found.distance == pytest.approx(1 - expected.max(axis=1), abs=1e-5)


def test_every_image_is_compared_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    features, train = random.normal(size=(7, 4)), random.normal(size=(5, 4))
    images, pictures = (random.integers(0, 256, (count, 64, 64), dtype=np.uint8) for count in (7, 5))
    images[6] = pictures[3][:, ::-1]
    whole = nearest_features(features, train), nearest_pixels(images, pictures)
    monkeypatch.setattr(nearest, "CHUNK", 3)
    parts = nearest_features(features, train), nearest_pixels(images, pictures)
    for one, other in zip(whole, parts, strict=True):
        assert one.index.tolist() == other.index.tolist()
        assert one.distance == pytest.approx(other.distance, abs=1e-6)
    distances = np.linalg.norm(features[:, None] - train[None], axis=2)
    assert whole[0].index.tolist() == distances.argmin(axis=1).tolist()
    assert whole[0].distance == pytest.approx(distances.min(axis=1))
    assert (whole[1].index[6], whole[1].distance[6]) == (3, pytest.approx(0, abs=1e-6))
