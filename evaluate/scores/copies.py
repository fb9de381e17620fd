"""Search for copies of training images: mirrored, turned, cropped, padded, shifted, or in part.

Every image is compared with every training image by short descriptors: the whole image in eight
orientations with windows of the other (crops both ways), and patches of half the side with patches
nearby. Descriptors are whitened on the training images, so that what all images share counts little
(Jegou and Chum, Negative Evidences and Co-occurences in Image Retrieval, ECCV 2012). Their absolute
cosine also finds inverted images. The best matches are then verified: both images are registered and
compared by fine and coarse textures (`registration.py`), and phase correlation finds the displacement
at which part of two images agrees (Kuglin and Hines, The Phase Correlation Image Alignment Method,
1975).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray
from PIL import Image

from maskloom.evaluate.scores.registration import box_transform, registered_similarities
from maskloom.pipeline.dataset.near_duplicates.textures import Box, texture
from maskloom.pipeline.parallel import available_cores
from maskloom.pipeline.progress import progress

Floats = NDArray[np.float32]

SIDE = 128  # of the images that are compared
HALF, WINDOW, PATCH = SIDE // 2, 32, 16  # sides of thumbnail, window and patch descriptors
ORIENTATIONS = 8
WINDOW_GRIDS = ((0.95, 3), (0.9, 3), (0.85, 3), (0.8, 5))  # side of the crops, and how many start along an axis
WINDOW_DIMENSIONS, PATCH_DIMENSIONS = 192, 96
REGULARISATION = 0.1  # share of the mean variance; keeps noise from being amplified
STEP = 4  # of the grid of patches, in thumbnail pixels
VERIFIED = 3  # best matches of each kind that are verified
BLOCK = 128  # images compared at a time
OVERLAP_SIDE, LEAST_VARIANCE = 56, 0.02  # of the area in which displaced textures are compared
PEAKS = 3  # displacements tried
BLACK = 16  # grey levels that padding may differ from black or white
LEAST_CONTENT, LEAST_PADDING = 0.4, 0.03  # of the side
FEW_PADDED = 0.05  # of the training images; where more have padding, it belongs to the images

WHOLE_IMAGE, JOINT, PART, OVERLAP = "whole image", "whole and parts", "part", "displaced part"
FINE, COARSE = "fine details", "coarse details"  # after registration
SIMILARITIES = (WHOLE_IMAGE, JOINT, FINE, COARSE, PART, OVERLAP)
TURNS = (
    "",
    "turned by 90 degrees",
    "turned by 180 degrees",
    "turned by 90 degrees",
    "mirrored left-right",
    "mirrored and turned by 90 degrees",
    "mirrored up-down",
    "mirrored and turned by 90 degrees",
)


@dataclass(frozen=True)
class Matches:
    """The best matches of N images among the training images, by each measure of similarity.

    Attributes:
        similarity: by name in `SIMILARITIES`, (N,), 0..1.
        index: by the same name, (N,) index of the training image.
        transformation: by the same name, how the training image was changed, in words.
    """

    similarity: dict[str, NDArray[np.float64]]
    index: dict[str, NDArray[np.int64]]
    transformation: dict[str, list[str]]


@dataclass(frozen=True, order=True)
class Match:
    """A training image that one image resembles, by one measure."""

    similarity: float
    index: int
    transformation: str


@dataclass(frozen=True)
class Described:
    """The descriptors of N images.

    Attributes:
        plain: (N, 64, 64) thumbnails.
        textures: (N, 128, 128).
        wholes: (N, 8, dimensions), by orientation.
        windows: (N, boxes, dimensions).
        patches: (N, 8, patches, dimensions), by orientation.
    """

    plain: Floats
    textures: Floats
    wholes: Floats
    windows: Floats
    patches: Floats

    def row(self, index: int) -> Described:
        """Return the descriptors of one image."""
        row = slice(index, index + 1)
        return Described(self.plain[row], self.textures[row], self.wholes[row], self.windows[row], self.patches[row])


class Whitening:
    """Principal components scaled to nearly equal variance, of vectors of unit length."""

    def __init__(self, vectors: Floats, dimensions: int) -> None:
        """Fit to (N, D) vectors."""
        values, components = np.linalg.eigh((vectors.T @ vectors / len(vectors)).astype(np.float64))
        values, components = values[::-1][:dimensions], components[:, ::-1][:, :dimensions]
        scale = np.sqrt(np.maximum(values, 0) + REGULARISATION * values.mean() + 1e-12)
        self.components = (components / scale).astype(np.float32)

    def __call__(self, vectors: Floats) -> Floats:
        """Return (..., D) unit vectors as whitened unit vectors, (..., dimensions)."""
        return unit_vectors(vectors @ self.components)


class CopySearch:
    """Compares images with a set of training images.

    Args:
        train: (T, 128, 128) uint8 grey.
    """

    def __init__(self, train: NDArray[np.uint8]) -> None:
        """Describe the training images."""
        padded = sum(without_padding(image) is not image for image in train)
        self.trims = padded < FEW_PADDED * len(train)
        self.textures = np.stack([texture(image.astype(np.float32)) for image in train])
        self.plain = halved(train.astype(np.float32))
        self.contents = [content_box(one) for one in self.plain]
        window_vectors, patches = windows_of(self.plain), patches_of(halved(self.textures))
        self.whiten_windows = Whitening(window_vectors.reshape(-1, WINDOW**2), WINDOW_DIMENSIONS)
        self.whiten_patches = Whitening(patches.reshape(-1, PATCH**2), PATCH_DIMENSIONS)
        self.windows = self.whiten_windows(window_vectors)
        self.wholes = self.whiten_windows(wholes_of(self.plain))
        self.patches = self.whiten_patches(patches)

    def matches(self, images: NDArray[np.uint8]) -> Matches:
        """Return the best matches of (N, 128, 128) uint8 grey images."""
        found: list[dict[str, Match]] = []
        searching = progress("searching copies", len(images), "images")
        with ThreadPoolExecutor(available_cores()) as threads, searching as advance:
            for start in range(0, len(images), BLOCK):
                block = self._described(images[start : start + BLOCK])
                whole, part = self._whole_similarities(block), self._part_similarities(block)
                rows = [block.row(row) for row in range(len(whole))]
                for one in threads.map(self._verified, rows, whole, part):
                    found.append(one)
                    advance()
        return Matches(
            {name: np.array([one[name].similarity for one in found]) for name in SIMILARITIES},
            {name: np.array([one[name].index for one in found], dtype=np.int64) for name in SIMILARITIES},
            {name: [one[name].transformation for one in found] for name in SIMILARITIES},
        )

    def _described(self, images: NDArray[np.uint8]) -> Described:
        """Return the descriptors of (N, 128, 128) uint8 images.

        Padding is cut off first, unless training images have some.
        """
        if self.trims:
            images = np.stack([without_padding(image) for image in images])
        textures = np.stack([texture(image.astype(np.float32)) for image in images])
        plain, thumbnails = halved(images.astype(np.float32)), halved(textures)
        turned = [self.whiten_patches(patches_of(oriented(thumbnails, turn))) for turn in range(ORIENTATIONS)]
        wholes, windows = self.whiten_windows(wholes_of(plain)), self.whiten_windows(windows_of(plain))
        return Described(plain, textures, wholes, windows, np.stack(turned, axis=1))

    def _whole_similarities(self, images: Described) -> Floats:
        """Return the best cosine of whole images with windows of the others, both ways, (N, T)."""
        best = np.zeros((len(images.textures), len(self.textures)), np.float32)
        for turn in range(ORIENTATIONS):
            for box in range(len(boxes())):
                np.maximum(best, np.abs(images.wholes[:, turn] @ self.windows[:, box].T), out=best)
                np.maximum(best, np.abs(images.windows[:, box] @ self.wholes[:, turn].T), out=best)
        return best

    def _part_similarities(self, images: Described) -> Floats:
        """Return the best cosine of patches with patches at nearly the same place, (N, T)."""
        best = np.zeros((len(images.textures), len(self.textures)), np.float32)
        for turn in range(ORIENTATIONS):
            for mine, theirs in patch_pairs():
                np.maximum(best, np.abs(images.patches[:, turn, mine] @ self.patches[:, theirs].T), out=best)
        return best

    def _verified(self, image: Described, whole: Floats, part: Floats) -> dict[str, Match]:
        """Return the best match of one image by each measure."""
        joint = (whole + part) / 2
        likeliest = int(joint.argmax())
        registered = [self._registered(image, index) for index in dict.fromkeys([*best_first(whole), likeliest])]
        overlaps = [self._displaced(image, index) for index in best_first(part)]
        return {
            WHOLE_IMAGE: Match(float(whole.max()), registered[0][0].index, registered[0][0].transformation),
            JOINT: Match(float(joint.max()), likeliest, _in_words(*self._placed(image, likeliest))),
            FINE: max(fine for fine, _ in registered),
            COARSE: max(coarse for _, coarse in registered),
            PART: Match(float(part.max()), overlaps[0].index, overlaps[0].transformation),
            OVERLAP: max(overlaps),
        }

    def _placed(self, image: Described, index: int) -> tuple[int, int, int]:
        """Return orientation, direction (1: the image shows more than the original) and window."""
        mine = image.wholes[0] @ self.windows[index].T
        cosines = np.abs(np.stack([mine, self.wholes[index] @ image.windows[0].T], axis=1))
        turn, direction, box = np.unravel_index(int(cosines.argmax()), cosines.shape)
        return int(turn), int(direction), int(box)

    def _registered(self, image: Described, index: int) -> tuple[Match, Match]:
        """Return how well fine and coarse details agree after registration.

        It starts where the descriptors agree, and where the contents of both images coincide, as
        padding need not be of the same width on all sides.
        """
        turn, direction, box = self._placed(image, index)
        mine, original = np.ascontiguousarray(oriented(image.plain[0], turn)), self.plain[index]
        place = box_transform(boxes()[0], boxes()[box])
        fixed, moving = (original, mine) if direction else (mine, original)
        found = [registered_similarities(fixed, moving, place)]
        content, other = content_box(mine), self.contents[index]
        if np.abs(np.subtract(content, other)).max() > LEAST_PADDING:
            found.append(registered_similarities(original, mine, box_transform(other, content)))
        words = _in_words(turn, direction, box)
        fine, coarse = (Match(max(one), index, words) for one in zip(*found, strict=True))
        return fine, coarse

    def _displaced(self, image: Described, index: int) -> Match:
        """Return how well a part agrees, at the displacement that phase correlation finds."""
        mine, theirs = np.array(patch_pairs()).T
        cosines = np.abs((image.patches[0][:, mine] * self.patches[index, theirs]).sum(axis=2))
        turn = int(cosines.max(axis=1).argmax())
        overlap = largest_overlap(np.ascontiguousarray(oriented(image.textures[0], turn)), self.textures[index])
        return Match(overlap, index, ", ".join(filter(None, ["in part", TURNS[turn]])))


def best_first(similarities: Floats) -> list[int]:
    """Return the training images to verify."""
    return [int(index) for index in np.argsort(-similarities, kind="stable")[:VERIFIED]]


def without_padding(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a (128, 128) image without padding, at its old size; itself unless all sides have some."""
    top, left, bottom, right = content_box(halved(image.astype(np.float32)))
    if min(top, left, 1 - bottom, 1 - right) <= LEAST_PADDING:
        return image
    corners = SIDE * left, SIDE * top, SIDE * right, SIDE * bottom
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=corners))


