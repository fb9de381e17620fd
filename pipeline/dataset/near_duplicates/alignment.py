"""Similarity of two images after aligning one with a window of the other.

Hill climbing over the edges of the window maximises the correlation (normalised template matching
with free translation and scale: Lewis, Fast Normalized Cross-Correlation, 1995). At the maximum,
the details are compared (`layout.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from maskloom.pipeline.dataset.near_duplicates.layout import Layout
from maskloom.pipeline.dataset.near_duplicates.neighbours import WindowIndex
from maskloom.pipeline.dataset.near_duplicates.textures import (
    SIDE,
    Box,
    Floats,
    read_texture,
    resized_window,
    window_vector,
    windows,
)
from maskloom.pipeline.parallel import parallel_results
from maskloom.pipeline.progress import progress

ALIGNED_SIDE = 64
STEPS, FINE_STEPS = (6.0, 3.0, 1.5), (1.5, 0.75)  # thumbnail pixels
ROUNDS = 4
GAIN = 1e-6  # smaller gains may be rounding errors, which differ between processes
DECIMALS = 4
# Below HOPELESS, finer steps cannot reach the correlation of a copy; from CERTAIN on, the other
# direction is not tried.
HOPELESS, CERTAIN = 0.35, 0.9
# Only for undecided pairs, the details are aligned once more on their own.
OPEN_CORRELATION, OPEN_LIKENESS = 0.5, (0.25, 0.9)
TILE_STARTS = np.linspace(0, ALIGNED_SIDE, 7)[:-1].astype(int)
PAIRS = 64  # aligned at a time

Edges = NDArray[np.float64]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Agreement(NamedTuple):
    """Similarity of two images.

    Attributes:
        correlation: absolute correlation of the aligned textures, 0..1.
        detail: correlation of their details (without the dataset's layout), median over tiles,
            -1..1.
    """

    correlation: float
    detail: float


def align_pairs(
    signatures: Path, index: WindowIndex, layout: Layout, pairs: NDArray[np.int64], workers: int
) -> list[Agreement]:
    """Return the agreement of each pair, (N, 2), of images."""
    parts = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
    found: list[Agreement] = []
    with progress("aligning near-duplicates", len(pairs), "pairs") as advance:
        for part in parallel_results(partial(_aligned_part, signatures, index, layout), parts, workers, True):
            found += part
            advance(len(part))
    return found


def align_pair(signatures: Path, index: WindowIndex, layout: Layout, pair: Sequence[int]) -> Agreement:
    """Return the agreement of two images, in the better direction."""
    boxes = windows()
    # Start with the direction in which the vectors match better.
    scores = {tuple(ends): index.scores(ends[0], ends[1:])[0] for ends in (pair, pair[::-1])}
    a, b = max(scores, key=lambda ends: scores[ends].max())
    in_a, in_b = boxes[int(scores[b, a].argmax())], boxes[int(scores[a, b].argmax())]
    return agreement(read_texture(signatures, a), read_texture(signatures, b), in_a, in_b, layout)


def agreement(a: Floats, b: Floats, in_a: Box, in_b: Box, layout: Layout) -> Agreement:
    """Return the similarity of `a` with a window of `b`, or, if undecided, of `b` with one of `a`.

    Args:
        a: texture of one image.
        b: texture of the other.
        in_a: start window in `a`.
        in_b: start window in `b`.
        layout: the layout of the dataset, which does not count as detail.
    """
    whole, other = a, b
    correlation, box = _climbed(a, b, in_b)
    if HOPELESS <= correlation < CERTAIN:
        turned, box_in_a = _climbed(b, a, in_a)
        if turned > correlation:
            whole, other, correlation, box = b, a, turned, box_in_a
    target = window_vector(whole, np.array(WHOLE) * SIDE, ALIGNED_SIDE)
    detail = layout.detail(target)

    def details(edges: Edges) -> tuple[Floats, Floats]:
        """Return the details of target (with the sign of a positive correlation) and window."""
        vector = window_vector(other, edges, ALIGNED_SIDE)
        return np.sign(target @ vector) * detail, layout.detail(vector)

    def likeness(edges: Edges) -> float:
        mine, theirs = details(edges)
        return float(mine @ theirs)

    if correlation >= OPEN_CORRELATION and OPEN_LIKENESS[0] <= likeness(box) < OPEN_LIKENESS[1]:
        box = _climb(likeness, box, FINE_STEPS)[1]
    return Agreement(round(correlation, DECIMALS), round(median_tile_correlation(*details(box)), DECIMALS))


def median_tile_correlation(a: Floats, b: Floats) -> float:
    """Return the median correlation over the tiles of two images, weighted by contrast, -1..1.

    Copies agree in most tiles; shared text and calipers agree in few.

    Args:
        a: one image, (pixels,), of mean 0.
        b: the other image.
    """

    def tile_sums(values: Floats) -> Floats:
        square = values.reshape(ALIGNED_SIDE, ALIGNED_SIDE)
        return np.add.reduceat(np.add.reduceat(square, TILE_STARTS, axis=0), TILE_STARTS, axis=1).ravel()

    weights = np.sqrt(tile_sums(a * a) * tile_sums(b * b))
    if not weights.any():
        return 0.0
    correlations = tile_sums(a * b) / np.where(weights > 0, weights, np.inf)
    order = np.argsort(correlations, kind="stable")
    share = np.cumsum(np.sqrt(weights[order]))
    return float(correlations[order][np.searchsorted(share, share[-1] / 2)])


def _aligned_part(
    signatures: Path, index: WindowIndex, layout: Layout, pairs: Sequence[tuple[int, int]]
) -> list[Agreement]:
    """Return the agreement of each pair, in the better direction."""
    with threadpool_limits(1):
        return [align_pair(signatures, index, layout, pair) for pair in pairs]


def _climbed(whole: Floats, other: Floats, start: Box) -> tuple[float, Edges]:
    """Return the largest correlation of `whole` with a window of `other`, and the window.

    Hill climbing over the edges, from `start`.
    """
    target = window_vector(whole, np.array(WHOLE) * SIDE, ALIGNED_SIDE)
    image = Image.fromarray(other)

    def correlation(edges: Edges) -> float:
        vector = resized_window(image, edges, ALIGNED_SIDE)
        length = np.sqrt(max(0.0, float(vector @ vector) - float(vector.sum()) ** 2 / vector.size))
        return abs(float(target @ vector)) / length if length > 1e-3 else 0.0

    best, box = _climb(correlation, np.array(start) * SIDE, STEPS[:1])
    return _climb(correlation, box, STEPS[1:]) if best >= HOPELESS else (best, box)


def _climb(value_of: Callable[[Edges], float], box: Edges, steps: Sequence[float]) -> tuple[float, Edges]:
    """Maximise a function of a box by hill climbing with the given steps; return value and box."""
    best = value_of(box)
    for step in steps:
        for _ in range(ROUNDS):
            before = best
            for moved in _moves(step):
                trial = box + moved
                if trial.min() < 0 or trial.max() > SIDE or min(trial[2:] - trial[:2]) < SIDE / 2:
                    continue
                value = value_of(trial)
                if value > best + GAIN:
                    best, box = value, trial
            if best == before:
                break
    return best, box


def _moves(step: float) -> Iterator[Edges]:
    """Yield moves of each edge by the step in both directions, then of both edges of an axis."""
    for edges in ((0,), (1,), (2,), (3,), (0, 2), (1, 3)):
        for signed in (-step, step):
            move = np.zeros(4)
            move[list(edges)] = signed
            yield move
