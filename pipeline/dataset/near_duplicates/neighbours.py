"""Nearest-neighbour index on texture windows, to find candidate pairs of near-duplicates.

Every window of every image is described by a short vector: its detail (`layout.py`), reduced to
principal components. The neighbours of an image are the images with a window closest to the whole
image. Up to `EXACT` images, the search is exhaustive; beyond, it visits the nearest cells of a
k-means partition (inverted file: Jegou, Douze and Schmid, Product Quantization for Nearest Neighbor
Search, PAMI 2011). The vectors are in a file; memory holds one cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from maskloom.pipeline.dataset.near_duplicates.layout import principal_components
from maskloom.pipeline.dataset.near_duplicates.textures import Floats, read_texture, window_vectors, windows
from maskloom.pipeline.parallel import parallel_results
from maskloom.pipeline.progress import progress

WINDOW_SIDE = 32
DIMENSIONS = 256
NEIGHBOURS = 6
LEAST = 0.3  # smallest correlation of vectors of neighbours
EXACT = 16384  # images; an exhaustive search among 10000 takes half a minute on one core
CELLS_PER_ROOT = 4  # number of cells per square root of the number of images
PROBED = 80  # nearest cells visited per query; time grows with the power 1.5 of the number of images
TRAINED_ON = 64  # training vectors per cell
BLOCK, QUERIES = 128, 1024

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class WindowIndex:
    """The vectors of a dataset's windows.

    Attributes:
        file: (images, windows, DIMENSIONS) float16, unit vectors; window 0 is the whole image.
        count: number of images.
        components: (DIMENSIONS, pixels), the principal components that the vectors refer to.
    """

    file: Path
    count: int
    components: Floats

    def vectors(self) -> NDArray[np.float16]:
        """Return the vectors as a memory map."""
        return np.memmap(self.file, np.float16, "r", shape=(self.count, len(windows()), DIMENSIONS))

    def scores(self, image: int, others: Sequence[int] | Indices) -> Floats:
        """Return the match of an image with each window of others, (others, windows), in 0..1."""
        vectors = self.vectors()
        return np.abs(vectors[others].astype(np.float32) @ vectors[image, 0].astype(np.float32))


class Cell(NamedTuple):
    """A cell of the index: windows, and the images to compare them with.

    Attributes:
        entries: sorted numbers of the windows (image * windows per image + window).
        queries: numbers of the images.
    """

    entries: Indices
    queries: Indices


def build_index(
    signatures: Path, count: int, common: int, file: Path, workers: int, sampled: int | None = None
) -> WindowIndex:
    """Compute the vectors of all windows and write them to a file.

    Args:
        signatures: file of records.
        count: number of images in it.
        common: number of leading (layout) components to leave out.
        file: output file of the vectors.
        workers: number of processes.
        sampled: number of leading images from which the components are computed; None: all.
    """
    components = principal_components(signatures, sampled or count, WINDOW_SIDE, common + DIMENSIONS)[common:]
    blocks = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    describe = partial(_described, signatures, components)
    with file.open("wb") as vectors, progress("indexing textures", count, "images") as advance:
        for block, part in zip(blocks, parallel_results(describe, blocks, workers, True), strict=True):
            vectors.write(part.tobytes())
            advance(len(block))
    return WindowIndex(file, count, components)


def neighbour_pairs(index: WindowIndex, workers: int) -> Indices:
    """Return sorted pairs (a, b), a < b, in which one image is a neighbour of the other, (N, 2)."""
    most = min(NEIGHBOURS, index.count - 1)
    ids, scores = np.full((index.count, most), -1, np.int64), np.zeros((index.count, most), np.float32)
    cells = _blocks(index) if index.count <= EXACT else _cells(index)
    with progress("searching neighbours", len(cells), "cells") as advance:
        for cell, (near, score) in zip(
            cells, parallel_results(partial(_nearest, index, most), cells, workers, True), strict=True
        ):
            rows = cell.queries
            ids[rows], scores[rows] = strongest(np.hstack([ids[rows], near]), np.hstack([scores[rows], score]), most)
            advance()
    queries, places = np.nonzero(scores >= LEAST)
    return np.unique(np.sort(np.stack([queries, ids[queries, places]], axis=1), axis=1), axis=0)


def _described(signatures: Path, components: Floats, images: range) -> NDArray[np.float16]:
    """Return the vectors of the windows of some images, (images, windows, DIMENSIONS)."""
    boxes = windows()
    with threadpool_limits(1):
        found = [window_vectors(read_texture(signatures, image), WINDOW_SIDE, boxes) @ components.T for image in images]
    return unit_vectors(np.stack(found)).astype(np.float16)


def unit_vectors(vectors: Floats) -> Floats:
    """Return vectors, (..., DIMENSIONS), of length 1; zeros for those of almost no length."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 1e-3, lengths, np.inf), dtype=np.float32)


