"""The nearest training image of each image: in a network's feature space, and pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.scores.distances import Points, nearest_points

SIDE = 64
CROP = 0.9  # side of the crops that are tried, as a share of the image's
CHUNK = 128  # images whose pixels are in memory as floating-point numbers
MIDDLE = 128  # grey level; smaller numbers are rounded less


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each of N images.

    Attributes:
        index: (N,) index of the training image.
        distance: (N,); smaller is nearer.
    """

    index: NDArray[np.int64]
    distance: NDArray[np.float64]


def nearest_features(features: Points, train: Points) -> Nearest:
    """Return the nearest training image by Euclidean distance of features, (N, D) to (T, D)."""
    index, squared = nearest_points(features, train)
    return Nearest(index, np.sqrt(squared))


def nearest_pixels(images: NDArray[np.uint8], train: NDArray[np.uint8]) -> Nearest:
    """Return the nearest training image by 1 - correlation of pixels, best over flips and crops.

    Args:
        images: (N, 64, 64) uint8 grey.
        train: (T, 64, 64) uint8 grey.
    """
    index, distance = [], []
    lengths = np.concatenate([_lengths(train[rows]) for rows in _chunks(len(train))])
    for rows in _chunks(len(images)):
        tried = [halves_of(normalised_rows(variant)) for variant in variants(images[rows])]
        correlation = np.concatenate(
            [_largest_products(tried, train[others]) for others in _chunks(len(train))], axis=1
        )
        correlation /= lengths
        index.append(correlation.argmax(axis=1))
        distance.append(1 - correlation.max(axis=1))
    return Nearest(np.concatenate(index), np.concatenate(distance).astype(np.float64))


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _lengths(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the length of each image's row after its mean is subtracted, (N,); 1 for constant images."""
    length = np.std(images.reshape(len(images), -1), axis=1) * np.sqrt(images[0].size)
    return np.where(length > 0, length, 1).astype(np.float32)


def _largest_products(
    tried: list[tuple[NDArray[np.float32], NDArray[np.float32]]], train: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Return the largest product of any variant of N images, mirrored or not, with T training images, (N, T).

    The variants' rows have a mean of 0, so the mean of a training image does not matter.
    """
    even, odd = (half.T for half in halves_of(train.reshape(len(train), -1).astype(np.float32) - MIDDLE))
    # The product of an image is the sum of those of its halves, and that of its mirror image their difference.
    return reduce(np.maximum, (one @ even + np.abs(other @ odd) for one, other in tried))


def halves_of(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what an image has in common with its mirror image, and the rest, (N, 32 x 64) each.

    Args:
        rows: (N, 64 x 64).
    """
    images = rows.reshape(len(rows), SIDE, SIDE)
    left, right = images[..., : SIDE // 2], images[..., ::-1][..., : SIDE // 2]
    common, rest = ((half / 2**0.5).reshape(len(rows), -1) for half in (left + right, left - right))
    return common, rest


def variants(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """Yield (N, 64, 64) images unchanged and cropped at centre and corners."""
    from skimage.transform import resize

    edge = images.shape[1] - round(CROP * images.shape[1])
    offsets = [(edge // 2, edge // 2), *((row, column) for row in (0, edge) for column in (0, edge))]
    crops = [
        images[:, row : row + images.shape[1] - edge, column : column + images.shape[2] - edge]
        for row, column in offsets
    ]
    yield images
    for crop in crops:
        yield resize(crop, images.shape, order=1, preserve_range=True)


def normalised_rows(images: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return each image as a row of zero mean and unit length, (N, H W) float32.

    Constant images become zeros.
    """
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > 0, length, 1)
    return rows
