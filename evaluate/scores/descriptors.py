"""Short descriptors of whole images, of windows and of patches, by which copies are looked for.

They are whitened on the training images, so that what all images share counts little (Jegou and
Chum, Negative Evidences and Co-occurences in Image Retrieval, ECCV 2012).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.ndimage
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from maskloom.evaluate.scores.registration import blurred
from maskloom.pipeline.dataset.near_duplicates import textures
from maskloom.pipeline.dataset.near_duplicates.textures import Box

Floats = NDArray[np.float32]

SIDE = 128  # of the images that are compared
HALF, WINDOW, PATCH = SIDE // 2, 32, 16  # sides of thumbnail, window and patch descriptors
ORIENTATIONS = 8
WINDOW_GRIDS = ((0.95, 3), (0.9, 3), (0.85, 3), (0.8, 5))  # side of the crops, and how many start along an axis
WINDOW_DIMENSIONS, PATCH_DIMENSIONS = 192, 96
BARE_DIMENSIONS = 64  # of windows of images without bars
ROUGH_WINDOW_DIMENSIONS, ROUGH_PATCH_DIMENSIONS = 24, 32  # of a rough look
EXPLAINED = 0.98  # share of the variance; images of few pixels have nothing but noise in the components after it
REGULARISATION = 0.1  # share of the mean variance; keeps noise from being amplified
STEP = 4  # of the grid of patches, in thumbnail pixels
BLACK = 16  # grey levels that padding may differ from black or white
LEAST_CONTENT, LEAST_PADDING = 0.4, 0.03  # of the side


@dataclass(frozen=True)
class Vectors:
    """The whitened vectors of N images, all of length 1.

    Attributes:
        wholes: (N, 8, dimensions), by orientation.
        windows: (N, windows, dimensions).
        patches: (N, 8, patches, dimensions), by orientation.
    """

    wholes: Floats
    windows: Floats
    patches: Floats

    def of(self, row: int) -> Vectors:
        """Return the vectors of one image."""
        return Vectors(self.wholes[[row]], self.windows[[row]], self.patches[[row]])

    def roughly(self) -> Vectors:
        """Return the leading components of the vectors."""
        wholes, windows = (unit_vectors(one[..., :ROUGH_WINDOW_DIMENSIONS]) for one in (self.wholes, self.windows))
        return Vectors(wholes, windows, unit_vectors(self.patches[..., :ROUGH_PATCH_DIMENSIONS]))


@dataclass(frozen=True)
class Described:
    """What N images are compared by.

    Attributes:
        plain: (N, 64, 64) thumbnails.
        textures: (N, 128, 128).
        contents: the area of each thumbnail without black or white rows and columns around it.
        vectors: the short descriptors.
    """

    plain: Floats
    textures: Floats
    contents: list[Box]
    vectors: Vectors


class Whitening:
    """Principal components scaled to nearly equal variance, of vectors of unit length.

    Attributes:
        components: (D, dimensions).
    """

    def __init__(self, second_moments: NDArray[np.float64], most: int) -> None:
        """Fit to the mean of v v' over vectors v, (D, D); of the components, at most `most` are kept."""
        with threadpool_limits(1):  # these threads would mostly wait for each other
            values, components = np.linalg.eigh(second_moments)
        values = values[::-1]
        kept = min(most, int(np.searchsorted(np.cumsum(values), EXPLAINED * values.sum())) + 1)
        values, components = values[:kept], components[:, ::-1][:, :kept]
        scale = np.sqrt(np.maximum(values, 0) + REGULARISATION * values.mean() + 1e-12)
        self.components = (components / scale).astype(np.float32)

    def __call__(self, vectors: Floats) -> Floats:
        """Return (..., D) unit vectors as whitened unit vectors, (..., dimensions)."""
        return unit_vectors(vectors @ self.components)


def second_moments(vectors: Floats) -> NDArray[np.float64]:
    """Return the sum of v v' over (..., D) vectors v, (D, D)."""
    rows = vectors.reshape(-1, vectors.shape[-1])
    return (rows.T @ rows).astype(np.float64)


