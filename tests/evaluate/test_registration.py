"""Registered images agree if one shows the other, however it was moved."""

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter, map_coordinates

from maskloom.evaluate.scores.registration import (
    CONTINUED,
    SIDE,
    at_equal_levels,
    box_transform,
    likeliest,
    registered_similarities,
    with_levels_of,
)
from maskloom.evaluate.scores.threads import thread_results
from maskloom.pipeline.parallel import available_cores

IDENTITY = np.eye(2, 3)
PLACES = (np.mgrid[:SIDE, :SIDE] - 31.5) / 32


def picture(seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE, SIDE)), 2)
    return (128 + 300 * noise).clip(0, 255)


def moved(image: np.ndarray) -> np.ndarray:
    """Return the image turned by 2 degrees, 5 % larger and shifted by a pixel."""
    angle = np.deg2rad(2)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / 1.05
    return affine_transform(image, matrix, [1.5, 0.5], order=1, mode="nearest")


def similarities(fixed: np.ndarray, moving: np.ndarray, start: np.ndarray) -> tuple[float, float]:
    """Return those of one pair."""
    found = registered_similarities(fixed[None], moving[None], start[None], np.arange(1))
    fine, coarse = found[0].tolist()
    return fine, coarse


def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return copies and unrelated pairs, plain and inverted, that start a little off, each of another image."""
    random = np.random.default_rng(0)
    moving = [moved(picture(number if number % 3 else 100 + number)) for number in range(40)]
    inverted = [255 - image if number % 2 else image for number, image in enumerate(moving)]
    starts = IDENTITY + random.normal(0, 0.02, size=(40, 2, 3))
    return np.stack([picture(number) for number in range(40)]), np.stack(inverted), starts, np.arange(40)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_moved_image_is_recognised_and_another_is_not(sign: int) -> None:
    copy, other = (128 + sign * (moved(picture(seed)) - 128) for seed in (0, 1))
    assert min(similarities(picture(0), copy, IDENTITY)) > 0.95
    assert similarities(picture(0), other, IDENTITY)[0] < 0.7


@pytest.mark.parametrize("gamma", [0.4, 2.5])
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_does_not_matter(gamma: float, inverted: bool) -> None:
    image = picture(1)
    darker = 255 * (moved(image).clip(0, 255) / 255) ** gamma
    fine, coarse = similarities(image, 255 - darker if inverted else darker, IDENTITY)
    assert (fine, coarse) == pytest.approx(similarities(image, moved(image), IDENTITY), abs=0.02)


def test_grey_levels_are_those_of_the_other_image_in_the_same_order() -> None:
    a, other = (torch.from_numpy(np.stack([picture(seed), picture(seed + 2)])).float() for seed in (1, 2))
    b = torch.stack([other[0], -other[1]]) + torch.tensor([0.0, 255.0])[:, None, None]
    b[0, :8] = 7.0
    b[1] = 255 - (a[1] / 255) ** 2 * 255
    found = with_levels_of(a, b)
    assert found[0, :8].unique().numel() == 1
    order = b[0].flatten().argsort()
    assert (found[0].flatten()[order].diff() >= -1e-4).all()
    assert found[0].mean() == pytest.approx(float(a[0].mean()), abs=0.01)
    assert torch.allclose(found[1], a[1], atol=0.5)  # inverted, and of another gamma
    assert torch.equal(with_levels_of(a[:1], b[:1]), found[:1])


def test_a_flat_image_between_bars_does_not_make_others_flat() -> None:
    shown = torch.from_numpy(np.stack([picture(1)] * 2)).float()
    shown[:, :12] = shown[:, -12:] = 0
    flat = torch.where(shown > 0, 120.0, 0.0)
    a, b = at_equal_levels(torch.stack([shown[0], flat[0]]), torch.stack([flat[0], shown[0]]))
    assert torch.equal(a[0], shown[0]) and torch.equal(b[1], shown[1])
    for one in (b[0], a[1]):
        assert one[12:-12].std() < 20 < shown[0, 12:-12].std()


def test_nothing_agrees_without_overlap() -> None:
    away = np.add(IDENTITY, [[0, 0, 5], [0, 0, 5]])
    assert similarities(picture(0), picture(0), away) == (0, 0)
    assert similarities(picture(0), np.full((SIDE, SIDE), 90.0), IDENTITY) == (0, 0)


def test_a_box_maps_onto_a_box() -> None:
    found = box_transform((0, 0, 1, 1), (0.2, 0.0, 1.0, 0.8))
    assert found @ [-1, -1, 1] == pytest.approx([-0.6, -1])
    assert found @ [1, 1, 1] == pytest.approx([1, 0.6])


def test_a_pair_depends_neither_on_its_batch_nor_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    together = registered_similarities(*pairs())
    alone = np.concatenate([registered_similarities(*(one[row : row + 1] for one in pairs())) for row in range(40)])
    (in_a_thread,) = thread_results(lambda batch: registered_similarities(*batch), [pairs()])
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(together - in_a_thread).max() < 1e-5
    assert torch.get_num_threads() == threads


def test_the_likeliest_pairs_of_each_image_are_registered_to_the_end() -> None:
    random = np.random.default_rng(0)
    image, reached = random.integers(0, 7, 60), random.uniform(0, 1, 60).astype(np.float32)
    expected = [
        row
        for row in range(60)
        if reached[row] >= 0.4 and (reached[image == image[row]] > reached[row]).sum() < CONTINUED
    ]
    assert likeliest(torch.from_numpy(reached), torch.from_numpy(image)).tolist() == expected
    assert likeliest(torch.zeros(3), torch.zeros(3)).tolist() == []


def test_what_is_found_for_an_image_does_not_depend_on_other_images() -> None:
    fixed, moving, starts, _ = pairs()
    image = np.arange(40) // 8
    together = registered_similarities(fixed, moving, starts, image)
    alone = [
        registered_similarities(*(one[image == row] for one in (fixed, moving, starts, image))) for row in range(5)
    ]
    assert np.abs(together - np.concatenate(alone)).max() < 1e-5
    continued = [(together[image == row, 1] > 0).sum() for row in range(5)]
    assert max(continued) == CONTINUED


def test_every_pair_agrees_with_a_plain_registration_of_it() -> None:
    expected = [plain_similarities(*pair) for pair in zip(*pairs()[:3], strict=True)]
    difference = np.abs(registered_similarities(*pairs()) - expected).max(axis=1)
    assert np.quantile(difference, 0.95) < 1e-3
    assert {fine > 0.9 for fine, _ in expected} == {True, False}


def plain_similarities(fixed: np.ndarray, moving: np.ndarray, where: np.ndarray) -> tuple[float, float]:
    """Return the similarities of one pair: the same method, written pixel by pixel with scipy."""
    affine = np.stack([*PLACES, np.ones((SIDE, SIDE))])
    hats = [np.maximum(0, 1 - np.abs(np.arange(SIDE) - 63 * knot / 4) / (63 / 4)) for knot in range(5)]
    smooth = np.stack([np.outer(down, across) for down in hats for across in hats])
    for basis, steps in ((affine, 1), (affine, 4), (smooth, 4)):
        warped, shared = plain_warp(moving, np.tensordot(where, affine, 1))
        if shared.mean() < 0.4:
            return 0, 0
        a, b = (np.where(shared, one, one[shared].mean()) for one in (fixed, warped))
        fine, change = plain_maximum(plain_texture(a, 0.8, 4), plain_texture(b, 0.8, 4), shared, basis, steps)
        if basis is smooth:
            return fine, abs(np.corrcoef(plain_texture(a, 3, 16)[shared], plain_texture(b, 3, 16)[shared])[0, 1])
        if fine < 0.4:
            return max(fine, 0), 0
        where = where[:, :2] @ (IDENTITY + change) + np.pad(where[:, 2:], ((0, 0), (2, 0)))
    raise AssertionError


def plain_maximum(
    a: np.ndarray, b: np.ndarray, shared: np.ndarray, basis: np.ndarray, steps: int
) -> tuple[float, np.ndarray]:
    """Return the largest correlation that at most so many Gauss-Newton steps reach, and the displacement there."""
    sign = np.sign(np.corrcoef(a[shared], b[shared])[0, 1])
    moved = np.zeros((2, len(basis)))
    best, best_moved = -1.0, moved
    for _ in range(steps + 1):
        places = PLACES + np.tensordot(moved, basis, 1)
        warped, inside = plain_warp(b, places)
        inside &= shared
        correlation = sign * np.corrcoef(a[inside], warped[inside])[0, 1]
        if correlation <= best + 1e-4:
            break
        best, best_moved = correlation, moved
        slopes = [plain_warp(slope * 32, places)[0][inside] for slope in np.gradient(b)]
        jacobian = np.vstack([slope * basis[:, inside] for slope in slopes]).T
        target, current = (one[inside] - one[inside].mean() for one in (sign * a, warped))
        jacobian = (jacobian - jacobian.mean(axis=0)) / np.linalg.norm(current)
        target, current = target / np.linalg.norm(target), current / np.linalg.norm(current)
        jacobian -= np.outer(current, current @ jacobian)
        form = jacobian.T @ jacobian
        form += (1e-4 * np.trace(form) / len(form) + 1e-9) * np.eye(len(form))
        moved = moved + np.linalg.solve(form, jacobian.T @ (target - current * (target @ current))).reshape(2, -1)
    return best, best_moved


def plain_texture(image: np.ndarray, fine: float, coarse: float) -> np.ndarray:
    band = gaussian_filter(image, fine, truncate=3) - gaussian_filter(image, coarse, truncate=3)
    contrast = np.sqrt(gaussian_filter(band**2, coarse, truncate=3))
    return band / (contrast + contrast.mean() + 2)


def plain_warp(image: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    warped = map_coordinates(image, 32 * places + 31.5, order=1, mode="nearest")
    return warped, (np.abs(places) <= 1).all(axis=0)


def test_results_of_threads_come_in_order_and_do_not_pile_up() -> None:
    started = []
    results = thread_results(lambda number: started.append(number) or number, range(1000))
    assert next(results) == 0
    assert len(started) <= available_cores() + 1
    assert list(results) == list(range(1, 1000))
