"""Near-duplicates by content: images that show the same picture despite calipers, changed contrast, or a crop.

The method is a normalised cross-correlation of band-passed, locally contrast-normalised thumbnails:

1. *Texture.* A 128 x 128 thumbnail less its blur (difference of Gaussians), divided by its local standard deviation: gain, gamma,
   and time-gain curves fall out, anatomy and speckle envelope remain (local contrast normalisation: Pinto et al., PLoS Comput
   Biol 4(1) e27, 2008). The absolute correlation is taken, so an inverted picture matches as well.
2. *Candidates.* The whole of one image against 31 windows of the other, 32 x 32 each, all pairs, in blocks.
3. *Alignment.* For each candidate the window's edges climb to the largest correlation (normalised template matching with free translation
   and scale in both directions: Lewis, Fast Normalized Cross-Correlation, 1995). The pair is joined where it reaches the threshold.

Identical pixels are joined first; so is every pair whose plain 64 x 64 thumbnails correlate above 0.98 (the measure of the published counts of BUSI's
duplicates: Pawlowska et al., Data in Brief 48, 109247, 2023).

Measured on 585 images of BUSI: unrelated pairs align to at most 0.50; 98 of its images and their copies with calipers, another gamma or gain, inverted,
cropped by up to 15 % a side, or all of these at once, to at least 0.7; at 0.55 there are 111 groups of 247 images, none false by eye.
Other frames of the same sweep, which show the same lesion a little differently, mostly stay below.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.cluster.hierarchy import DisjointSet
from scipy.ndimage import gaussian_filter
from threadpoolctl import threadpool_limits

from data_prep.parallel import parallel_results
from pipeline.progress import progress

METHOD = "aligned correlation of locally normalised textures"
SIDE, WINDOW_SIDE, ALIGNED_SIDE, PLAIN_SIDE = 128, 32, 64, 64
FINE, COARSE = 1.0, 8.0  # pass band: the two Gaussians' sigmas in thumbnail pixels
NOISE = 2.0  # grey levels of 255: below this local contrast there is no texture to compare
CANDIDATE_CORRELATION = 0.45
PLAIN_CORRELATION = 0.98
STEPS = (6.0, 3.0, 1.5)  # of the alignment, in thumbnail pixels
ROUNDS = 4
BLOCK = 256
PAIRS = 64  # aligned at a time
# A chain of chance matches must not swallow a dataset: beyond this size only certain duplicates are added to a cluster.
LARGEST_CLUSTER, LARGEST_SHARE = 50, 0.05

RECORD = np.dtype(
    [("plain", "f4", (PLAIN_SIDE**2,)), ("whole", "f4", (WINDOW_SIDE**2,)), ("texture", "f4", (SIDE, SIDE))]
)
"""What is kept of an image, in a file of one record an image."""

HIT = np.dtype([("whole", "i4"), ("windowed", "i4"), ("window", "u1")])
"""An image whose whole resembles a window of another one."""

CANDIDATE = np.dtype([("a", "i4"), ("b", "i4"), ("box_in_a", "u1"), ("box_in_b", "u1")])
"""Two look-alikes, and the numbers of the windows where the alignment starts."""

Box = tuple[float, float, float, float]  # top, left, bottom, right, as shares of the side


def signature(image: NDArray[np.float32]) -> bytes:
    """Return the record of one image.

    Args:
        image: (H, W), 0..1.
    """
    thumbnail = np.asarray(Image.fromarray(image * np.float32(255)).resize((SIDE, SIDE), Image.Resampling.BOX))
    record = np.zeros((), dtype=RECORD)
    factor = SIDE // PLAIN_SIDE
    record["plain"] = _unit(thumbnail.reshape(PLAIN_SIDE, factor, PLAIN_SIDE, factor).mean(axis=(1, 3)))
    record["texture"] = texture(thumbnail)
    record["whole"] = _window(record["texture"], (0, 0, SIDE, SIDE), WINDOW_SIDE)
    return record.tobytes()


def texture(thumbnail: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the band-passed, locally contrast-normalised thumbnail, (128, 128), about -1..1."""
    band = gaussian_filter(thumbnail, FINE, truncate=3) - gaussian_filter(thumbnail, COARSE, truncate=3)
    contrast = np.sqrt(gaussian_filter(band * band, COARSE, truncate=3))
    return np.asarray(band / (contrast + NOISE), dtype=np.float32)


