"""Registered images agree if one shows the other, however it was moved."""

import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter

from maskloom.evaluate.scores.registration import SIDE, box_transform, registered_similarities

IDENTITY = np.eye(2, 3)


def picture(seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(SIDE, SIDE)), 2)
    return (128 + 300 * noise).clip(0, 255)


def moved(image: np.ndarray) -> np.ndarray:
    """Return the image turned by 2 degrees, 5 % larger and shifted by a pixel."""
    angle = np.deg2rad(2)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / 1.05
    return affine_transform(image, matrix, [1.5, 0.5], order=1, mode="nearest")


@pytest.mark.parametrize("sign", [1, -1])
def test_a_moved_image_is_recognised_and_another_is_not(sign: int) -> None:
    copy, other = (128 + sign * (moved(picture(seed)) - 128) for seed in (0, 1))
    assert min(registered_similarities(picture(0), copy, IDENTITY)) > 0.95
    assert registered_similarities(picture(0), other, IDENTITY)[0] < 0.7


def test_nothing_agrees_without_overlap() -> None:
    away = np.add(IDENTITY, [[0, 0, 5], [0, 0, 5]])
    assert registered_similarities(picture(0), picture(0), away) == (0, 0)
    assert registered_similarities(picture(0), np.full((SIDE, SIDE), 90.0), IDENTITY) == (0, 0)


def test_a_box_maps_onto_a_box() -> None:
    found = box_transform((0, 0, 1, 1), (0.2, 0.0, 1.0, 0.8))
    assert found @ [-1, -1, 1] == pytest.approx([-0.6, -1])
    assert found @ [1, 1, 1] == pytest.approx([1, 0.6])