def whole_cosines(images: Vectors, wholes: Floats, windows: Floats) -> Floats:
    """Return the best cosine of N whole images with windows of T others, or the reverse, (N, T).

    Args:
        images: those of which only wholes were computed are compared as crops alone.
        wholes: (T, 8, dimensions) of the others; used where the images have windows.
        windows: (T, windows, dimensions) of the others.
    """
    crops = best_cosines(images.wholes, windows)
    return np.maximum(crops, best_cosines(images.windows, wholes)) if images.windows.size else crops


def part_cosines(images: Vectors, patches: Floats, neighbours: Mapping[int, Sequence[int]]) -> Floats:
    """Return the best cosine of N images' patches with T others', (T, patches, dimensions), each with its `neighbours`."""
    count, dimensions = len(patches), patches.shape[-1]
    best = np.zeros((len(images.patches), count), np.float32)
    places = patches.transpose(1, 0, 2)  # of one place, all images: their largest cosines are found faster
    for mine, theirs in neighbours.items():
        cosines = images.patches[:, :, mine].reshape(-1, dimensions) @ places[theirs].reshape(-1, dimensions).T
        np.abs(cosines, out=cosines)
        largest = cosines.reshape(len(best), ORIENTATIONS, -1).max(axis=1).reshape(len(best), -1, count).max(axis=1)
        np.maximum(best, largest, out=best)
    return best


def best_cosines(vectors: Floats, others: Floats) -> Floats:
    """Return the largest absolute cosine of an image's vectors, (N, V, D), with those of others, (T, W, D), as (N, T)."""
    # One large product is faster than one for each of V or W.
    cosines = vectors.reshape(-1, vectors.shape[-1]) @ others.reshape(-1, others.shape[-1]).T
    np.abs(cosines, out=cosines)
    return cosines.reshape(*vectors.shape[:2], -1).max(axis=1).reshape(-1, *others.shape[:2]).max(axis=2)


def without_padding(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a (128, 128) image without padding, at its old size; itself unless all sides have some.

    What is kept is square: an image that had black sides of its own before it was padded keeps them.
    """
    content = content_box(halved(image.astype(np.float32)))
    if not is_padded(content):
        return image
    top, left, bottom, right = content
    side = max(bottom - top, right - left)
    up, before = (min(max(0.0, (low + high - side) / 2), 1 - side) for low, high in ((top, bottom), (left, right)))
    corners = SIDE * before, SIDE * up, SIDE * (before + side), SIDE * (up + side)
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=corners))


def without_bars(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the content of a (128, 128) image, stretched to its size; itself if there are no bars around it."""
    content = content_box(halved(image.astype(np.float32)))
    if not has_bars(content):
        return image
    top, left, bottom, right = content
    top, left = (start + (start > 0) / HALF for start in (top, left))  # the box is smooth, and a pixel too large
    bottom, right = (stop - (stop < 1) / HALF for stop in (bottom, right))
    corners = SIDE * left, SIDE * top, SIDE * right, SIDE * bottom
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=corners))


def has_bars(content: Box) -> bool:
    """Return whether there is black or white on any side of an image's content."""
    top, left, bottom, right = content
    return max(top, left, 1 - bottom, 1 - right) > LEAST_PADDING


def is_padded(content: Box) -> bool:
    """Return whether there is padding on all sides of an image's content."""
    top, left, bottom, right = content
    return min(top, left, 1 - bottom, 1 - right) > LEAST_PADDING


def content_box(thumbnail: Floats) -> Box:
    """Return the area of a (64, 64) thumbnail without black or white rows and columns around it."""
    smooth, ends = scipy.ndimage.uniform_filter(thumbnail, 3), []
    for axis in (1, 0):
        content = np.flatnonzero((smooth.max(axis=axis) > BLACK) & (smooth.min(axis=axis) < 255 - BLACK))
        if len(content) < LEAST_CONTENT * HALF:
            return boxes()[0]
        ends.append((content[0] / HALF, (content[-1] + 1) / HALF))
    return float(ends[0][0]), float(ends[1][0]), float(ends[0][1]), float(ends[1][1])


def textures_of(images: NDArray[np.uint8]) -> Floats:
    """Return the textures of (N, 128, 128) images, as `near_duplicates.textures` computes them."""
    pixels = torch.from_numpy(images).float()
    band = blurred(pixels, textures.FINE) - blurred(pixels, textures.COARSE)
    contrast = blurred(band * band, textures.COARSE).clamp(min=0).sqrt()
    return (band / (contrast + textures.NOISE)).numpy()


