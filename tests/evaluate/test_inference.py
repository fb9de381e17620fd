"""The interval over cases and seeds, against independent computations and simulations."""

import numpy as np
import pytest
from scipy import stats

from maskloom.evaluate.scores.inference import (
    QUANTILES,
    Variance,
    critical_value,
    estimate_effect,
    group_numbers,
    group_skewness,
    holm_adjusted,
    intraclass_correlation,
    p_value,
    seeds_are_paired,
    variance_of_mean,
)


def names(sizes: list[int]) -> list[str]:
    return [f"{k}" for k, size in enumerate(sizes) for _ in range(size)]


def by_matrices(values: np.ndarray, sizes: list[int]) -> tuple[float, float]:
    """Return the groups' variance and degrees of freedom from matrices of groups: leave each out, in so many words."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    case = values.mean(axis=0)
    left_out = np.array([case[groups != k].mean() for k in range(len(sizes))])
    jackknife = (len(sizes) - 1) / len(sizes) * ((left_out - left_out.mean()) ** 2).sum()
    weights = np.array([[0 if j == k else sizes[j] for j in range(len(sizes))] for k in range(len(sizes))], dtype=float)
    weights /= weights.sum(axis=1, keepdims=True)
    centred = weights - weights.mean(axis=0)
    form = (len(sizes) - 1) / len(sizes) * centred.T @ centred
    rho = intraclass_correlation(case, groups)
    model = np.diag(rho + (1 - rho) / np.array(sizes))
    shares = np.array(sizes) / sum(sizes)
    product = form @ model
    df = np.trace(product) ** 2 / np.trace(product @ product)
    return jackknife * (shares @ model @ shares) / np.trace(product), max(df, 1)


@pytest.mark.parametrize("sizes", [[1] * 8, [3] * 5, [20, 5, 2, 1, 1], [40, 1, 1, 1, 1, 1], [7, 3]])
def test_groups_variance_equals_matrices_of_left_out_groups(sizes: list[int]) -> None:
    random = np.random.default_rng(sum(sizes))
    values = random.normal(size=(3, sum(sizes))) + np.repeat(random.normal(size=len(sizes)), sizes)
    found = variance_of_mean(values.mean(axis=0), [values], group_numbers(names(sizes)))
    assert (found.groups, found.groups_df) == pytest.approx(by_matrices(values, sizes), rel=1e-9)


def test_equal_groups_without_seed_effects_give_the_t_interval_of_group_means() -> None:
    random = np.random.default_rng(0)
    by_group = random.normal(0.3, 1, 12)
    values = np.tile(np.repeat(by_group, 4), (3, 1))
    found = estimate_effect(values, names([4] * 12))
    low, high = stats.t.interval(0.95, 11, by_group.mean(), by_group.std(ddof=1) / np.sqrt(12))
    assert (found.value, found.low, found.high) == pytest.approx((by_group.mean(), low, high), abs=2e-3)
    assert found.p == pytest.approx(stats.ttest_1samp(by_group, 0).pvalue, abs=2e-3)
    assert found.effective_cases == pytest.approx(12, rel=0.1)


def test_seed_effects_alone_give_the_t_interval_of_seeds() -> None:
    by_seed = np.random.default_rng(1).normal(0.3, 1, 5)
    values = np.tile(by_seed[:, None], (1, 40))
    found = estimate_effect(values, names([1] * 40))
    low, high = stats.t.interval(0.95, 4, by_seed.mean(), by_seed.std(ddof=1) / np.sqrt(5))
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.02)


def test_parts_are_the_two_way_decomposition() -> None:
    values, baseline = np.random.default_rng(2).normal(size=(2, 4, 30))
    difference = values.mean(axis=0) - baseline.mean(axis=0)
    found = variance_of_mean(difference, [values, baseline], np.arange(30))
    of_seeds = [one.mean(axis=1).var(ddof=1) / 4 for one in (values, baseline)]
    assert found.seeds == pytest.approx(sum(of_seeds))
    assert found.seeds_df == pytest.approx(sum(of_seeds) ** 2 / sum(one**2 / 3 for one in of_seeds))
    assert found.groups == pytest.approx(difference.var(ddof=1) / 30)
    rests = [one - one.mean(axis=0) - one.mean(axis=1)[:, None] + one.mean() for one in (values, baseline)]
    assert found.rest == pytest.approx(sum((rest**2).sum() / 30**2 / (4 * 3) for rest in rests))
    assert found.total == pytest.approx(found.groups + max(found.seeds - found.rest, 0))


def test_two_arms_that_differ_in_their_seeds_alone_give_welchs_interval() -> None:
    by_seed, of_baseline = np.random.default_rng(9).normal(0, [[1.0], [0.5]], (2, 5))
    arms = [np.tile(one[:, None], (1, 40)) for one in (by_seed, of_baseline)]
    found = estimate_effect(arms[0], names([1] * 40), arms[1])
    expected = stats.ttest_ind(by_seed, of_baseline, equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, abs=5e-3)
    low, high = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.02)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_seeds_are_paired_where_models_of_equal_seeds_err_alike(shared: float) -> None:
    random = np.random.default_rng(10)
    luck = random.normal(0, 0.2, (5, 1)) * shared
    errors = shared * random.normal(0, 0.1, (5, 80)) + random.normal(0, 0.1, (2, 5, 80))
    values, baseline = luck + errors + np.array([0.05, 0])[:, None, None]
    assert seeds_are_paired(values, baseline) == bool(shared)
    found = estimate_effect(values, names([1] * 80), baseline)
    assert found.paired_seeds == bool(shared)
    assert found.low > 0
    if shared:
        assert not estimate_effect(values, names([1] * 80), np.roll(baseline, 1, axis=0)).low > 0
        alone = variance_of_mean((values - baseline).mean(axis=0), [values - baseline], np.arange(80))
        assert (found.low, found.high) == pytest.approx(
            (found.value - critical_value(alone.draws()), found.value + critical_value(alone.draws()))
        )


def test_seeds_without_errors_of_their_own_are_not_paired() -> None:
    level = np.arange(3)[:, None] + np.arange(20.0)
    assert not seeds_are_paired(level, level + 1)


def test_p_value_is_an_average_over_both_variances() -> None:
    variance = Variance(groups=1.0, groups_df=7, seeds=0.8, seeds_df=3, rest=0.1)
    random = np.random.default_rng(3)
    groups = variance.groups * 7 / random.chisquare(7, 400_000)
    seeds = variance.seeds * 3 / random.chisquare(3, 400_000)
    total = groups + np.maximum(seeds - 0.1, 0)
    for value in (0.5, 2.0, 4.0):
        expected = 2 * stats.norm.sf(value / np.sqrt(total)).mean()
        assert p_value(value, variance.draws()) == pytest.approx(expected, abs=2e-3)
    assert len(variance.draws()) == len(QUANTILES) ** 2
    assert p_value(critical_value(variance.draws()), variance.draws()) == pytest.approx(0.05, abs=1e-9)


def test_smallest_effect_is_found_with_80_percent_power() -> None:
    random = np.random.default_rng(4)

    def simulated(effect: float) -> np.ndarray:
        return effect + random.normal(0, 1, 60) + random.normal(0, 0.5, (5, 60)) + random.normal(0, 0.1, (5, 1))

    smallest = np.mean([estimate_effect(simulated(0), names([1] * 60)).smallest for _ in range(100)])
    found = np.mean([estimate_effect(simulated(smallest), names([1] * 60)).low > 0 for _ in range(300)])
    assert 0.74 < found < 0.88


def test_the_interval_of_the_smallest_effect_is_that_of_a_variance() -> None:
    """Without seeds' luck, the smallest effect is a multiple of a standard deviation with 39 degrees of freedom."""
    random = np.random.default_rng(6)
    found = estimate_effect(random.normal(0, 1, 40) + random.normal(0, 1e-6, (3, 40)), names([1] * 40))
    low, high = found.smallest * np.sqrt(39 / stats.chi2.ppf([0.975, 0.025], 39))
    assert (found.smallest_low, found.smallest_high) == pytest.approx((low, high), rel=0.01)


