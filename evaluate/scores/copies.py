"""Search for copies of training images: mirrored, turned, cropped, padded, shifted, or in part.

Every image is compared with every training image by short descriptors (`descriptors.py`): the whole
image in eight orientations with windows of the other (crops both ways), and patches of half the side
with patches nearby. Their absolute cosine also finds inverted images. The best matches are then
verified: both images are registered and compared by fine and coarse textures (`registration.py`), and
parts of both are compared at the displacement at which they agree (`overlap.py`). The cosine of whole
images alone decides nothing: a plain grey image between black bars resembles others between such bars.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from maskloom.evaluate.scores.byte_vectors import ByteVectors
from maskloom.evaluate.scores.calibration import copy_threshold
from maskloom.evaluate.scores.descriptors import (
    BARE_DIMENSIONS,
    LEAST_PADDING,
    ORIENTATIONS,
    PATCH,
    PATCH_DIMENSIONS,
    ROUGH_PATCH_DIMENSIONS,
    ROUGH_WINDOW_DIMENSIONS,
    WINDOW,
    WINDOW_DIMENSIONS,
    Described,
    Floats,
    Vectors,
    Whitening,
    boxes,
    content_box,
    halved,
    has_bars,
    is_padded,
    oriented,
    oriented_box,
    part_cosines,
    patch_neighbours,
    patch_places,
    patches_of,
    rough_neighbours,
    second_moments,
    textures_of,
    unit_vectors,
    whole_cosines,
    wholes_of,
    windows_of,
    without_bars,
    without_padding,
)
from maskloom.evaluate.scores.overlap import largest_overlaps
from maskloom.evaluate.scores.registration import Affine, box_transform, registered_similarities
from maskloom.evaluate.scores.threads import thread_results
from maskloom.pipeline.dataset.near_duplicates.textures import Box
from maskloom.pipeline.progress import progress

Pair = tuple[int, int]  # an image of a block, and a training image
Cosines = Callable[[Vectors, NDArray[np.int64]], Floats]  # from N images and rows of T training images to (N, T)

VERIFIED_WHOLES, VERIFIED_BARE, VERIFIED_PARTS = 10, 4, 3  # best matches that are verified
BLOCK, COMPARED = 32, 1024  # images described at a time, and pairs compared at a time
EXHAUSTIVE = 1000  # training images with which every image is compared fully; of more, with its candidates
CANDIDATES = 48  # training images per image and kind of descriptor
FEW_PADDED = 0.05  # of the training images; where more have padding, it belongs to the images

PART, OVERLAP = "part", "displaced part"
FINE, COARSE = "fine details", "coarse details"  # after registration
WHOLE_COARSE = "whole and coarse details"
SIMILARITIES = (FINE, COARSE, WHOLE_COARSE, PART, OVERLAP)
# No image that is less similar is called a copy. Unrelated images of BUSI reach up to .9 by coarse details beside few others,
# and drawings of speckle .77 by parts; copies reach more by the measures that are meant to find them.
LEAST = {FINE: 0.65, COARSE: 0.9, WHOLE_COARSE: 0.65, PART: 0.85, OVERLAP: 0.85}
COARSE_SHARE = 0.3  # of the two in Fisher's z; where noise covers the details, each alone falls short
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

    def of(self, row: int) -> Matches:
        """Return the matches of one image."""
        return Matches(
            {name: values[[row]] for name, values in self.similarity.items()},
            {name: values[[row]] for name, values in self.index.items()},
            {name: [words[row]] for name, words in self.transformation.items()},
        )


@dataclass(frozen=True, order=True)
class Match:
    """A training image that one image resembles, by one measure."""

    similarity: float
    index: int
    transformation: str


class CopySearch:
    """Compares images with a set of training images.

    Where training images have bars that made them square, whole images are also compared without bars:
    a crop of the image within them gets bars of its own.

    Args:
        train: (T, 128, 128) uint8 grey.
        crops_only: whether to look for crops alone, of images without their bars.
    """

    def __init__(self, train: NDArray[np.uint8], crops_only: bool = False) -> None:
        """Describe the training images; memory holds 36 kB per image, and 4 kB more where images have bars."""
        self.train, self.crops_only, count = train, crops_only, len(train)
        starts = range(0, count, BLOCK)
        self.contents, moments = [], [np.zeros((side**2, side**2)) for side in (WINDOW, PATCH)]
        for contents, found in thread_results(self._surveyed, starts):
            self.contents += contents
            moments = [total + one for total, one in zip(moments, found, strict=True)]
        self.trims = sum(map(is_padded, self.contents)) < FEW_PADDED * count
        dimensions = BARE_DIMENSIONS if crops_only else WINDOW_DIMENSIONS
        self.whiten_windows = Whitening(moments[0] / (count * len(boxes())), dimensions)
        self.whiten_patches = Whitening(moments[1] / (count * len(patch_places())), PATCH_DIMENSIONS)
        of_windows, of_patches = (one.components.shape[1] for one in (self.whiten_windows, self.whiten_patches))
        self.wholes = ByteVectors(count, 0 if crops_only else ORIENTATIONS, of_windows)
        self.windows = ByteVectors(count, len(boxes()), of_windows)
        self.patches = ByteVectors(count, 0 if crops_only else len(patch_places()), of_patches)
        list(thread_results(self._describe, starts))
        barred = not crops_only and sum(map(has_bars, self.contents)) >= FEW_PADDED * count
        self.bare = CopySearch(train, crops_only=True) if barred else None

    def _shown(self, rows: slice | list[int]) -> NDArray[np.uint8]:
        """Return training images as they are compared."""
        images = self.train[rows]
        return np.stack([without_bars(image) for image in images]) if self.crops_only else images

    def _surveyed(self, start: int) -> tuple[list[Box], list[NDArray[np.float64]]]:
        """Return the contents of a block of training images, and the second moments of their windows and patches."""
        images = self._shown(slice(start, start + BLOCK))
        plain = halved(images.astype(np.float32))
        patches = np.zeros((0, PATCH**2), np.float32) if self.crops_only else patches_of(halved(textures_of(images)))
        return [content_box(one) for one in plain], [second_moments(windows_of(plain)), second_moments(patches)]

    def _describe(self, start: int) -> None:
        """Fill in the descriptors of a block of training images."""
        rows = slice(start, start + BLOCK)
        plain = halved(self._shown(rows).astype(np.float32))
        self.windows.put(rows, self.whiten_windows(windows_of(plain)))
        if not self.crops_only:
            self.wholes.put(rows, self.whiten_windows(wholes_of(plain)))
            textures = halved(textures_of(self.train[rows]))
            self.patches.put(rows, self.whiten_patches(patches_of(textures)))

    def matches(self, images: NDArray[np.uint8]) -> Matches:
        """Return the best matches of (N, 128, 128) uint8 grey images."""
        return self.matches_in([images], len(images))

    def matches_in(self, batches: Iterable[NDArray[np.uint8]], count: int) -> Matches:
        """Return the best matches of images of which only a few are in memory at a time.

        Args:
            batches: (B, 128, 128) uint8 grey each.
            count: the number of all images.
        """
        found: list[dict[str, Match]] = []
        blocks = chain.from_iterable(map(in_blocks, batches))
        with progress("searching copies", count, "images") as advance:
            for block in thread_results(self._block_matches, blocks):
                found += block
                advance(len(block))
        return Matches(
            {name: np.array([one[name].similarity for one in found]) for name in SIMILARITIES},
            {name: np.array([one[name].index for one in found], dtype=np.int64) for name in SIMILARITIES},
            {name: [one[name].transformation for one in found] for name in SIMILARITIES},
        )

    def _block_matches(self, images: NDArray[np.uint8]) -> list[dict[str, Match]]:
        """Return the best match of each image by each measure."""
        block = self._described(images)
        whole, part = self._cosines(block.vectors)
        likeliest = (whole + part).argmax(axis=1).tolist()
        shown = [
            list(dict.fromkeys([*best_first(one, VERIFIED_WHOLES), two]))
            for one, two in zip(whole, likeliest, strict=True)
        ]
        parts = [best_first(one, VERIFIED_PARTS) for one in part]
        registered, displaced = self._registered(block, pairs_of(shown), whole), self._displaced(block, pairs_of(parts))
        if self.bare:
            registered += self.bare._bare_registered(images)
        found = [
            {
                PART: replace(displaced[row, near[0]], similarity=min(1.0, float(part[row].max()))),
                OVERLAP: max(displaced[row, index] for index in near),
            }
            for row, near in enumerate(parts)
        ]
        for (row, _), matches in registered:
            for name, match in matches.items():
                found[row][name] = max(match, found[row].get(name, match))
        return found

    def _bare_registered(self, images: NDArray[np.uint8]) -> list[tuple[Pair, dict[str, Match]]]:
        """Return how well images without bars agree with the training images, which have none either."""
        block = self._described(np.stack([without_bars(image) for image in images]))
        whole, _ = self._cosines(block.vectors)
        return self._registered(block, pairs_of([best_first(one, VERIFIED_BARE) for one in whole]), whole)

    def _described(self, images: NDArray[np.uint8]) -> Described:
        """Return the descriptors of (N, 128, 128) uint8 images; of crops, those of whole images alone.

        Padding is cut off first, unless training images have some.
        """
        if self.trims:
            images = np.stack([without_padding(image) for image in images])
        plain = halved(images.astype(np.float32))
        contents, wholes = [content_box(one) for one in plain], self.whiten_windows(wholes_of(plain))
        if self.crops_only:
            nothing = np.zeros((len(images), 0, 0), np.float32)
            return Described(plain, nothing, contents, Vectors(wholes, nothing, nothing))
        textures = textures_of(images)
        patches = np.empty((len(images), ORIENTATIONS, *self.patches.numbers.shape[1:]), np.float32)
        for turn in range(ORIENTATIONS):
            patches[:, turn] = self.whiten_patches(patches_of(oriented(halved(textures), turn)))
        return Described(plain, textures, contents, Vectors(wholes, self.whiten_windows(windows_of(plain)), patches))

    def _cosines(self, images: Vectors) -> tuple[Floats, Floats]:
        """Return the best cosines with every training image, (N, T): of whole images, and of patches.

        Of many training images, a rough look rules out most: their cosines are 0.
        """
        whole = self._looked_up(images, self._rough_whole_cosines, self._whole_cosines)
        if self.crops_only:
            return whole, np.zeros_like(whole)
        return whole, self._looked_up(images, self._rough_part_cosines, self._part_cosines)

    def _looked_up(self, images: Vectors, look: Cosines, compare: Cosines) -> Floats:
        """Return the best cosines with every training image, (N, T); see `_cosines`."""
        rows = np.arange(len(self.train))
        if len(rows) <= EXHAUSTIVE:
            return self._compared(images, rows, compare)
        roughly = self._compared(images.roughly(), rows, look)
        near = np.argpartition(-roughly, CANDIDATES, axis=1)[:, :CANDIDATES]
        return np.concatenate([self._compared(images.of(row), one, compare) for row, one in enumerate(near)])

    def _compared(self, images: Vectors, rows: NDArray[np.int64], compare: Cosines) -> Floats:
        """Return the best cosines with some training images, and 0 with all others, (N, T)."""
        found = np.zeros((len(images.wholes), len(self.train)), np.float32)
        count = max(1, COMPARED // len(images.wholes))
        for start in range(0, len(rows), count):
            chosen = rows[start : start + count]
            found[:, chosen] = compare(images, chosen)
        return found

    def _whole_cosines(self, images: Vectors, rows: NDArray[np.int64]) -> Floats:
        return whole_cosines(images, self.wholes[rows], self.windows[rows])

    def _part_cosines(self, images: Vectors, rows: NDArray[np.int64]) -> Floats:
        return part_cosines(images, self.patches[rows], patch_neighbours())

    def _rough_whole_cosines(self, images: Vectors, rows: NDArray[np.int64]) -> Floats:
        stored = (one.directions(rows, ROUGH_WINDOW_DIMENSIONS) for one in (self.wholes, self.windows))
        return whole_cosines(images, *map(unit_vectors, stored))

    def _rough_part_cosines(self, images: Vectors, rows: NDArray[np.int64]) -> Floats:
        patches = unit_vectors(self.patches.directions(rows, ROUGH_PATCH_DIMENSIONS))
        return part_cosines(images, patches, rough_neighbours())

    def _placed(self, block: Described, pair: Pair) -> tuple[int, int, int]:
        """Return orientation, direction (1: the image shows more than the original) and window."""
        row, index = pair
        mine, theirs = block.vectors, self.windows[index]
        found = [mine.wholes[row] @ theirs.T]
        if not self.crops_only:
            found.append(self.wholes[index] @ mine.windows[row].T)
        cosines = np.abs(np.stack(found, axis=1))
        turn, direction, box = np.unravel_index(int(cosines.argmax()), cosines.shape)
        return int(turn), int(direction), int(box)

    def _registered(
        self, block: Described, pairs: Sequence[Pair], whole: Floats
    ) -> list[tuple[Pair, dict[str, Match]]]:
        """Return how well the details of each pair agree after registration, also together with the whole images.

        Args:
            block: the images.
            pairs: of them and training images.
            whole: (N, T) cosines of the whole images.
        """
        placed = [self._placed(block, pair) for pair in pairs]
        starts = [self._starts(block, pair, place) for pair, place in zip(pairs, placed, strict=True)]
        fixed, moving, transforms = map(np.stack, zip(*chain.from_iterable(starts), strict=True))
        counts = [len(one) for one in starts]
        image = np.repeat([row for row, _ in pairs], counts)
        reached = np.split(registered_similarities(fixed, moving, transforms, image), np.cumsum(counts))
        found = []
        for pair, place, tried in zip(pairs, placed, reached[:-1], strict=True):
            fine, coarse = (Match(float(one), pair[1], _in_words(*place)) for one in tried.max(axis=0))
            found.append((pair, {FINE: fine, COARSE: coarse, WHOLE_COARSE: _with_whole(coarse, whole[pair])}))
        return found

    def _starts(self, block: Described, pair: Pair, place: tuple[int, int, int]) -> list[tuple[Floats, Floats, Affine]]:
        """Return the arguments of `registered_similarities` for each place from which registration starts.

        It starts where the descriptors agree, and where the contents of both images coincide, as
        padding need not be of the same width on all sides.
        """
        (row, index), (turn, direction, box) = pair, place
        mine, original = oriented(block.plain[row], turn), halved(self._shown([index])[0].astype(np.float32))
        start = box_transform(boxes()[0], boxes()[box])
        found = [(original, mine, start) if direction else (mine, original, start)]
        content, other = oriented_box(block.contents[row], turn), self.contents[index]
        if np.abs(np.subtract(content, other)).max() > LEAST_PADDING:
            found.append((original, mine, box_transform(other, content)))
        return found

    def _displaced(self, block: Described, pairs: Sequence[Pair]) -> dict[Pair, Match]:
        """Return how well a part of each pair agrees, at the displacement that phase correlation finds."""
        mine, theirs = np.array([(one, other) for one, near in patch_neighbours().items() for other in near]).T
        turns = []
        for row, index in pairs:
            cosines = (block.vectors.patches[row][:, mine] * self.patches[index][theirs]).sum(axis=2)
            turns.append(int(np.abs(cosines).max(axis=1).argmax()))
        turned = np.stack([oriented(block.textures[row], turn) for (row, _), turn in zip(pairs, turns, strict=True)])
        originals = textures_of(self.train[[index for _, index in pairs]])
        overlaps = largest_overlaps(torch.from_numpy(turned), torch.from_numpy(originals)).tolist()
        words = [", ".join(filter(None, ["in part", TURNS[turn]])) for turn in turns]
        return {pair: Match(overlap, pair[1], word) for pair, overlap, word in zip(pairs, overlaps, words, strict=True)}


def copy_thresholds(similarity: Mapping[str, NDArray[np.float64]], train: int, margin: float = 0.0) -> dict[str, float]:
    """Return the similarities above which an image is a copy, by measure; see `copy_threshold`.

    Args:
        similarity: by measure, (N,) of each held-out real image to its most similar training image.
        train: number of training images.
        margin: see `copy_threshold`.
    """
    return {name: copy_threshold(similarity[name], train, LEAST[name], margin) for name in SIMILARITIES}


def _with_whole(coarse: Match, whole: float) -> Match:
    """Return a pair's coarse agreement, averaged with that of the whole images."""
    shares = (COARSE_SHARE, coarse.similarity), (1 - COARSE_SHARE, float(whole))
    z = sum(share * np.arctanh(min(similarity, 0.999999)) for share, similarity in shares)
    return replace(coarse, similarity=float(np.tanh(z)))


def in_blocks(images: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Return a few images at a time."""
    return [images[start : start + BLOCK] for start in range(0, len(images), BLOCK)]


def pairs_of(near: Sequence[Sequence[int]]) -> list[Pair]:
    """Return the pairs of images and the training images listed for each."""
    return [(row, index) for row, indices in enumerate(near) for index in indices]


def best_first(similarities: Floats, count: int) -> list[int]:
    """Return the training images to verify."""
    return [int(index) for index in np.argsort(-similarities, kind="stable")[:count]]


def _in_words(turn: int, direction: int, box: int) -> str:
    if box == 0:
        scale = ""
    else:
        side = boxes()[box][2] - boxes()[box][0]
        scale = f"shown at about {side:.0%} of its size" if direction else f"cropped to about {side:.0%}"
    return ", ".join(filter(None, [TURNS[turn], scale])) or "same place and size"
