"""Distances beside the floor of real images, at equal N; the metrics that rest on them."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from maskloom.evaluate.metrics.authenticity import sibling_share
from maskloom.evaluate.scores import kernel_distance as kernel_distances
from maskloom.evaluate.scores.frechet import frechet_distance, frechet_leave_outs
from maskloom.evaluate.scores.kernel_distance import cmmd, cmmd_leave_outs
from maskloom.evaluate.scores.manifold import authentic
from maskloom.evaluate.scores.real_floor import (
    Featured,
    FloorOptions,
    compared_with_floor,
    position,
    recomputed,
)
from maskloom.evaluate.scores.statistics import jackknife_interval
from maskloom.pipeline.results import REAL, Interval
from tests.evaluate.runs import answer, copied, faithful, noise, tiny_inputs
from tests.tiny_datasets import write_tiny_run

OPTIONS = FloorOptions(draws=3, jackknife_blocks=4)


def featured(name: str, count: int, shift: float = 0.0) -> Featured:
    random = np.random.default_rng([count, *name.encode()])
    return Featured(name, random.normal(shift, 1, (count, 3)), [f"{name} {i // 2}" for i in range(count)])


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def reference_cmmd(left: np.ndarray, right: np.ndarray) -> float:
    """The reference implementation's formula, over scikit-learn's kernel."""
    x, y = normalize(left), normalize(right)
    means = [rbf_kernel(one, other, gamma=1 / 200).mean() for one, other in ((x, x), (y, y), (x, y))]
    return float(1000 * (means[0] + means[1] - 2 * means[2]))


@pytest.mark.parametrize("block", [7, 512])
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_cmmd_equals_the_reference_over_scikit_learn(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch, block: int, kind: type
) -> None:
    monkeypatch.setattr(kernel_distances, "BLOCK", block)
    left, right = random.normal(size=(31, 9)).astype(kind), random.normal(0.4, 2, size=(24, 9)).astype(kind)
    expected = reference_cmmd(left.astype(np.float64), right.astype(np.float64))
    assert cmmd(left, right) == pytest.approx(expected, abs=1e-6)
    assert cmmd(left, left) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("fast", "distance"), [(cmmd_leave_outs, cmmd), (frechet_leave_outs, frechet_distance)], ids=["cmmd", "frechet"]
)
def test_fast_leave_outs_equal_new_computations(fast, distance, random: np.random.Generator) -> None:
    left, right = random.normal(size=(20, 4)), random.normal(0.5, 1, size=(18, 4))
    groups = [f"g{i // 4}" for i in range(20)], [f"g{3 + i // 3}" for i in range(18)]
    block_of = {f"g{i}": i % 3 for i in range(9)}
    expected = recomputed(distance)(left, right, *groups, block_of)
    assert fast(left, right, *groups, block_of) == pytest.approx(expected, abs=1e-6)
    kept = [np.array([block_of[g] != 1 for g in names]) for names in groups]
    assert expected[1] == distance(left[kept[0]], right[kept[1]])


@pytest.mark.parametrize("fast", [cmmd_leave_outs, recomputed(cmmd)])
def test_a_side_without_images_has_no_distance(fast, random: np.random.Generator) -> None:
    found = fast(random.normal(size=(4, 2)), random.normal(size=(4, 2)), "aaaa", "bbcc", {"a": 0, "b": 1, "c": 2})
    assert np.isnan(found).tolist() == [True, False, False]


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_authenticity_equals_nearest_neighbours_of_scikit_learn(random: np.random.Generator, kind: type) -> None:
    train, images = random.normal(size=(60, 4)).astype(kind), random.normal(0, 0.8, size=(80, 4)).astype(kind)
    images[:10] = train[5:15]
    among = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(train.astype(np.float64))
    to_sibling = among.kneighbors(train.astype(np.float64))[0][:, 1]
    distance, index = among.kneighbors(images.astype(np.float64), n_neighbors=1)
    expected = distance[:, 0] > to_sibling[index[:, 0]]
    assert authentic(train, images).tolist() == expected.tolist()
    assert not authentic(train, images)[:10].any()
    assert 0.2 < expected.mean() < 0.8


def test_every_set_is_compared_at_the_n_of_the_smallest() -> None:
    sets = [featured("many", 30), featured("few", 10, 3), featured("too few", 7)]
    found = compared_with_floor(featured("real train", 40), featured("real test", 20), sets, mean_shift, OPTIONS, 2)
    assert found is not None
    assert (found.count, found.draws, list(found.generators)) == (10, 3, ["many", "few"])
    few, test = featured("few", 10, 3), featured("real test", 20)
    drawn = [(few.drawn(10, [2, 10, i]), test.drawn(10, [2, 10, i])) for i in range(3)]
    expected = np.mean([mean_shift(one.features, real.features) for one, real in drawn])
    assert found.generators["few"].value == pytest.approx(expected)
    above = found.generators["few"].above(found.floor)
    assert above.value == pytest.approx(found.generators["few"].value - found.floor.value)
    assert above.low is not None
    assert above.low > 0
    assert "few 3" in found.sentence()
    assert [row[:2] for row in found.rows()] == [["many", 10], ["few", 10]]
    assert {figure.of for figure in found.figures("shift")} == {REAL, "many", "few"}


def mean_shift(left: np.ndarray, right: np.ndarray) -> float:
    return float(abs(left.mean() - right.mean()))


def test_sets_of_equal_size_are_drawn_once() -> None:
    sets = [featured("real train", 12), featured("real test", 12)]
    found = compared_with_floor(*sets, [featured("made", 12)], mean_shift, OPTIONS, 0)
    assert found is not None
    assert found.draws == 1
    assert found.floor.value == mean_shift(sets[0].features, sets[1].features)
    expected = jackknife_interval(found.floor.value, found.floor.leave_outs)
    assert (found.floor.interval.value, found.floor.interval.high) == (expected.value, expected.high)
    assert expected.low is not None
    assert found.floor.interval.low == max(expected.low, 0)


def test_without_generators_the_floor_is_shown_and_without_real_images_nothing() -> None:
    found = compared_with_floor(featured("real train", 9), featured("real test", 9), [], mean_shift, OPTIONS, 0)
    assert found is not None
    assert found.rows()[0][0] == "no generator"
    assert "no synthetic image" in found.sentence()
    assert compared_with_floor(featured("a", 7), featured("b", 9), [], mean_shift, OPTIONS, 0) is None


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((5.0, 4.5, 5.5), "further than the floor"),
        ((-5.0, -5.5, -4.5), "closer than the floor"),
        ((5.0, -4.0, 14.0), "not told apart from the floor"),
        ((5.0, None, None), "[no interval]"),
    ],
)
def test_a_distance_is_put_beside_the_floor(interval: tuple[float, float, float], words: str) -> None:
    assert words in position(Interval(value=interval[0], low=interval[1], high=interval[2]))


def test_cmmd_tells_noise_from_faithful_images(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful, "noise": noise}, {"train": 24, "test": 16})
    result = answer(tiny_inputs(tmp_path, ("faithful", "noise")), "cmmd")
    generators = result.values["generators"]
    assert generators["noise"]["distance"]["value"] > 5 * generators["faithful"]["distance"]["value"]
    assert "noise" in result.verdict and "further than the floor" in result.verdict
    assert result.tables[0].title == "CMMD to real test images at equal N, efficientnet_lite0"
    assert {figure.better for figure in result.figures} == {"lower"}


def test_copies_are_not_authentic(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"copied": copied, "noise": noise}, {"train": 24, "test": 16})
    result = answer(tiny_inputs(tmp_path, ("copied", "noise")), "authenticity")
    shares = {name: one["value"] for name, one in result.values["authenticity"].items()}
    assert shares["copied"] == 0
    assert shares["noise"] == 1
    assert 0.2 < shares[REAL] < 0.9
    assert {figure.better for figure in result.figures} == {"higher"}


def test_siblings_that_make_authenticity_blind_are_warned_of(tmp_path: Path) -> None:
    """Two slices of a patient are almost the same image."""
    originals: list[np.ndarray] = []

    def as_its_sibling(sample):
        index = int(sample.sample_id[-4:])
        if index % 2 == 0:
            originals.append(sample.image)
        else:
            sample.image = np.clip(originals[-1].astype(int) + 1, 0, 255).astype(np.uint8)

    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 24, "test": 16}, change=as_its_sibling)
    result = answer(tiny_inputs(tmp_path, ("faithful",)), "authenticity")
    assert result.values["nearest_is_sibling"] == 1
    assert any(warning.startswith("for 100% of the train images") for warning in result.warnings)
    assert result.values["authenticity"][REAL]["value"] == 1
    assert sibling_share(np.array([[0.0], [1.0], [1.1], [0.2]]), ["a", "b", "c", "a"]) == 0.5


@pytest.mark.parametrize("name", ["cmmd", "authenticity"])
def test_too_few_real_images_are_a_reason_to_skip(tmp_path: Path, name: str) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 12, "test": 7})
    assert answer(tiny_inputs(tmp_path, ("faithful",)), name).skipped == (
        "real train, and test or validation, need 8 images each"
    )