def test_the_interval_of_the_smallest_effect_contains_what_is_found_with_80_percent_power() -> None:
    random = np.random.default_rng(7)

    def simulated() -> np.ndarray:
        return random.normal(0, 1, 40) + random.normal(0, 0.5, (5, 40)) + random.normal(0, 0.1, (5, 1))

    effects = [estimate_effect(simulated(), names([1] * 40)) for _ in range(200)]
    needed = np.quantile(
        [one.high - 2 * one.value for one in effects], 0.8
    )  # found if the effect exceeds reach - error
    assert 0.88 < np.mean([one.smallest_low <= needed <= one.smallest_high for one in effects]) < 0.99


@pytest.mark.parametrize(
    ("seeds", "seed_sd", "sizes"), [(3, 0.04, [5] * 20), (3, 0.02, [3] * 40), (5, 0.0, [30, 9, 4, 3, 2, 2])]
)
def test_null_effects_are_rarely_found(seeds: int, seed_sd: float, sizes: list[int]) -> None:
    """`benchmarks/verdict_simulation.py` runs many more; a method that ignores seeds finds 20 to 60 %."""
    random = np.random.default_rng(5)
    groups, found = names(sizes), 0
    for _ in range(200):
        shared = random.normal(0, 0.1, sum(sizes)) + np.repeat(
            random.normal(0, 0.05, (2, 1, len(sizes))), sizes, axis=2
        )
        noise = random.normal(0, 0.1, (2, seeds, sum(sizes))) + random.normal(0, seed_sd, (2, seeds, 1))
        effect = estimate_effect((shared + noise)[0], groups, (shared + noise)[1])
        found += not effect.low <= 0 <= effect.high
    assert found / 200 <= 0.07


