"""Search for copies of reference images among query images, such as test images among synthetic ones.

Index and alignment are those of `search.py`. Every query is compared with every reference by windows,
in both directions, which finds crops of either; mirrored and turned by quarter turns, it is compared
as a whole. The closest candidates are aligned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from maskloom.pipeline.dataset.near_duplicates.alignment import ALIGNED_SIDE, WHOLE, agreement, align_pair
from maskloom.pipeline.dataset.near_duplicates.layout import (
    COMPONENTS,
    IMAGES_PER_COMPONENT,
    Layout,
    layout_size,
    principal_components,
)
from maskloom.pipeline.dataset.near_duplicates.neighbours import (
    BLOCK,
    LEAST,
    WINDOW_SIDE,
    Indices,
    WindowIndex,
    build_index,
    strongest,
    unit_vectors,
)
from maskloom.pipeline.dataset.near_duplicates.textures import SIDE, Floats, read_texture, window_vector
from maskloom.pipeline.parallel import parallel_results
from maskloom.pipeline.progress import progress

TURNS = 8  # unchanged, three quarter turns, and the same of the mirrored image
CANDIDATES = 2  # references per query
FEWEST_ALIGNED, ALIGNED_SHARE = 600, 0.75  # of the candidates: at least so many, and so many per query
PAIRS = 32  # aligned at a time
# Smallest likeness of a copy. Measured: noise, blur, gamma, inversion, crops to 20 %, padding and mild
# deformation keep 0.7 to 1; unrelated images of BUSI and the phantoms reach 0.41.
COPY, COPY_AMONG_FEW = 0.7, 0.85  # few: too few images to compute the layout


@dataclass(frozen=True)
class Match:
    """A query and one of the references that resemble it most.

    Attributes:
        query, reference: numbers of the images in the signature file.
        turn: how the query was mirrored and turned (`turned_image`); 0: not at all.
        likeness: the smaller of the correlations of textures and details after alignment, -1..1.
    """

    query: int
    reference: int
    turn: int
    likeness: float


@dataclass(frozen=True)
class CopySearch:
    """The indexed textures of all images between which copies are searched.

    Attributes:
        signatures: file of `textures.signature` records, one per image.
        index: index of their windows.
        layout: the layout of the images from which the search was learnt.
        workers: number of processes; the result does not depend on it.
    """

    signatures: Path
    index: WindowIndex
    layout: Layout
    workers: int

    @classmethod
    def build(cls, signatures: Path, count: int, learnt_from: int, vectors: Path, workers: int) -> "CopySearch":
        """Index the images.

        Args:
            signatures: file of records.
            count: number of images in it.
            learnt_from: number of leading images from which the layout is computed. Leave synthetic
                images out: a thousand copies of one test image would become the layout.
            vectors: file to write the vectors to.
            workers: number of processes.
        """
        common = layout_size(learnt_from)
        index = build_index(signatures, count, common, vectors, workers, learnt_from)
        layout = Layout(principal_components(signatures, learnt_from, ALIGNED_SIDE, common))
        return cls(signatures, index, layout, workers)

    def matches(self, queries: Indices, references: Indices) -> list[Match]:
        """Return the aligned candidates of all queries, the best first.

        The number of alignments grows with the number of queries.
        """
        if not len(queries) or not len(references):
            return []
        candidates = self._candidates(queries, references)
        aligned = max(FEWEST_ALIGNED, int(ALIGNED_SHARE * len(queries)))
        candidates = candidates[np.argsort(-candidates["score"], kind="stable")][:aligned]
        parts = [candidates[start : start + PAIRS] for start in range(0, len(candidates), PAIRS)]
        found: list[Match] = []
        with progress("searching copies", len(candidates), "pairs") as advance:
            align = partial(_aligned, self.signatures, self.index, self.layout)
            for part in parallel_results(align, parts, self.workers, True):
                found += part
                advance(len(part))
        return sorted(found, key=lambda match: -match.likeness)

    def _candidates(self, queries: Indices, references: Indices) -> NDArray[np.void]:
        """Return the closest references of each query as records of `CANDIDATE`."""
        blocks = [queries[start : start + BLOCK] for start in range(0, len(queries), BLOCK)]
        closest = partial(_closest, self.signatures, self.index, references)
        return np.concatenate(list(parallel_results(closest, blocks, self.workers, True)))


CANDIDATE = np.dtype([("query", "i8"), ("reference", "i8"), ("turn", "i8"), ("score", "f4")])


def turned_image(image: Floats, turn: int) -> Floats:
    """Return an image, (H, W), mirrored if `turn` >= 4, then turned by `turn % 4` quarter turns."""
    return np.ascontiguousarray(np.rot90(image[:, ::-1] if turn >= TURNS // 2 else image, turn % 4))


def copy_threshold(unrelated: Sequence[Match], images: int) -> float:
    """Return the likeness from which a query counts as a copy of a reference.

    Half-way between the closest unrelated pair and identical images: neighbouring slices of one
    brain are alike without being copies.

    Args:
        unrelated: matches of images that are no copies of each other.
        images: number of images from which the search was learnt.
    """
    least = COPY if images >= IMAGES_PER_COMPONENT * COMPONENTS else COPY_AMONG_FEW
    return max([least, *((1 + match.likeness) / 2 for match in unrelated)])


def _closest(signatures: Path, index: WindowIndex, references: Indices, queries: Indices) -> NDArray[np.void]:
    """Return the closest references of some queries as records of `CANDIDATE`."""
    vectors = index.vectors()
    kept = min(CANDIDATES, len(references))
    ids, scores = np.full((len(queries), kept), -1, np.int64), np.zeros((len(queries), kept), np.float32)
    with threadpool_limits(1):
        windows = vectors[queries].astype(np.float32)
        turned = _turned_vectors(signatures, index, queries)
        for start in range(0, len(references), BLOCK):
            block = references[start : start + BLOCK]
            found = _scores(windows, turned, vectors[block].astype(np.float32))
            # A reference occurs once per query: turn and reference make up one id.
            near = found.argmax(axis=0) + TURNS * block
            ids, scores = strongest(np.hstack([ids, near]), np.hstack([scores, found.max(axis=0)]), kept)
    rows, places = np.nonzero(scores >= LEAST)
    near = ids[rows, places]
    return np.rec.fromarrays([queries[rows], near // TURNS, near % TURNS, scores[rows, places]], dtype=CANDIDATE)


def _scores(windows: Floats, turned: Floats, references: Floats) -> Floats:
    """Return the match of queries with references by turn, (TURNS, queries, references), in 0..1.

    Args:
        windows: (queries, windows, D), vectors of the queries' windows.
        turned: (queries, TURNS, D), vectors of the whole queries, turned.
        references: (references, windows, D), vectors of the references' windows.
    """
    each, length = windows.shape[1:]
    in_reference = np.abs(turned[:, 0] @ references.reshape(-1, length).T).reshape(len(windows), -1, each).max(axis=2)
    in_query = np.abs(references[:, 0] @ windows.reshape(-1, length).T).reshape(len(references), -1, each).max(axis=2)
    whole = np.abs(turned.transpose(1, 0, 2) @ references[:, 0].T)
    whole[0] = np.maximum(in_reference, in_query.T)
    return np.asarray(whole.round(4))  # further digits may differ between processes


def _turned_vectors(signatures: Path, index: WindowIndex, queries: Indices) -> Floats:
    """Return the vectors of whole images in every turn, (queries, TURNS, D)."""
    whole = np.array(WHOLE) * SIDE
    found = [
        [window_vector(turned_image(texture, turn), whole, WINDOW_SIDE) @ index.components.T for turn in range(TURNS)]
        for texture in (read_texture(signatures, int(query)) for query in queries)
    ]
    return unit_vectors(np.array(found, dtype=np.float32))


def _aligned(signatures: Path, index: WindowIndex, layout: Layout, candidates: NDArray[np.void]) -> list[Match]:
    """Return the likeness of each candidate after alignment."""
    matches = []
    with threadpool_limits(1):
        for query, reference, turn, _ in candidates.tolist():
            if turn:
                textures = turned_image(read_texture(signatures, query), turn), read_texture(signatures, reference)
                found = agreement(*textures, WHOLE, WHOLE, layout)
            else:
                found = align_pair(signatures, index, layout, (query, reference))
            matches.append(Match(query, reference, turn, min(found)))
    return matches