def near_duplicate_clusters(
    signatures: Path, digests: Sequence[str], correlation: float, workers: int = 1
) -> list[int]:
    """Return the cluster of each image, named by the index of its first member.

    Time grows with the square of the number of images. Memory holds the signatures of two blocks, and a few bytes a look-alike.

    Args:
        signatures: file of `signature` records, one an image.
        digests: digest of each image's pixels.
        correlation: aligned correlation from which two images are joined.
        workers: number of processes.
    """
    sets = DisjointSet(range(len(digests)))
    first: dict[str, int] = {}
    for index, digest in enumerate(digests):
        sets.merge(first.setdefault(digest, index), index)
    certain, candidates = _candidates(signatures, len(digests), min(CANDIDATE_CORRELATION, correlation), workers)
    for a, b in certain.tolist():
        sets.merge(a, b)
    parts = [candidates[start : start + PAIRS] for start in range(0, len(candidates), PAIRS)]
    links: list[tuple[float, int, int]] = []
    with progress("aligning look-alikes", len(candidates), "pairs") as advance:
        for part, values in zip(
            parts, parallel_results(partial(_aligned, signatures), parts, workers, True), strict=True
        ):
            links += [
                (-value, int(pair["a"]), int(pair["b"]))
                for pair, value in zip(part, values, strict=True)
                if value >= correlation
            ]
            advance(len(part))
    _merge_links(sets, sorted(links), len(digests))
    return [min(sets.subset(index)) for index in range(len(digests))]


def windows() -> list[Box]:
    """Return the whole image, and windows that a crop may have left: 0.9, 0.8 and 0.7 of both sides, 0.9 and 0.8 of one."""
    starts = (0.0, 0.5, 1.0)
    shapes = [(s, s) for s in (0.9, 0.8, 0.7)] + [(s, 1.0) for s in (0.9, 0.8)] + [(1.0, s) for s in (0.9, 0.8)]
    boxes: list[Box] = [(0.0, 0.0, 1.0, 1.0)]
    for height, width in shapes:
        for y in starts if height < 1 else (0.0,):
            for x in starts if width < 1 else (0.0,):
                top, left = y * (1 - height), x * (1 - width)
                boxes.append((top, left, top + height, left + width))
    return boxes


def aligned_correlation(a: NDArray[np.float32], b: NDArray[np.float32], box_in_a: Box, box_in_b: Box) -> float:
    """Return the largest absolute correlation of all of `b` with a window of `a`, or of all of `a` with a window of `b`.

    Args:
        a: texture of one image.
        b: texture of the other.
        box_in_a: where the climb starts in `a`.
        box_in_b: where it starts in `b`.
    """
    return max(_climbed(b, a, box_in_a), _climbed(a, b, box_in_b))


def _climbed(whole: NDArray[np.float32], other: NDArray[np.float32], start: Box) -> float:
    """Return the correlation of `whole` with the best window of `other` that is reached by moving the edges of `start`."""
    target = _window(whole, (0, 0, SIDE, SIDE), ALIGNED_SIDE)
    box = np.array(start) * SIDE
    best = abs(float(target @ _window(other, box, ALIGNED_SIDE)))
    for step in STEPS:
        for _ in range(ROUNDS):
            before = best
            for moved in _moves(step):
                trial = box + moved
                if trial.min() < 0 or trial.max() > SIDE or min(trial[2:] - trial[:2]) < SIDE / 2:
                    continue
                value = abs(float(target @ _window(other, trial, ALIGNED_SIDE)))
                if value > best:
                    best, box = value, trial
            if best == before:
                break
    return best


def _moves(step: float) -> Iterator[NDArray[np.float64]]:
    """Yield each edge moved by the step either way, then both edges of an axis together."""
    for edges in ((0,), (1,), (2,), (3,), (0, 2), (1, 3)):
        for signed in (-step, step):
            move = np.zeros(4)
            move[list(edges)] = signed
            yield move


def _aligned(signatures: Path, pairs: NDArray[Any]) -> list[float]:
    """Return the aligned correlation of each candidate pair."""
    boxes = windows()
    values = []
    for pair in pairs:
        a, b = (_records(signatures, slice(index, index + 1))["texture"][0] for index in (pair["a"], pair["b"]))
        values.append(aligned_correlation(a, b, boxes[pair["box_in_a"]], boxes[pair["box_in_b"]]))
    return values


