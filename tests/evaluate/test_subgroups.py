"""Comparisons within parts of a test set."""

from pathlib import Path

import numpy as np

from maskloom.evaluate.downstream.subgroups import SIZES, by_size, subgroup_table
from tests.evaluate.cases import dice_cases
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import write_tiny_run

BASE = np.random.default_rng(0).uniform(0.4, 0.6, (3, 30))


def test_sizes_are_thirds_by_area_and_empty_masks_are_left_out() -> None:
    masks = np.zeros((7, 4, 4), np.uint8)
    for i in range(7):
        masks[i].flat[:i] = 1
    assert by_size("abcdefg", masks) == dict(zip(SIZES, (["b", "c"], ["d", "e"], ["f", "g"]), strict=True))


def test_each_part_has_its_own_change_numbers_and_finding() -> None:
    gain = np.where(np.arange(30) < 15, 0.2, 0.0) + np.random.default_rng(1).normal(0, 0.01, BASE.shape)
    cases = dice_cases({"real": BASE, "real_synthetic": BASE + gain})
    parts = {"first": cases.samples[:15], "few": cases.samples[25:], "none": ()}
    table = subgroup_table(cases, "real_synthetic", "Dice", parts)
    assert table is not None
    assert table.note.startswith("Exploratory: the findings are not adjusted")
    assert [row[0] for row in table.rows] == ["first", "few"]
    assert [row[2] for row in table.rows] == ["helped", "cannot tell"]
    assert [row[4:] for row in table.rows] == [[15, 15, 3], [5, 5, 3]]
    assert subgroup_table(cases, "real_synthetic", "Dice", {}) is None


def test_a_classifier_is_compared_within_classes_and_sizes(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "test": 16})
    result = answer(tiny_inputs(tmp_path, ("faithful",)), "downstream_classification")
    (table,) = result.subgroups
    assert table.title == "Where it helps: real + synthetic, balanced accuracy on the real test"
    assert "Within one class, balanced accuracy is the share of its images that are recognised." in table.note
    parts = [row[0] for row in table.rows]
    assert parts[0] == "all of the real test"
    assert parts[-len(SIZES) :] == list(SIZES)
    assert any(str(part).startswith("class ") for part in parts)
    classes = [row for row in table.rows if str(row[0]).startswith("class ")]
    assert sum(row[4] for row in classes) == table.rows[0][4] == 16