def oriented(images: Floats, turn: int) -> Floats:
    """Return (..., H, H) images in one of the eight orientations; from 4 on also mirrored."""
    turned = np.rot90(images, turn % 4, axes=(-2, -1))
    return turned[..., ::-1] if turn >= 4 else turned


def oriented_box(box: Box, turn: int) -> Box:
    """Return where an area of an image lies in one of its eight orientations."""
    top, left, bottom, right = box
    for _ in range(turn % 4):
        top, left, bottom, right = 1 - right, top, 1 - left, bottom
    return (top, 1 - right, bottom, 1 - left) if turn >= 4 else (top, left, bottom, right)


def halved(images: Floats) -> Floats:
    """Return (..., H, W) images at half the size."""
    upper, lower = images[..., ::2, :], images[..., 1::2, :]
    return np.asarray((upper[..., ::2] + upper[..., 1::2] + lower[..., ::2] + lower[..., 1::2]) / 4)


@cache
def boxes() -> tuple[Box, ...]:
    """Return the whole image and its square crops of 95, 90, 85 and 80 % of the side."""
    found: list[Box] = [(0.0, 0.0, 1.0, 1.0)]
    for side, count in WINDOW_GRIDS:
        starts = np.linspace(0, 1 - side, count).tolist()
        found += [(top, left, top + side, left + side) for top in starts for left in starts]
    return tuple(found)


@cache
def resampling(start: float, stop: float) -> Floats:
    """Return the matrix that averages a part of an axis of the thumbnail, (WINDOW, HALF)."""
    edges = np.linspace(start * HALF, stop * HALF, WINDOW + 1)
    pixels = np.arange(HALF)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = np.maximum(shared, 0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)


def windows_of(plain: Floats) -> Floats:
    """Return the windows of (N, 64, 64) thumbnails as unit vectors, (N, boxes, 1024)."""
    found = np.empty((len(plain), len(boxes()), WINDOW**2), dtype=np.float32)
    for number, (top, left, bottom, right) in enumerate(boxes()):
        cut = resampling(top, bottom) @ plain @ resampling(left, right).T
        found[:, number] = centred(np.asarray(cut, dtype=np.float32))
    return found


def wholes_of(plain: Floats) -> Floats:
    """Return the eight orientations of (N, 64, 64) thumbnails as unit vectors, (N, 8, 1024)."""
    small = halved(plain)
    return centred(np.stack([oriented(small, turn) for turn in range(ORIENTATIONS)], axis=1))


def patches_of(thumbnails: Floats) -> Floats:
    """Return the patches of (N, 64, 64) textures as unit vectors, (N, patches, 256)."""
    cut = sliding_window_view(halved(thumbnails), (PATCH, PATCH), axis=(1, 2))[:, :: STEP // 2, :: STEP // 2]
    return centred(cut.reshape(len(cut), -1, PATCH, PATCH))


@cache
def patch_places() -> tuple[tuple[int, int], ...]:
    """Return the top left corners of the patches in the thumbnail."""
    starts = range(0, HALF - 2 * PATCH + 1, STEP)
    return tuple((top, left) for top in starts for left in starts)


@cache
def patch_neighbours() -> dict[int, list[int]]:
    """Return which patches of two images to compare: every other one, and of the other image those nearby."""
    return {
        mine: [
            theirs
            for theirs, (down, right) in enumerate(patch_places())
            if max(abs(top - down), abs(left - right)) <= STEP
        ]
        for mine, (top, left) in enumerate(patch_places())
        if top % (2 * STEP) == 0 and left % (2 * STEP) == 0
    }


@cache
def rough_neighbours() -> dict[int, list[int]]:
    """Return which patches a rough look compares: those of every second row and column."""
    starts = {mine: np.array(patch_places()[mine]) for mine in patch_neighbours()}
    return {mine: near for mine, near in patch_neighbours().items() if not (starts[mine] % (4 * STEP)).any()}


def centred(images: Floats) -> Floats:
    """Return (..., H, W) images as vectors of mean 0 and length 1."""
    vectors = images.reshape(*images.shape[:-2], -1)
    return unit_vectors(vectors - vectors.mean(axis=-1, keepdims=True))


def unit_vectors(vectors: Floats) -> Floats:
    """Return vectors of length 1; one that vanishes becomes zeros, which match nothing."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-3), dtype=np.float32)
