"""Near-duplicate search by content: copies of an image with calipers, other contrast, or a crop.

1. *Texture* of each image (`textures.py`). The absolute correlation is used, so inverted
   images match too.
2. *Neighbours* of each image, using windows that would survive a crop (`neighbours.py`).
3. *Alignment* of each pair of neighbours (`alignment.py`): the correlation of the textures, and
   that of their details, the part that is not the dataset's common layout (`layout.py`).
4. *Threshold*, from the scores of unrelated pairs of this dataset (`chance.py`). A pair is joined
   if the correlation of the textures reaches `CORRELATION` (or that of the plain 64 x 64
   thumbnails exceeds 0.98, the criterion of the published duplicate counts of BUSI: Pawlowska et
   al., Data in Brief 48, 109247, 2023) and the correlation of the details reaches that threshold.

Mirrored and rotated copies are not found. Identical pixels are always joined.

scipy and scikit-learn are imported where they are used: `prepare` starts without them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.dataset.near_duplicates.alignment import ALIGNED_SIDE, align_pairs
from maskloom.pipeline.dataset.near_duplicates.chance import FEWEST, chance_threshold, draw_size, drawn_pairs
from maskloom.pipeline.dataset.near_duplicates.layout import COMPONENTS, Layout, layout_size, principal_components
from maskloom.pipeline.dataset.near_duplicates.neighbours import WindowIndex, build_index, neighbour_pairs
from maskloom.pipeline.dataset.near_duplicates.textures import RECORD, read_records, signature
from maskloom.pipeline.errors import MaskLoomError

__all__ = ["METHOD", "RECORD", "NearDuplicates", "find_near_duplicates", "near_duplicate_clusters", "signature"]

METHOD = "aligned correlation of locally normalised textures"
CORRELATION = 0.55
DETAIL, LARGEST_DETAIL = 0.45, 0.95  # limits of the threshold; a larger one cannot separate copies from chance
# Lower limits with too few images for all layout components, and with too few to estimate chance.
DETAIL_OF_SOME, DETAIL_OF_FEW = 0.65, 0.9
HEADROOM = 0.15
PLAIN_CORRELATION = 0.98
# A larger cluster, in which most checked pairs are not clearly the same image, is a chain of chance
# matches or a sequence.
LARGE_CLUSTER, LARGE_SHARE, CHECKED_PAIRS = 10, 0.2, 32
SAME_CORRELATION = 0.95
REMEDY = "set data.duplicates=identical, or give the patient or lesion of each image as its group"


Scorer = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Threshold:
    """The thresholds above which two images are joined.

    Attributes:
        correlation: smallest correlation of the aligned textures.
        detail: smallest correlation of the details; None: details are not compared.
    """

    correlation: float
    detail: float | None

    def stated(self) -> dict[str, float]:
        """Return the values for the contract."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class NearDuplicates:
    """Candidate pairs with their scores, and the threshold of the dataset.

    Attributes:
        threshold: the threshold of this dataset.
        identical: index of the first image with the same pixels, for each image.
        pairs: (N, 2), pairs of neighbours.
        scores: (N, 3), correlations of textures, details and plain thumbnails of each pair.
    """

    threshold: Threshold
    identical: list[int]
    pairs: NDArray[np.int64]
    scores: NDArray[np.float64]

    def joined(self, margin: float = 0.0) -> NDArray[np.int64]:
        """Return the near-duplicate pairs, (N, 2), at the threshold plus a margin."""
        return self.pairs[_reaches(self.scores, self.threshold, margin)]

    def clusters(self, margin: float = 0.0) -> list[int]:
        """Return the cluster of each image, named by the index of its first member."""
        from scipy.cluster.hierarchy import DisjointSet

        sets = DisjointSet(range(len(self.identical)))
        for a, b in [*enumerate(self.identical), *self.joined(margin).tolist()]:
            sets.merge(a, b)
        first: dict[int, int] = {}
        return [first.setdefault(sets[index], index) for index in range(len(self.identical))]


def near_duplicate_clusters(
    signatures: Path, digests: Sequence[str], correlation: float | None = None, workers: int = 1
) -> list[int]:
    """Return the cluster of each image, named by the index of its first member; see
    `find_near_duplicates`.
    """
    return find_near_duplicates(signatures, digests, correlation, workers).clusters()