def _blocks(index: WindowIndex) -> list[Cell]:
    """Return cells for an exhaustive search."""
    each = len(windows())
    everyone = np.arange(index.count)
    starts = range(0, index.count, BLOCK)
    return [Cell(np.arange(start * each, min(start + BLOCK, index.count) * each), everyone) for start in starts]


def _cells(index: WindowIndex) -> list[Cell]:
    """Return the cells of a k-means partition, each with its nearest images.

    Opposite vectors count as equal.
    """
    from sklearn.cluster import MiniBatchKMeans

    number = int(CELLS_PER_ROOT * np.sqrt(index.count))
    vectors = index.vectors()
    flat = vectors.reshape(-1, DIMENSIONS)
    chosen = np.sort(np.random.default_rng(0).choice(len(flat), min(len(flat), TRAINED_ON * number), replace=False))
    with threadpool_limits(1):
        means = MiniBatchKMeans(number, random_state=0, n_init=1, batch_size=4096, max_iter=20)
        centres = means.fit(flat[chosen].astype(np.float32)).cluster_centers_.astype(np.float32)
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-6)
        home, visits = [], []
        probed = min(PROBED, number)
        for start in range(0, index.count, BLOCK):
            near = np.abs(vectors[start : start + BLOCK].astype(np.float32) @ centres.T)
            home.append(near.argmax(axis=2).ravel())
            visits.append(np.argpartition(-near[:, 0], probed - 1, axis=1)[:, :probed])
    of_window, of_query = np.concatenate(home), np.concatenate(visits)
    entries = np.split(np.argsort(of_window, kind="stable"), np.cumsum(np.bincount(of_window, minlength=number))[:-1])
    order = np.argsort(of_query.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(of_query.ravel(), minlength=number))[:-1]
    queries = [part // probed for part in np.split(order, ends)]
    return [Cell(*cell) for cell in zip(entries, queries, strict=True) if len(cell[0]) and len(cell[1])]


def _nearest(index: WindowIndex, most: int, cell: Cell) -> tuple[Indices, Floats]:
    """Return the nearest images in a cell and their scores, (queries, at most `most`) each."""
    vectors, each = index.vectors(), len(windows())
    images, starts = np.unique(cell.entries // each, return_index=True)
    part = vectors.reshape(-1, DIMENSIONS)[cell.entries].astype(np.float32).T
    kept = min(most, len(images))
    ids, scores = [], []
    with threadpool_limits(1):
        for start in range(0, len(cell.queries), QUERIES):
            queries = cell.queries[start : start + QUERIES]
            found = np.abs(vectors[queries, 0].astype(np.float32) @ part)
            best = np.maximum.reduceat(found, starts, axis=1).round(4)  # further digits may differ between processes
            best[queries[:, None] == images] = -1
            places = np.argpartition(-best, kept - 1, axis=1)[:, :kept]
            ids.append(images[places])
            scores.append(np.take_along_axis(best, places, axis=1))
    return np.concatenate(ids), np.concatenate(scores)


def strongest(ids: Indices, scores: Floats, most: int) -> tuple[Indices, Floats]:
    """Return the `most` best distinct ids of each row and their scores, best first."""
    by_id = np.lexsort((-scores, ids), axis=1)
    ids, scores = np.take_along_axis(ids, by_id, axis=1), np.take_along_axis(scores, by_id, axis=1)
    scores[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1
    order = np.argsort(-scores, axis=1, kind="stable")[:, :most]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
