import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel

from maskloom.evaluate.scores import kernel_distance as kernel_distances
from maskloom.evaluate.scores.diversity import pair_similarities, random_pairs, usable_scales
from maskloom.evaluate.scores.frechet import frechet_distance, frechet_interval, frechet_leave_outs
from maskloom.evaluate.scores.kernel_distance import kernel_distance, squared_discrepancy
from maskloom.evaluate.scores.manifold import manifold_scores
from maskloom.evaluate.scores.statistics import jackknife_interval


def textbook_frechet(left: np.ndarray, right: np.ndarray) -> float:
    covariances = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1])
    shift = np.sum((left.mean(0) - right.mean(0)) ** 2)
    return float(shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root).real)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("left_count", "right_count"), [(200, 150), (200, 9), (9, 200)])
def test_frechet_equals_the_textbook_formula(random: np.random.Generator, left_count: int, right_count: int) -> None:
    left, right = random.normal(size=(left_count, 12)), random.normal(0.3, 1.5, size=(right_count, 12))
    assert frechet_distance(left, right) == pytest.approx(textbook_frechet(left, right), rel=1e-5)


def test_frechet_with_fewer_images_than_dimensions(random: np.random.Generator) -> None:
    """The eigenvalues of S1^(1/2) S2 S1^(1/2) are another way to the same trace."""
    left, right = random.normal(size=(8, 40)), random.normal(size=(6, 40)) + 1
    values, vectors = np.linalg.eigh(np.cov(left, rowvar=False))
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ np.cov(right, rowvar=False) @ root).clip(0)).sum()
    traces = np.var(left, axis=0, ddof=1).sum() + np.var(right, axis=0, ddof=1).sum()
    expected = np.sum((left.mean(0) - right.mean(0)) ** 2) + traces - 2 * overlap
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_a_set_with_itself_is_zero(random: np.random.Generator) -> None:
    left = random.normal(size=(30, 50))
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(left, left + 2) == pytest.approx(4 * 50)


def test_frechet_interval_holds_the_estimate_and_shrinks(random: np.random.Generator) -> None:
    def width(count: int) -> float:
        left, right = random.normal(size=(count, 5)), random.normal(0.5, 1, size=(count, 5))
        interval = frechet_interval(left, right, [f"l{i}" for i in range(count)], [f"r{i}" for i in range(count)], 20)
        assert interval.low < interval.value < interval.high
        return interval.high - interval.low

    assert width(1600) < 0.6 * width(100)


def test_frechet_interval_leaves_a_group_out_on_both_sides(random: np.random.Generator) -> None:
    """With as many blocks as groups, each block is one group.

    Images of a group that only one side has leave there.
    """
    left_groups, right_groups = list("aabbccdde"), list("abbccddff")
    left, right = random.normal(size=(9, 3)), random.normal(1, 1, size=(9, 3))

    def without(group: str) -> float:
        kept = [np.array([one != group for one in groups]) for groups in (left_groups, right_groups)]
        return frechet_distance(left[kept[0]], right[kept[1]])

    expected = jackknife_interval(frechet_distance(left, right), [without(group) for group in "abcdef"])
    found = frechet_interval(left, right, left_groups, right_groups, 20)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_frechet_without_a_block_equals_a_new_fit(random: np.random.Generator) -> None:
    """Blocks of unequal size, one of them with the only images of a direction, so that the rest lacks it."""
    left, right = random.normal(size=(90, 12)), random.normal(0.3, 1.5, size=(70, 12))
    left[:, 11] = np.arange(90) < 9
    groups = [f"l{i // 9}" for i in range(90)], [f"r{i // 7}" for i in range(70)]
    block_of = {
        group: int(group[1:]) % 7 if group[0] == "r" else int(group[1:]) % 9 for names in groups for group in names
    }
    found = frechet_leave_outs(left, right, *groups, block_of)
    for block, distance in enumerate(found):
        kept = [
            features[[block_of[group] != block for group in names]]
            for features, names in zip((left, right), groups, strict=True)
        ]
        assert distance == pytest.approx(frechet_distance(*kept), rel=1e-7)


