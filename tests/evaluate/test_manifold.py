"""Precision, recall, density and coverage in blocks equal those of full distance matrices."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from maskloom.evaluate.scores import distances
from maskloom.evaluate.scores.distances import distance_blocks, exact_squared, nearest_points, within
from maskloom.evaluate.scores.manifold import manifold_scores
from maskloom.evaluate.scores.nearest import nearest_features

COUNTS = (330, 270)


def reference_scores(real: np.ndarray, fake: np.ndarray, nearest_k: int) -> dict[str, float]:
    """The formulae of the package prdc (Naeem et al. 2020), over SciPy's distance matrices.

    A distance that equals a radius counts as inside, as in the papers.
    """

    def radii(points: np.ndarray) -> np.ndarray:
        among = cdist(points, points)
        closest = np.take_along_axis(among, np.argpartition(among, nearest_k + 1, axis=-1)[..., : nearest_k + 1], -1)
        return closest.max(axis=-1)

    between, real_radii, fake_radii = cdist(real, fake), radii(real), radii(fake)
    return {
        "precision": (between <= real_radii[:, None]).any(axis=0).mean(),
        "recall": (between <= fake_radii[None, :]).any(axis=1).mean(),
        "density": (between <= real_radii[:, None]).sum(axis=0).mean() / nearest_k,
        "coverage": (between.min(axis=1) <= real_radii).mean(),
    }


def plain(real: np.ndarray, fake: np.ndarray) -> None:
    """Leave the sets as they were drawn."""


def copies(real: np.ndarray, fake: np.ndarray) -> None:
    """A copy of a real image lies exactly on the edge of its neighbour's ball."""
    fake[:200] = real[:200]


def collapse(real: np.ndarray, fake: np.ndarray) -> None:
    """All synthetic images are equal, so that their balls have a radius of 0."""
    fake[:] = real[0]


def grid(real: np.ndarray, fake: np.ndarray) -> None:
    """Many distances are equal."""
    for points in (real, fake):
        np.round(points, out=points)


def far_from_zero(real: np.ndarray, fake: np.ndarray) -> None:
    """Coordinates are large compared with the distances."""
    for points in (real, fake):
        points += 1e7


def near_copies(real: np.ndarray, fake: np.ndarray) -> None:
    """Distances are small compared with the coordinates, and radii cannot be told by a product."""
    fake[:] = real[0] + 1e-9 * fake


CASES = [plain, copies, collapse, grid, far_from_zero, near_copies]


def sets(case, dimensions: int, kind: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    real, fake = random.normal(size=(COUNTS[0], dimensions)), random.normal(0.2, 1, size=(COUNTS[1], dimensions))
    case(real, fake)
    return real.astype(kind), fake.astype(kind)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("dimensions", [2, 24])
@pytest.mark.parametrize("block", [7, 512])
def test_scores_equal_those_of_full_matrices(
    case, dimensions: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "BLOCK", block)
    monkeypatch.setattr(distances, "PAIRS", 100)
    real, fake = sets(case, dimensions)
    assert manifold_scores(real, fake, 5) == reference_scores(real, fake, 5)


def test_features_in_single_precision_are_compared_in_double() -> None:
    real, fake = sets(copies, 24, np.float32)
    expected = reference_scores(real.astype(np.float64), fake.astype(np.float64), 5)
    assert manifold_scores(real, fake, 5) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nearest_points_equal_those_of_the_full_matrix(case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK", 100)
    real, fake = sets(case, 8)
    full = cdist(fake, real)
    found = nearest_features(fake, real)
    assert found.distance == pytest.approx(full.min(axis=1), rel=1e-12)
    assert full[np.arange(len(fake)), found.index] == pytest.approx(full.min(axis=1), rel=1e-12)
    third = np.sqrt(nearest_points(real, real, 3)[1])
    assert third == pytest.approx(np.sort(cdist(real, real), axis=1)[:, 3], rel=1e-12)


def test_of_equally_near_points_the_first_counts() -> None:
    train = np.array([[2.0], [1.0], [1.0], [-1.0]])
    assert nearest_features(np.array([[0.0], [2.0]]), train).index.tolist() == [1, 0]


def test_no_points_have_no_nearest() -> None:
    index, squared = nearest_points(np.zeros((0, 3)), np.ones((2, 3)))
    assert index.shape == squared.shape == (0,)


def test_blocks_are_bounded_and_their_error_is_within_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK", 512)
    real, fake = sets(far_from_zero, 24)
    real[:5] = fake[:5]
    blocks = list(distance_blocks(np.concatenate([real] * 4), fake))
    assert [block.squared.shape for block in blocks] == [(512, 270), (512, 270), (296, 270)]
    exact = np.concatenate([cdist(real, fake) ** 2] * 4)
    for block in blocks:
        error = np.abs(block.squared - exact[block.start : block.start + len(block.squared)])
        assert 0 < error.max() <= block.tolerance < 1e-9


def test_a_point_on_the_edge_of_a_ball_is_inside() -> None:
    random = np.random.default_rng(0)
    left, right = random.normal(size=(3, 50)), random.normal(size=(4, 50))
    edge = exact_squared(left, right, np.arange(3), np.arange(3))
    (block,) = distance_blocks(left, right)
    assert within(block, left, right, edge[:, None])[np.arange(3), np.arange(3)].all()
    below = np.nextafter(edge, 0)
    assert not within(block, left, right, below[:, None])[np.arange(3), np.arange(3)].any()