def content_box(thumbnail: Floats) -> Box:
    """Return the area of a (64, 64) thumbnail without black or white rows and columns around it."""
    smooth, ends = scipy.ndimage.uniform_filter(thumbnail, 3), []
    for axis in (1, 0):
        content = np.flatnonzero((smooth.max(axis=axis) > BLACK) & (smooth.min(axis=axis) < 255 - BLACK))
        if len(content) < LEAST_CONTENT * HALF:
            return boxes()[0]
        ends.append((content[0] / HALF, (content[-1] + 1) / HALF))
    return float(ends[0][0]), float(ends[1][0]), float(ends[0][1]), float(ends[1][1])


def largest_overlap(a: Floats, b: Floats) -> float:
    """Return the largest correlation of a part of two textures at their likeliest displacements.

    Args:
        a: (128, 128).
        b: (128, 128).
    """
    spectrum = scipy.fft.rfft2(a, (2 * SIDE, 2 * SIDE)) * np.conj(scipy.fft.rfft2(b, (2 * SIDE, 2 * SIDE)))
    magnitude = np.abs(spectrum)
    if not magnitude.any():
        return 0.0
    surface = np.abs(scipy.fft.irfft2(spectrum / (magnitude + 0.05 * magnitude.mean())))
    best = 0.0
    for peak in np.argpartition(-surface.ravel(), PEAKS)[:PEAKS]:
        down, right = ((int(one) + SIDE) % (2 * SIDE) - SIDE for one in np.unravel_index(peak, surface.shape))
        if max(abs(down), abs(right)) <= HALF:
            best = max(best, _local_correlation(_shifted(a, down, right), _shifted(b, -down, -right)))
    return best


