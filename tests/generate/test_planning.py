from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskloom.generate.planning import (
    MAX_PARENTS,
    TrainRow,
    check_parents_are_train,
    group_by_label,
    label_counts,
    noise_seed,
    plan_rows,
    read_parents,
    replacement_parents,
)
from maskloom.pipeline.config.generate import GenerateConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from tests.tiny_datasets import write_tiny_run

LABELS = ("benign", "malignant", "normal")


def parents(labels: str = "00000112") -> list[TrainRow]:
    """Return train rows with one label a letter; `-` is none."""
    return [
        TrainRow(i, f"row-{i}", f"group-{i}", None if letter == "-" else int(letter), {})
        for i, letter in enumerate(labels)
    ]


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(3, 60), seed=st.integers(0, 2**31 - 1), sources=st.sampled_from([["train"], ["train", "warped"]])
)
def test_a_number_of_images_is_spread_evenly(count: int, seed: int, sources: list[str]):
    rows = plan_rows(parents(), LABELS, GenerateConfig(num_images=count, mask_source=sources), seed)
    counts = label_counts(rows, LABELS).values()
    assert [row.index for row in rows] == list(range(count))
    assert max(counts) - min(counts) <= 1
    by_source = Counter((row.parent.label, row.source) for row in rows)
    for label in range(3):
        shares = [by_source[label, source] for source in sources]
        assert max(shares) - min(shares) <= 1


def test_exact_counts_by_class():
    config = GenerateConfig(images_per_class={"benign": 3, "normal": 9, "malignant": 0})
    assert label_counts(plan_rows(parents(), LABELS, config, 0), LABELS) == {"benign": 3, "normal": 9}


def test_by_default_as_many_as_train_has():
    rows = plan_rows(parents("0001-"), LABELS, GenerateConfig(), 0)
    assert label_counts(rows, LABELS) == {"benign": 3, "malignant": 1, "none": 1}


def test_datasets_without_labels():
    assert len(plan_rows(parents("----"), (), GenerateConfig(num_images=6), 0)) == 6


def test_the_plan_depends_on_the_seed_alone():
    config = GenerateConfig(num_images=20)
    first, again, other = (plan_rows(parents(), LABELS, config, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({row.seed for row in first + other}) == 40


def test_a_source_uses_every_mask_before_it_uses_one_twice():
    rows = plan_rows(parents("00000"), LABELS, GenerateConfig(num_images=10, mask_source=["train"]), 0)
    assert set(Counter(row.parent.sample_id for row in rows).values()) == {2}


def test_any_run_of_rows_is_nearly_balanced():
    rows = plan_rows(parents(), LABELS, GenerateConfig(num_images=30), 0)
    assert label_counts(rows[:15], LABELS) == {"benign": 5, "malignant": 5, "normal": 5}


def test_noise_seeds_are_short_and_distinct():
    assert all(0 <= noise_seed(0, index) < 2**32 for index in range(100))
    assert len({noise_seed(0, index) for index in range(1000)}) == 1000


def test_replacements_are_others_of_the_same_class():
    candidates = parents("0" * 30 + "1")
    row = plan_rows(candidates, LABELS, GenerateConfig(images_per_class={"benign": 1}), 0)[0]
    tried = list(replacement_parents(row, group_by_label(candidates), 0))
    assert tried[0] is row.parent
    assert len({parent.sample_id for parent in tried}) == MAX_PARENTS
    assert {parent.label for parent in tried} == {0}


def test_orders_of_masks_are_drawn_by_seed_source_and_row():
    candidates = parents("0" * 30)

    def order(seed: int, source: str) -> list[str]:
        rows = plan_rows(candidates, LABELS, GenerateConfig(num_images=60, mask_source=["train", "warped"]), seed)
        return [row.parent.sample_id for row in rows if row.source == source]

    assert order(1, "train") != order(2, "train")
    assert order(1, "train") != order(1, "warped")
    rows = plan_rows(candidates, LABELS, GenerateConfig(num_images=2), 0)
    same_parent = [replace(row, parent=candidates[0]) for row in rows]
    tried = [[one.sample_id for one in replacement_parents(row, group_by_label(candidates), 0)] for row in same_parent]
    other_seed = [one.sample_id for one in replacement_parents(same_parent[0], group_by_label(candidates), 1)]
    assert tried[0] != tried[1]
    assert tried[0] != other_seed


def test_a_mask_is_not_tried_twice_for_a_row():
    candidates = parents("0" * MAX_PARENTS)
    for row in plan_rows(candidates, LABELS, GenerateConfig(images_per_class={"benign": 5}), 0):
        tried = list(replacement_parents(row, group_by_label(candidates), 0))
        assert {parent.sample_id for parent in tried} == {parent.sample_id for parent in candidates}
        assert len(tried) == MAX_PARENTS


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"benin": 3}, "images_per_class.benin: the dataset has no such class: did you mean 'benign'"),
        ({"benign": -1}, "images_per_class.benign=-1: a count must not be negative"),
        ({"normal": 1}, "images_per_class.normal=1: no train row has this class"),
        ({"benign": 0}, "all counts are zero"),
    ],
)
def test_impossible_counts(asked: dict[str, int], message: str):
    with pytest.raises(MaskLoomError, match=message):
        plan_rows(parents("01"), LABELS, GenerateConfig(images_per_class=asked), 0)


COUNTS = {"train": 4, "validation": 2, "test": 2, "external_other": 2}


@pytest.mark.parametrize("split", ["validation", "test", "external_other"])
def test_held_out_masks_are_refused(tmp_path: Path, split: str):
    write_tiny_run(tmp_path, {}, COUNTS)
    with pytest.raises(MaskLoomError, match=f"masks of the {split} split must not be seen"):
        read_parents(MaskPromptDataset.open(tmp_path / "dataset"), split)


@pytest.mark.parametrize("split", ["validation", "test", "external_other"])
@pytest.mark.parametrize("name", ["sample", "group"])
def test_a_planned_row_of_a_held_out_sample_or_group_is_refused(tmp_path: Path, name: str, split: str):
    write_tiny_run(tmp_path, {}, COUNTS)
    sample, group = (f"{split}-0000", "x") if name == "sample" else ("x", f"{split}-group-0000")
    rows = plan_rows([TrainRow(0, sample, group, 0, {})], LABELS, GenerateConfig(), 0)
    with pytest.raises(MaskLoomError, match=rf"the mask of '{split}-.*0000' lies in the {split} split"):
        check_parents_are_train(rows, MaskPromptDataset.open(tmp_path / "dataset"))


def test_rows_of_the_train_split_pass(tmp_path: Path):
    write_tiny_run(tmp_path, {}, COUNTS)
    dataset = MaskPromptDataset.open(tmp_path / "dataset")
    rows = plan_rows(read_parents(dataset), LABELS, GenerateConfig(num_images=8), 0)
    assert {row.parent.sample_id.split("-")[0] for row in rows} == {"train"}
    check_parents_are_train(rows, dataset)