def test_intraclass_correlation_recovers_what_was_planted() -> None:
    random = np.random.default_rng(6)
    groups = np.repeat(np.arange(400), 5)
    for planted in (0.0, 0.3, 0.8):
        values = np.sqrt(planted) * random.normal(size=400)[groups] + np.sqrt(1 - planted) * random.normal(size=2000)
        assert intraclass_correlation(values, groups) == pytest.approx(planted, abs=0.06)
    assert intraclass_correlation(random.normal(size=5), np.arange(5)) == 1


def test_differences_without_variation_are_exact() -> None:
    found = estimate_effect(np.full((3, 10), 0.25), names([1] * 10))
    assert (found.value, found.low, found.high, found.p) == (0.25, 0.25, 0.25, 0.0)
    found = estimate_effect(np.zeros((3, 10)), names([1] * 10))
    assert (found.low, found.high, found.p) == (0, 0, 1)


@pytest.mark.parametrize(("seeds", "groups"), [(1, ["a", "b"]), (3, ["a", "a"])])
def test_one_seed_or_one_group_cannot_vary(seeds: int, groups: list[str]) -> None:
    with pytest.raises(ValueError, match="two seeds and two groups"):
        estimate_effect(np.zeros((seeds, 2)), groups)


def test_holm_steps_down() -> None:
    assert holm_adjusted([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm_adjusted([0.6, 0.7]) == [1.0, 1.0]
    assert holm_adjusted([]) == []


def test_skewness_is_that_of_patients_not_of_the_sizes_of_their_groups() -> None:
    random = np.random.default_rng(0)
    sizes = np.maximum(1, 120 // np.arange(1, 41))
    groups = [f"{number}" for number, size in enumerate(sizes) for _ in range(size)]
    effects = random.normal(size=40)
    effects[0] = 2.0  # of the largest group
    by_case = np.repeat(effects, sizes) + 0.01 * random.normal(size=sizes.sum())
    assert abs(group_skewness(by_case, groups)) < 0.5
    assert group_skewness(np.repeat(np.exp(1.5 * effects), sizes), groups) > 1.5


def test_skewness_of_groups_of_one_size_is_that_of_their_means() -> None:
    values = np.random.default_rng(1).exponential(size=(20, 4))
    found = group_skewness(values.ravel(), [f"{number // 4}" for number in range(80)])
    means = values.mean(axis=1) - values.mean()
    expected = (means**3).mean() / (means**2).mean() ** 1.5 * np.sqrt(20 * 19) / 18  # Joanes and Gill 1998, G1
    assert found == pytest.approx(expected, rel=1e-12)
    assert group_skewness(np.ones(9), list("aabbccddd")) == group_skewness(np.array([0.0, 1.0]), ["a", "b"]) == 0


def test_skewness_does_not_take_the_noise_of_small_groups_for_that_of_patients() -> None:
    """Single images vary more than means of many: one far off among them says little of its patient."""
    random = np.random.default_rng(0)
    sizes = np.repeat([40, 1], [12, 12])
    by_case = random.normal(size=sizes.sum()) + np.repeat(0.3 * random.normal(size=24), sizes)
    by_case[-1] = -4.0
    means = [part.mean() for part in np.split(by_case, np.cumsum(sizes)[:-1])]
    found = group_skewness(by_case, [f"{number}" for number, size in enumerate(sizes) for _ in range(size)])
    assert abs(found) < 0.7 * abs(stats.skew(means, bias=False))
