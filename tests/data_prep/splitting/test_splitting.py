from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskloom.data_prep.splitting.splits import Group, split_of_groups
from maskloom.pipeline.config.data import Splits
from maskloom.pipeline.errors import MaskLoomError

SHARES = Splits(train=0.7, validation=0.15, test=0.15)


def groups(sizes_by_label, split=None):
    return [
        Group(f"{label}-{i}", n, label, split) for label, sizes in sizes_by_label.items() for i, n in enumerate(sizes)
    ]


def rows_by(chosen, members, of):
    counts = Counter()
    for group in members:
        counts[of(group), chosen[group.name]] += group.rows
    return counts


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=40, max_size=120),
    st.lists(st.integers(1, 4), min_size=40, max_size=120),
    st.integers(0, 9),
)
def test_shares_of_rows_are_met_in_every_class(first, second, seed):
    members = groups({"a": first, "b": second})
    chosen = split_of_groups(members, SHARES, seed)
    counts = rows_by(chosen, members, lambda group: group.label)
    for label, sizes in (("a", first), ("b", second)):
        for split in ("train", "validation", "test"):
            assert abs(counts[label, split] - getattr(SHARES, split) * sum(sizes)) <= 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=3, max_size=12), st.integers(0, 9))
def test_few_groups_still_fill_every_split(sizes, seed):
    chosen = split_of_groups(groups({"a": sizes}), SHARES, seed)
    assert set(chosen.values()) == {"train", "validation", "test"}


def test_many_small_classes_fill_the_held_out_splits_together():
    members = groups({f"class-{i}": [1, 1, 1] for i in range(20)})
    counts = Counter(split_of_groups(members, SHARES, 0).values())
    assert abs(counts["validation"] - 9) <= 1 and abs(counts["test"] - 9) <= 1


def test_the_seed_decides_and_the_order_of_groups_does_not():
    members = groups({"a": [1] * 50, "b": [2] * 30})
    chosen = split_of_groups(members, SHARES, 0)
    assert split_of_groups(members[::-1], SHARES, 0) == chosen
    assert split_of_groups(members, SHARES, 1) != chosen


def test_a_share_of_zero_gives_no_split():
    chosen = split_of_groups(groups({"a": [1] * 10}), Splits(train=0.8, validation=0.0, test=0.2), 0)
    assert Counter(chosen.values()) == {"train": 8, "test": 2}


def test_splits_of_the_dataset_are_kept_and_take_nothing_else():
    official = groups({"official": [1] * 5}, split="test")
    free = groups({"free": [1] * 100})
    chosen = split_of_groups(official + free, SHARES, 0)
    assert all(chosen[group.name] == "test" for group in official)
    assert Counter(chosen[group.name] for group in free) == {"train": 83, "validation": 17}


def test_a_dataset_that_fixes_everything_is_taken_as_it_is():
    members = groups({"a": [1]}, split="train") + groups({"b": [1]}, split="test")
    assert split_of_groups(members, SHARES, 0) == {"a-0": "train", "b-0": "test"}


def test_free_groups_beside_three_fixed_splits_are_for_training():
    members = [g for s in ("train", "validation", "test") for g in groups({s: [1]}, split=s)] + groups({"free": [1, 1]})
    assert {split_of_groups(members, SHARES, 0)[f"free-{i}"] for i in (0, 1)} == {"train"}


def test_too_few_groups():
    with pytest.raises(MaskLoomError, match=r"2 group\(s\) cannot fill 3 splits .*data\.splits\.test=0"):
        split_of_groups(groups({"a": [5, 5]}), SHARES, 0)


def test_nothing_left_for_training():
    with pytest.raises(MaskLoomError, match="no group is left for the train split"):
        split_of_groups(groups({"a": [1, 1]}, split="test"), SHARES, 0)