def find_near_duplicates(
    signatures: Path, digests: Sequence[str], correlation: float | None = None, workers: int = 1
) -> NearDuplicates:
    """Find the near-duplicates among the images of a dataset.

    Memory holds the vectors of a few windows and a few numbers per image. A temporary file of 20 kB
    per image is written beside the signatures.

    Args:
        signatures: file of `signature` records, one per image.
        digests: digest of each image's pixels.
        correlation: fixed threshold of the aligned correlation; None: calibrated on the dataset.
        workers: number of processes; the result does not depend on it.

    Raises:
        MaskLoomError: unrelated images are too similar to separate copies from chance, or a large
            cluster is a chain of chance matches.
    """
    first: dict[str, int] = {}
    identical = [first.setdefault(digest, index) for index, digest in enumerate(digests)]
    distinct = len(first)
    if distinct < 2:
        threshold = Threshold(correlation or CORRELATION, None if correlation else DETAIL_OF_FEW)
        return NearDuplicates(threshold, identical, np.zeros((0, 2), np.int64), np.zeros((0, 3)))
    count = len(digests)
    common = 0 if correlation else layout_size(count)
    layout = Layout(principal_components(signatures, count, ALIGNED_SIDE, common))
    vectors = signatures.with_name(f"{signatures.stem}.windows")
    try:
        index = build_index(signatures, count, common, vectors, workers)

        def scored(pairs: NDArray[np.int64]) -> NDArray[np.float64]:
            found = align_pairs(signatures, index, layout, pairs, workers)
            plain = [_plain_correlation(signatures, int(a), int(b)) for a, b in pairs]
            return np.column_stack([np.array(found, np.float64).reshape(-1, 2), plain])

        threshold = Threshold(correlation, None) if correlation else _calibrated(index, np.unique(identical), scored)
        pairs = neighbour_pairs(index, workers)
        found = NearDuplicates(threshold, identical, pairs, scored(pairs))
        _require_believable(found, scored)
        return found
    finally:
        vectors.unlink(missing_ok=True)


def _calibrated(index: WindowIndex, distinct: NDArray[np.int64], scored: Scorer) -> Threshold:
    """Return the threshold for a dataset, calibrated on its unrelated pairs.

    Args:
        index: index of its windows.
        distinct: images with distinct pixels.
        scored: function that returns the scores of pairs.

    Raises:
        MaskLoomError: unrelated pairs score as high as copies.
    """
    if len(distinct) < FEWEST:
        return Threshold(CORRELATION, DETAIL_OF_FEW)
    details = scored(drawn_pairs(index, distinct))[:, 1]
    detail = chance_threshold(details, draw_size(len(distinct)), len(distinct))
    if detail > LARGEST_DETAIL:
        raise MaskLoomError(
            f"data.duplicates=near: unrelated images of this dataset are too similar to tell copies from chance (some of the {len(distinct)} "
            f"would correlate up to {detail:.3f} in what is not common to all; at most {LARGEST_DETAIL} can be told apart); {REMEDY}"
        )
    least = DETAIL
    if layout_size(index.count) < COMPONENTS:  # incomplete layout, less precise chance estimate
        least, detail = DETAIL_OF_SOME, detail + HEADROOM * (1 - detail)
    return Threshold(CORRELATION, max(least, round(detail, 3)))  # rounded to be equal on all machines


def _reaches(scores: NDArray[np.float64], threshold: Threshold, margin: float = 0.0) -> NDArray[np.bool_]:
    """Return which pairs are joined, (N,), by their scores, (N, 3)."""
    correlation, detail, plain = scores.T
    joined = (correlation >= min(1.0, threshold.correlation + margin)) | (plain > PLAIN_CORRELATION)
    if threshold.detail is None:
        return joined
    stricter = min(threshold.detail + margin, (threshold.detail + 1) / 2) if margin else threshold.detail
    return joined & (detail >= stricter)


def _plain_correlation(signatures: Path, a: int, b: int) -> float:
    first, second = (read_records(signatures, slice(one, one + 1), ("plain",))["plain"][0] for one in (a, b))
    return round(float(first @ second), 6)


def _require_believable(found: NearDuplicates, scored: Scorer) -> None:
    """Check that large clusters consist of copies, not of a chain of weak matches.

    Raises:
        MaskLoomError: most pairs of such a cluster are not clearly copies.
    """
    clusters = np.array(found.clusters())
    distinct = np.unique(found.identical)  # one of several identical images is enough
    names, sizes = np.unique(clusters[distinct], return_counts=True)
    for name, size in zip(names, sizes, strict=True):
        if size <= max(LARGE_CLUSTER, LARGE_SHARE * len(distinct)):
            continue
        members, random = distinct[clusters[distinct] == name], np.random.default_rng(0)
        scores = scored(np.array([random.choice(members, 2, replace=False) for _ in range(CHECKED_PAIRS)]))
        same = (scores[:, 0] >= SAME_CORRELATION) | (scores[:, 2] > PLAIN_CORRELATION)
        if (same & _reaches(scores, found.threshold)).mean() < 0.5:
            raise MaskLoomError(
                f"data.duplicates=near: {size} of {len(distinct)} images would form one cluster, though few of them are plainly the same "
                f"picture: chance matches, or frames of one sequence; {REMEDY}"
            )