def _shifted(image: Floats, down: int, right: int) -> Floats:
    """Return the part of the image that remains when its first (or last) rows and columns go."""
    return image[max(down, 0) : SIDE + min(down, 0), max(right, 0) : SIDE + min(right, 0)]


def _local_correlation(a: Floats, b: Floats) -> float:
    """Return the largest absolute correlation of two images in a square of `OVERLAP_SIDE`."""
    mean_a, mean_b = box_means(a), box_means(b)
    variances = (box_means(a * a) - mean_a**2), (box_means(b * b) - mean_b**2)
    usable = (variances[0] > LEAST_VARIANCE) & (variances[1] > LEAST_VARIANCE)
    if not usable.any():
        return 0.0
    covariance = np.abs(box_means(a * b) - mean_a * mean_b)[usable]
    return min(1.0, float((covariance / np.sqrt(variances[0][usable] * variances[1][usable])).max()))


def box_means(image: Floats) -> NDArray[np.float64]:
    """Return the mean of each square of `OVERLAP_SIDE` in an image."""
    sums = np.pad(image.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    side = OVERLAP_SIDE
    inside = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return np.asarray(inside / side**2)


def oriented(images: Floats, turn: int) -> Floats:
    """Return (..., H, H) images in one of the eight orientations; from 4 on also mirrored."""
    turned = np.rot90(images, turn % 4, axes=(-2, -1))
    return turned[..., ::-1] if turn >= 4 else turned


def halved(images: Floats) -> Floats:
    """Return (..., H, W) images at half the size."""
    height, width = images.shape[-2:]
    return images.reshape(*images.shape[:-2], height // 2, 2, width // 2, 2).mean(axis=(-3, -1))


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
    cut = [resampling(top, bottom) @ plain @ resampling(left, right).T for top, left, bottom, right in boxes()]
    return centred(np.stack(cut, axis=1))


def wholes_of(plain: Floats) -> Floats:
    """Return the eight orientations of (N, 64, 64) thumbnails as unit vectors, (N, 8, 1024)."""
    small = halved(plain)
    return centred(np.stack([oriented(small, turn) for turn in range(ORIENTATIONS)], axis=1))


def patches_of(thumbnails: Floats) -> Floats:
    """Return the patches of (N, 64, 64) textures as unit vectors, (N, patches, 256)."""
    side = 2 * PATCH
    cut = [halved(thumbnails[:, top : top + side, left : left + side]) for top, left in patch_places()]
    return centred(np.stack(cut, axis=1))


@cache
def patch_places() -> tuple[tuple[int, int], ...]:
    """Return the top left corners of the patches in the thumbnail."""
    starts = range(0, HALF - 2 * PATCH + 1, STEP)
    return tuple((top, left) for top in starts for left in starts)


@cache
def patch_pairs() -> tuple[tuple[int, int], ...]:
    """Return which patches of two images to compare: every other one with its neighbours."""
    return tuple(
        (mine, theirs)
        for mine, (top, left) in enumerate(patch_places())
        if top % (2 * STEP) == 0 and left % (2 * STEP) == 0
        for theirs, (down, right) in enumerate(patch_places())
        if max(abs(top - down), abs(left - right)) <= STEP
    )


def centred(images: Floats) -> Floats:
    """Return (..., H, W) images as vectors of mean 0 and length 1."""
    vectors = images.reshape(*images.shape[:-2], -1)
    return unit_vectors(vectors - vectors.mean(axis=-1, keepdims=True))


def unit_vectors(vectors: Floats) -> Floats:
    """Return vectors of length 1; one that vanishes becomes zeros, which match nothing."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-3), dtype=np.float32)


def _in_words(turn: int, direction: int, box: int) -> str:
    if box == 0:
        scale = ""
    else:
        side = boxes()[box][2] - boxes()[box][0]
        scale = f"shown at about {side:.0%} of its size" if direction else f"cropped to about {side:.0%}"
    return ", ".join(filter(None, [TURNS[turn], scale])) or "same place and size"
