import numpy as np
import pytest
from scipy import stats

from maskloom.evaluate.scores.statistics import (
    Bootstrap,
    bootstrap_weights,
    difference,
    estimate,
    expanded_tail,
    jackknife_interval,
    separation_interval,
    share_interval,
    weighted_mean,
)
from maskloom.pipeline.results import Interval


def test_bootstrap_draws_whole_groups() -> None:
    groups = ["a", "a", "b", "c", "c", "c"]
    weights = bootstrap_weights(groups, 50, seed=0)
    assert weights.shape == (50, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()


def test_draws_follow_their_seed() -> None:
    first, again, other = (bootstrap_weights(["a", "b", "c"], 20, seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_draws_in_which_a_figure_is_not_defined_are_left_out() -> None:
    """Two of six groups have a value: each alone is enough for a figure, but many draws hold
    neither.
    """
    values = np.array([0.2, 0.4, np.nan, np.nan, np.nan, np.nan])
    interval = Bootstrap([str(i) for i in range(6)]).interval(weighted_mean(values))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.3, 0.2, 0.4))


def test_bootstrap_equals_explicit_resampling_of_groups() -> None:
    values, groups = np.arange(6.0), ["a", "a", "b", "c", "c", "c"]
    for row in bootstrap_weights(groups, 20, seed=1):
        repeated = np.repeat(values, row.astype(int))
        assert weighted_mean(values)(row[None])[0] == pytest.approx(repeated.mean())


@pytest.mark.parametrize("clusters", [8, 30])
def test_interval_covers_the_truth_with_clustered_data(clusters: int) -> None:
    random, covered = np.random.default_rng(0), 0
    groups = [f"{i // 4}" for i in range(4 * clusters)]
    for trial in range(300):
        values = np.repeat(random.normal(0, 1, clusters), 4) + random.normal(0, 0.5, 4 * clusters)
        interval = Bootstrap(groups, 400, trial).interval(weighted_mean(values))
        covered += interval.low <= 0 <= interval.high
    assert 0.91 <= covered / 300 <= 0.985


def test_image_level_interval_would_be_too_narrow() -> None:
    random = np.random.default_rng(0)
    values = np.repeat(random.normal(0, 1, 20), 10)
    clustered = Bootstrap([f"{i // 10}" for i in range(200)]).interval(weighted_mean(values))
    naive = Bootstrap([str(i) for i in range(200)]).interval(weighted_mean(values))
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_paired_difference_is_narrower_than_unpaired() -> None:
    random = np.random.default_rng(0)
    base = random.normal(0, 1, 60)
    groups = [str(i) for i in range(60)]
    higher = base + 0.1 + random.normal(0, 1e-3, 60)
    paired = Bootstrap(groups).interval(difference(weighted_mean(higher), weighted_mean(base)))
    assert (paired.low, paired.high) == (pytest.approx(0.1, abs=1e-3), pytest.approx(0.1, abs=1e-3))


def test_one_group_gives_no_interval() -> None:
    interval = Bootstrap(["a"] * 5).interval(weighted_mean(np.arange(5.0)))
    assert interval == Interval(value=2.0, low=None, high=None)


def test_figure_that_rests_on_one_group_gives_no_interval() -> None:
    values = np.array([np.nan, np.nan, 0.5, 0.7])
    interval = Bootstrap(["a", "b", "c", "c"]).interval(weighted_mean(values))
    assert interval.value == pytest.approx(0.6)
    assert interval.low is None


def test_undefined_statistic_gives_no_value() -> None:
    assert Bootstrap(["a", "b"]).interval(weighted_mean(np.array([np.nan, np.nan]))).value is None


def test_missing_values_are_left_out_of_a_mean() -> None:
    assert estimate(weighted_mean(np.array([1.0, np.nan, 3.0])), 3) == 2.0


def test_expanded_tail_reaches_the_t_interval() -> None:
    assert -stats.norm.ppf(expanded_tail(5)) == pytest.approx(np.sqrt(5 / 4) * stats.t.ppf(0.975, 4))
    assert expanded_tail(100_000) == pytest.approx(0.025, rel=1e-3)


def test_jackknife_of_a_mean_is_the_t_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 25)
    interval = jackknife_interval(values.mean(), [np.delete(values, i).mean() for i in range(25)])
    low, high = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_jackknife_of_one_block_has_no_ends() -> None:
    assert jackknife_interval(1.0, [1.0]) == Interval(value=1.0)


def test_share_interval_is_wilsons() -> None:
    hits, total, z = 3, 40, stats.norm.ppf(0.975)
    centre = (hits + z**2 / 2) / (total + z**2)
    reach = z / (total + z**2) * np.sqrt(hits * (total - hits) / total + z**2 / 4)
    interval = share_interval(hits, total)
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (hits / total, centre - reach, centre + reach)
    )
    assert share_interval(0, 0) == Interval(value=None)
    assert share_interval(0, 10).high > 0.2


@pytest.mark.parametrize(("value", "low", "high"), [(1.0, 0.025 ** (1 / 6), 1), (0.0, 0, 1 - 0.025 ** (1 / 6))])
def test_shares_of_all_or_nothing_have_the_exact_interval_over_groups(value: float, low: float, high: float) -> None:
    found = Bootstrap([f"{i // 5}" for i in range(30)]).interval(weighted_mean(np.full(30, value)), share=True)
    assert (found.value, found.low, found.high) == (value, pytest.approx(low), pytest.approx(high))


def test_draws_that_are_all_alike_give_no_interval() -> None:
    assert Bootstrap(list("aabbcc")).interval(weighted_mean(np.full(6, 0.4))).low is None
    almost = np.add(0.4, [0, 0, 6e-17, 6e-17, -6e-17, 0])  # as sums are rounded on other processors
    assert Bootstrap(list("aabbcc")).interval(weighted_mean(almost)).low is None
    ones = Bootstrap(list("aabbcc")).interval(lambda weights: np.full(len(weights), 1 - 1e-16), share=True)
    assert ones.low is not None and ones.high == 1


def test_samples_that_are_wholly_told_apart_are_not_certain() -> None:
    groups = list("abcdef")
    found = separation_interval(np.arange(6.0), np.arange(6.0) + 10, groups, [one * 2 for one in groups])
    assert (found.value, found.low, found.high) == (1.0, pytest.approx(0.025 ** (1 / 6)), 1.0)


def test_interval_reads_as_in_the_verdict() -> None:
    assert str(Interval(value=0.012, low=-0.004, high=0.027)) == "+0.012 [-0.004, 0.027]"
    assert str(Interval(value=0.012)) == "+0.012 [no interval]"
    assert str(Interval(value=None)) == "not defined"


@pytest.mark.parametrize("group", [0, 150, 299])
def test_a_figure_that_rests_on_one_of_many_groups_has_no_interval(group: int) -> None:
    """Groups are left out a few at a time; whichever part the one lies in, it is found."""
    values = np.full(600, np.nan)
    values[2 * group : 2 * group + 2] = 0.2, 0.6
    found = Bootstrap([f"{number // 2:04}" for number in range(600)], 200).interval(weighted_mean(values))
    assert (found.value, found.low, found.high) == (pytest.approx(0.4), None, None)
    values[:2], values[-2:] = 0.1, 0.9
    assert (
        Bootstrap([f"{number // 2:04}" for number in range(600)], 200).interval(weighted_mean(values)).low is not None
    )