def test_frechet_without_a_block_of_features_that_hardly_vary(random: np.random.Generator) -> None:
    """Scales from 1 to 1e-7, a constant, and two equal features, as networks give; far more images than features."""
    left, right = (random.normal(size=(300, 20)) * 10.0 ** -np.linspace(0, 7, 20) for _ in range(2))
    for features in (left, right):
        features[:, 3], features[:, 5] = 2.0, features[:, 4]
    groups = [f"{i // 3}" for i in range(300)]
    block_of = {group: int(group) % 10 for group in groups}
    blocks = np.array([block_of[group] for group in groups])
    expected = [frechet_distance(left[blocks != block], right[blocks != block]) for block in range(10)]
    assert frechet_leave_outs(left, right, groups, groups, block_of) == pytest.approx(expected, rel=1e-10)


def test_frechet_interval_keeps_groups_whole_in_few_blocks(random: np.random.Generator) -> None:
    """A set against itself stays at distance 0 whichever block leaves both sides."""
    left = random.normal(size=(24, 3))
    groups = [f"{i // 3}" for i in range(24)]
    found = frechet_interval(left, left, groups, groups, 4)
    assert (found.low, found.high) == pytest.approx((0, 0), abs=1e-9)


def test_blocks_of_the_frechet_interval_do_not_follow_the_order_of_names(random: np.random.Generator) -> None:
    """Every second group of one side differs from the others, as where names alternate between
    hospitals.
    """
    left, right = (random.normal(size=(40, 2)) for _ in range(2))
    left[::2] += 10
    right[:20] += 10
    names = [f"{i:02d}" for i in range(40)]
    found = frechet_interval(left, right, [f"l{name}" for name in names], [f"r{name}" for name in names], 2)
    assert found.high - found.low < 30  # with one block of each kind: 56


def test_frechet_interval_of_one_group_has_no_ends(random: np.random.Generator) -> None:
    left = random.normal(size=(5, 3))
    assert frechet_interval(left, left + 1, ["a"] * 5, ["a"] * 5, 20).low is None