def _candidates(signatures: Path, count: int, least: float, workers: int) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Compare all pairs in blocks.

    Returns:
        the pairs whose plain thumbnails are certain duplicates, (N, 2), and the other look-alikes as `CANDIDATE` records, each with the number
        of the best window in its first and in its second image.
    """
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    found_certain, found_hits = [np.zeros((0, 2), np.int32)], [np.zeros(0, HIT)]
    with progress("comparing images", count, "images") as advance:
        compare = partial(_compared, signatures, blocks, least)
        for columns, (certain, hits) in zip(blocks, parallel_results(compare, blocks, workers, True), strict=True):
            found_certain.append(certain)
            found_hits.append(hits)
            advance(columns.stop - columns.start)
    certain = np.concatenate(found_certain)
    return certain, _paired(np.concatenate(found_hits), certain)


def _paired(hits: NDArray[Any], certain: NDArray[np.int32]) -> NDArray[Any]:
    """Return the hits of both directions as pairs, each once, in order, less the certain ones."""
    a, b = np.minimum(hits["whole"], hits["windowed"]), np.maximum(hits["whole"], hits["windowed"])
    keys, place = np.unique(a.astype(np.int64) << 32 | b, return_inverse=True)
    pairs = np.zeros(len(keys), CANDIDATE)  # box 0 is the whole image
    pairs["a"], pairs["b"] = keys >> 32, keys & 0xFFFFFFFF
    in_a = hits["windowed"] == a
    pairs["box_in_a"][place[in_a]] = hits["window"][in_a]
    pairs["box_in_b"][place[~in_a]] = hits["window"][~in_a]
    known = certain[:, 0].astype(np.int64) << 32 | certain[:, 1]
    return pairs[~np.isin(keys, known)]


def _compared(
    signatures: Path, blocks: Sequence[slice], least: float, columns: slice
) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """Compare every image with the windows of one block: the certain pairs (N, 2), and the look-alikes as `HIT` records."""
    part = _records(signatures, columns)
    bank = [np.stack([_window(one, np.array(box) * SIDE, WINDOW_SIDE) for one in part["texture"]]) for box in windows()]
    certain, hits = [np.zeros((0, 2), np.int32)], [np.zeros(0, HIT)]
    # One BLAS thread: products of this size gain little from more, and lose much where the cores are shared.
    with threadpool_limits(1):
        for rows in blocks:
            others = _records(signatures, rows, ("plain", "whole"))
            if rows.start <= columns.start:
                pairs = _hits(others["plain"] @ part["plain"].T > PLAIN_CORRELATION, rows, columns)
                certain.append(pairs[pairs[:, 0] < pairs[:, 1]])
            score, window = _best_window(others["whole"], bank)
            found = _hits(score >= least, rows, columns)
            block = np.zeros(len(found), HIT)
            block["whole"], block["windowed"] = found.T
            block["window"] = window[found[:, 0] - rows.start, found[:, 1] - columns.start]
            hits.append(block)
    return np.concatenate(certain), np.concatenate(hits)


def _records(
    signatures: Path, rows: slice, fields: Sequence[str] = RECORD.names or ()
) -> dict[str, NDArray[np.float32]]:
    """Return copies of some fields of some records; the file is mapped no longer than that, for mapped pages count as memory."""
    records = np.memmap(
        signatures,
        dtype=RECORD,
        mode="r",
        offset=int(rows.start) * RECORD.itemsize,
        shape=(int(rows.stop - rows.start),),
    )
    return {field: records[field].copy() for field in fields}


def _best_window(
    wholes: NDArray[np.float32], bank: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Return for each pair (whole image, windowed image) the largest absolute correlation and the number of its window."""
    score = np.zeros((len(wholes), len(bank[0])), dtype=np.float32)
    window = np.zeros(score.shape, dtype=np.intp)
    for number, vectors in enumerate(bank):
        correlation = np.abs(wholes @ vectors.T)
        better = correlation > score
        score[better], window[better] = correlation[better], number
    return score, window


def _hits(hits: NDArray[np.bool_], rows: slice, columns: slice) -> NDArray[np.int32]:
    """Return the (row, column) indices of the hits, (N, 2), counted over the whole dataset, less each image with itself."""
    found = (np.argwhere(hits) + np.array([rows.start, columns.start])).astype(np.int32)
    return found[found[:, 0] != found[:, 1]]


def _merge_links(sets: DisjointSet, links: Sequence[tuple[float, int, int]], count: int) -> None:
    """Join the pairs, strongest first, as long as the cluster stays of a believable size."""
    largest = max(LARGEST_CLUSTER, int(LARGEST_SHARE * count))
    for _, a, b in links:
        if sets.subset_size(a) + sets.subset_size(b) <= largest:
            sets.merge(a, b)


def _window(image: NDArray[np.float32], box: Sequence[float] | NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """Return a window (top, left, bottom, right in pixels) resized to a square, as a vector of mean 0 and length 1."""
    top, left, bottom, right = box
    return _unit(
        np.asarray(
            Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        )
    )


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a vector of mean 0 and length 1; zeros for a flat image, which then resembles nothing."""
    centred = values.ravel() - values.mean()
    length = np.linalg.norm(centred)
    return (centred / length if length > 1e-3 else np.zeros_like(centred)).astype(np.float32)
