"""Scores of predicted masks, against scikit-image and SciPy; which images they are of; how they are shown."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter
from scipy.spatial.distance import cdist
from skimage.measure import label, regionprops
from skimage.metrics import hausdorff_distance

from maskloom.evaluate.downstream.compare import compare, score_names
from maskloom.evaluate.downstream.comparison import compare_test_sets
from maskloom.evaluate.downstream.directions import is_lower_better
from maskloom.evaluate.scores.segmentation import (
    FALSE_POSITIVES,
    HD95,
    SENSITIVITY,
    SIZES,
    SegmentationScores,
    hausdorff_distances,
    lesion_areas,
    match_lesions,
    surface_dice,
)
from tests.evaluate.cases import dice_cases
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import Sample, write_tiny_run

LESION = ("background", "lesion")


def blobs(count: int, seed: int, classes: int = 2, side: int = 48) -> np.ndarray:
    """Return masks with smooth regions of every foreground class, (count, side, side)."""
    random = np.random.default_rng(seed)
    fields = gaussian_filter(random.standard_normal((count, classes, side, side)), (0, 0, 4, 4))
    fields[:, 0] += 0.05
    return fields.argmax(axis=1).astype(np.uint8)


def edge(region: np.ndarray) -> np.ndarray:
    """Return the pixels of a region with a neighbour outside it, at sides, (P, 2); the image ends at its border."""
    inside = np.pad(region, 1)
    around = [np.roll(inside, step, axis)[1:-1, 1:-1] for axis in (0, 1) for step in (-1, 1)]
    return np.argwhere(region & ~np.logical_and.reduce(around))


def test_hd95_equals_an_independent_one() -> None:
    predictions, masks = blobs(12, 0), blobs(12, 1)
    for n, found in enumerate(hausdorff_distances(predictions, masks, 2)):
        distances = cdist(edge(predictions[n] == 1), edge(masks[n] == 1))
        expected = max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))
        assert found == pytest.approx(expected, abs=1e-6 * expected)
        assert found <= hausdorff_distance(predictions[n] == 1, masks[n] == 1) + 1e-6


@pytest.mark.parametrize("tolerance", [0, 1, 2.5])
def test_surface_dice_equals_an_independent_one(tolerance: float) -> None:
    predictions, masks = blobs(12, 2), blobs(12, 3)
    for n, found in enumerate(surface_dice(predictions, masks, 2, tolerance)):
        sides = [edge(one[n] == 1) for one in (predictions, masks)]
        maps = [distance_transform_edt(~np.isin(np.arange(48 * 48).reshape(48, 48), p @ [48, 1])) for p in sides]
        near = sum((maps[1 - k][tuple(points.T)] <= tolerance).sum() for k, points in enumerate(sides))
        assert found == pytest.approx(near / sum(map(len, sides)), abs=1e-6)


def test_boundaries_are_means_over_the_classes_in_the_mask() -> None:
    predictions, masks = blobs(6, 4, classes=3), blobs(6, 5, classes=3)
    predictions[0], masks[0][masks[0] == 2] = 1, 0
    for score in (hausdorff_distances, lambda p, m, k: surface_dice(p, m, k, 2)):
        together = score(predictions, masks, 3)
        each = [score((predictions == k).astype(np.uint8), (masks == k).astype(np.uint8), 2) for k in (1, 2)]
        assert together == pytest.approx(np.nanmean(each, axis=0))


def test_a_missed_class_has_the_worst_boundary_and_an_empty_mask_none() -> None:
    mask, empty = np.zeros((1, 30, 40), dtype=np.uint8), np.zeros((1, 30, 40), dtype=np.uint8)
    mask[0, 3:9, 4:9] = 1
    assert hausdorff_distances(empty, mask, 2).tolist() == [50]
    assert surface_dice(empty, mask, 2, 2).tolist() == [0]
    assert hausdorff_distances(mask, mask, 2).tolist() == [0]
    assert surface_dice(mask, mask, 2, 2).tolist() == [1]
    assert np.isnan([hausdorff_distances(mask, empty, 2), surface_dice(mask, empty, 2, 2)]).all()


def test_lesions_are_matched_as_by_scikit_image() -> None:
    for prediction, mask in zip(blobs(20, 6), blobs(20, 7), strict=True):
        shifted = np.where(np.arange(48) < 24, mask, prediction)  # half of each: lesions that match and others
        found = match_lesions(shifted, mask)
        regions = [regionprops(label(one, connectivity=2)) for one in (shifted, mask)]
        pixels = [[set(map(tuple, region.coords)) for region in one] for one in regions]
        overlap = np.array([[len(p & t) / len(p | t) for p in pixels[0]] for t in pixels[1]])
        assert found.areas.tolist() == [len(one) for one in pixels[1]] == lesion_areas(mask).tolist()
        assert found.found.tolist() == (overlap >= 0.1).any(axis=1).tolist()
        assert found.false_positives == (overlap < 0.1).all(axis=0).sum()


def test_lesions_that_touch_at_a_corner_are_one() -> None:
    mask = np.eye(4, dtype=np.uint8)
    assert lesion_areas(mask).tolist() == [4]
    match = match_lesions(np.zeros_like(mask), mask)
    assert (match.found.tolist(), match.false_positives) == ([False], 0)
    match = match_lesions(mask, np.zeros_like(mask))
    assert (match.found.tolist(), match.false_positives) == ([], 1)


def squares(*sides: int) -> np.ndarray:
    """Return masks of 32 x 32 with one square each; side 0 leaves a mask empty."""
    masks = np.zeros((len(sides), 32, 32), dtype=np.uint8)
    for mask, side in zip(masks, sides, strict=True):
        mask[4 : 4 + side, 4 : 4 + side] = 1
    return masks


def test_the_headline_is_of_lesion_images_with_all_images_beside_it() -> None:
    masks, predictions = squares(2, 4, 8, 0, 0), squares(0, 4, 8, 0, 8)
    found = SegmentationScores.of(masks, LESION, 2.0).scores(predictions, masks)
    np.testing.assert_array_equal(found["Dice"], [0, 1, 1, np.nan, np.nan])
    np.testing.assert_array_equal(found["IoU"], [0, 1, 1, np.nan, np.nan])
    assert found["Dice, all images"].tolist() == [0, 1, 1, 1, 0]
    assert found["IoU, all images"].tolist() == [0, 1, 1, 1, 0]
    np.testing.assert_array_equal(found[SENSITIVITY], [0, 1, 1, np.nan, np.nan])
    assert found[FALSE_POSITIVES].tolist() == [0, 0, 0, 0, 1]
    for k, name in enumerate(SIZES):
        np.testing.assert_array_equal(found[f"{SENSITIVITY} ({name})"], np.where(np.arange(5) == k, k > 0, np.nan))


def test_without_empty_masks_there_is_one_dice_and_without_three_lesions_no_size() -> None:
    masks = squares(4, 8)
    found = SegmentationScores.of(masks, LESION, 1.5).scores(masks, masks)
    assert list(found) == ["Dice", "IoU", HD95, "surface Dice at 1.5 pixels", SENSITIVITY, FALSE_POSITIVES]


def test_scores_of_a_part_are_those_of_the_whole() -> None:
    predictions, masks = blobs(9, 8, classes=3), blobs(9, 9, classes=3)
    masks[4] = 0
    scored = SegmentationScores.of(masks, ("background", "a", "b"), 2.0)
    whole, part = scored.scores(predictions, masks), scored.scores(predictions[5:], masks[5:])
    assert "Dice of a" in whole
    for name, values in whole.items():
        np.testing.assert_array_equal(part[name], values[5:])


def test_each_score_has_a_direction() -> None:
    masks = squares(2, 4, 8, 0)
    lower = [name for name in SegmentationScores.of(masks, LESION, 2.0).scores(masks, masks) if is_lower_better(name)]
    assert lower == [HD95, FALSE_POSITIVES]


def test_distances_and_counts_keep_intervals_beyond_1() -> None:
    random = np.random.default_rng(0)
    arms = {"real": random.normal(20, 4, (3, 40)), "real_synthetic": random.normal(14, 4, (3, 40))}
    cases = dice_cases(arms, score=HD95)
    [change] = compare(cases)
    assert (change.better, change.finding) == ("lower", "helped")
    found = compare_test_sets([cases], HD95, None, "controlnet").values
    assert found["arms"]["real"][HD95]["low"] > 15
    assert found["differences"]["real_synthetic"][HD95]["low"] < -4
    assert "by -" in compare_test_sets([cases], HD95, None, "controlnet").verdict


def test_images_without_lesion_are_counted_in_no_warning() -> None:
    random = np.random.default_rng(0)
    arms = {name: random.uniform(0.5, 0.9, (3, 30)) for name in ("real", "real_synthetic")}
    for values in arms.values():
        values[:, :8] = np.nan
    found = compare_test_sets([dice_cases(arms)], "Dice", None, "controlnet")
    assert "22 test images in 22 groups" in found.verdict
    assert not any("not defined" in text for text in found.warnings)
    assert "22 cases, 22 groups, 3 seeds" in {row.basis for forest in found.forests for row in forest.rows}
    assert any("With these 22 test groups" in text for text in found.would_change)
    arms["real"][:, 9] = np.nan
    found = compare_test_sets([dice_cases(arms)], "Dice", None, "controlnet")
    assert any(text.startswith("1 case(s) and 0 seed(s) are not defined") for text in found.warnings)


def test_a_run_with_normal_images_leads_with_the_others(tmp_path: Path) -> None:
    def some_normal(sample: Sample) -> None:
        if sample.sample_id in ("test-0001", "test-0003", "test-0005"):
            sample.mask = np.zeros_like(sample.mask)

    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "test": 16}, change=some_normal)
    result = answer(tiny_inputs(tmp_path, ("faithful",)), "downstream_segmentation", seeds=3)
    [own] = result.cases
    assert score_names(own)[:4] == ["Dice", "IoU", "Dice, all images", "IoU, all images"]
    assert "13 test images in" in result.verdict
    assert any("the 13 of 16 test images whose mask has a foreground" in text for text in result.limits)
    assert not any("contain no" in text or "not defined" in text for text in result.warnings)
    assert all(f"{SENSITIVITY} (" not in row[1] for row in result.tables[0].rows)


def test_a_test_set_without_any_lesion_is_skipped(tmp_path: Path) -> None:
    def normal(sample: Sample) -> None:
        if sample.sample_id.startswith("test"):
            sample.mask = np.zeros_like(sample.mask)

    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 8, "test": 8}, change=normal)
    result = answer(tiny_inputs(tmp_path, ("faithful",)), "downstream_segmentation", seeds=1)
    assert "no mask of real test has a foreground" in result.verdict