def test_squared_discrepancy_equals_a_double_loop(random: np.random.Generator) -> None:
    left, right = random.normal(size=(7, 4)), random.normal(1, 1, size=(5, 4))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    within_left = np.mean([kernel(left[i], left[j]) for i in range(7) for j in range(7) if i != j])
    within_right = np.mean([kernel(right[i], right[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([kernel(x, y) for x in left for y in right])
    assert squared_discrepancy(left, right) == pytest.approx(within_left + within_right - 2 * between)
    assert polynomial_kernel(left, right, degree=3).mean() == pytest.approx(between)


def textbook_kernel_distance(left: np.ndarray, right: np.ndarray, subsets: int, seed: int) -> tuple[float, float]:
    """Bińkowski et al. 2018, subset by subset with scikit-learn's kernel."""
    size, random, values = min(len(left), len(right)) // 2, np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = left[random.choice(len(left), size, False)], right[random.choice(len(right), size, False)]
        within = [
            (kernel.sum() - np.trace(kernel)) / (size * (size - 1))
            for kernel in (polynomial_kernel(x, x, degree=3, coef0=1), polynomial_kernel(y, y, degree=3, coef0=1))
        ]
        values.append(within[0] + within[1] - 2 * polynomial_kernel(x, y, degree=3, coef0=1).mean())
    return float(np.mean(values)), float(np.std(values))


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_kernel_distance_equals_subset_by_subset(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    left, right = random.normal(size=(70, 9)).astype(kind), random.normal(0.3, 1, size=(53, 9)).astype(kind)
    expected = textbook_kernel_distance(left.astype(np.float64), right.astype(np.float64), 7, 5)
    assert kernel_distance(left, right, 7, 5) == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(kernel_distances, "BLOCK", 16)
    monkeypatch.setattr(kernel_distances, "SUBSETS", 3)
    assert kernel_distance(left, right, 7, 5) == pytest.approx(expected, rel=1e-10)


def test_subsets_of_the_kernel_distance_are_limited(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_distances, "LARGEST_SUBSET", 4)
    left, right = random.normal(size=(60, 3)), random.normal(size=(60, 3))
    expected = kernel_distance(left, right, 200, 0)[1]
    monkeypatch.setattr(kernel_distances, "LARGEST_SUBSET", 30)
    assert kernel_distance(left, right, 200, 0)[1] < expected / 3


def test_kernel_distance_is_unbiased(random: np.random.Generator) -> None:
    """Between two samples of one distribution it is zero on average, however small they are."""
    values = [kernel_distance(random.normal(size=(20, 3)), random.normal(size=(20, 3)), 5, 0)[0] for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_kernel_distance_sees_a_shift_and_repeats(random: np.random.Generator) -> None:
    left, right = random.normal(size=(60, 8)), random.normal(2, 1, size=(60, 8))
    value, deviation = kernel_distance(left, right, 20, 0)
    assert value > 5 * deviation > 0
    assert kernel_distance(left, right, 20, 0) == (value, deviation)


def naive_manifold(real: np.ndarray, synthetic: np.ndarray, k: int) -> dict[str, float]:
    """Kynkäänniemi et al. 2019, eq. 1-2; Naeem et al. 2020, eq. 3-4, word for word."""

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(points[i] - points[j]) for j in range(len(points)) if j != i)[k - 1]

    def within(x: np.ndarray, points: np.ndarray, i: int) -> bool:
        return bool(np.linalg.norm(x - points[i]) <= radius(points, i))

    n, m = len(real), len(synthetic)
    return {
        "precision": np.mean([any(within(y, real, i) for i in range(n)) for y in synthetic]),
        "recall": np.mean([any(within(x, synthetic, j) for j in range(m)) for x in real]),
        "density": sum(within(y, real, i) for y in synthetic for i in range(n)) / (k * m),
        "coverage": np.mean([any(within(y, real, i) for y in synthetic) for i in range(n)]),
    }


def test_manifold_scores_equal_naive_loops(random: np.random.Generator) -> None:
    real, synthetic = random.normal(size=(14, 3)), random.normal(0.7, 0.8, size=(11, 3))
    assert manifold_scores(real, synthetic, 3) == pytest.approx(naive_manifold(real, synthetic, 3))


def test_manifold_scores_of_collapse_and_of_tiny_sets(random: np.random.Generator) -> None:
    real = random.normal(size=(50, 3))
    collapsed = real[:1] + random.normal(0, 1e-3, size=(50, 3))
    scores = manifold_scores(real, collapsed, 5)
    assert scores["precision"] == 1
    assert scores["recall"] < 0.1
    assert scores["coverage"] < 0.4
    assert manifold_scores(real[:2], real[:2], 5)["precision"] == 1


def test_what_is_drawn_follows_its_seed(random: np.random.Generator) -> None:
    labels = np.zeros(30, np.int64)
    pairs = [random_pairs(labels, 20, seed).tolist() for seed in (1, 1, 2)]
    assert pairs[0] == pairs[1] != pairs[2]
    left, right = random.normal(size=(40, 3)), random.normal(size=(40, 3))
    values = [kernel_distance(left, right, 5, seed) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_ms_ssim_of_equal_images_is_one_and_of_noise_low(random: np.random.Generator) -> None:
    images = random.integers(0, 256, (3, 64, 64, 1), dtype=np.uint8)
    images[1] = images[0]
    same, noise = pair_similarities(images, np.array([[0, 1], [0, 2]]))
    assert same == pytest.approx(1, abs=1e-4)
    assert noise < 0.2


def test_scales_fit_the_window() -> None:
    assert [usable_scales((side, side)) for side in (10, 11, 32, 98, 99, 128, 256)] == [0, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize("side", [*range(11, 24), 43, 44, *range(87, 101), 175, 176])
def test_images_of_every_size_are_compared(random: np.random.Generator, side: int) -> None:
    images = random.integers(0, 256, (2, side, side + 5, 1), dtype=np.uint8)
    assert np.isfinite(pair_similarities(images, np.array([[0, 1]]))).all()


def test_pairs_are_of_one_class_and_different() -> None:
    labels = np.array([0] * 5 + [1] * 4 + [2])
    pairs = random_pairs(labels, 12, seed=0)
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all()
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len({tuple(pair) for pair in pairs}) == len(pairs) == 12
    assert random_pairs(np.array([0, 1]), 5, seed=0).shape == (0, 2)
