"""Near-duplicates by content: images that show the same picture despite calipers, changed contrast, or a crop.

1. *Texture* of each image (`data_prep.splitting.textures`). Correlations are taken absolute, so an inverted picture matches as well.
2. *Neighbours* of each image, by windows that a crop may have left (`data_prep.splitting.neighbours`).
3. *Alignment* of each pair of neighbours (`data_prep.splitting.alignment`): the correlation of the textures, and that of their details, the part
   that is not the dataset's common layout (`data_prep.splitting.layout`).
4. *Threshold*, from what unrelated pairs of this dataset score (`data_prep.splitting.chance`). A pair is joined where the textures correlate from
   `CORRELATION` on (or the plain 64 x 64 thumbnails above 0.98, the measure of the published counts of BUSI's duplicates: Pawlowska et al.,
   Data in Brief 48, 109247, 2023) and the details correlate from that threshold on.

Mirrored and rotated copies are not found. Identical pixels are always joined.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import DisjointSet

from maskloom.data_prep.splitting.alignment import ALIGNED_SIDE, align_pairs
from maskloom.data_prep.splitting.chance import FEWEST, chance_threshold, draw_size, drawn_pairs
from maskloom.data_prep.splitting.layout import COMPONENTS, Layout, layout_size, principal_components
from maskloom.data_prep.splitting.neighbours import WindowIndex, build_index, neighbour_pairs
from maskloom.data_prep.splitting.textures import RECORD, read_records, signature
from maskloom.pipeline.errors import MaskLoomError

__all__ = ["METHOD", "RECORD", "NearDuplicates", "find_near_duplicates", "near_duplicate_clusters", "signature"]

METHOD = "aligned correlation of locally normalised textures"
CORRELATION = 0.55
DETAIL, LARGEST_DETAIL = 0.45, 0.95  # the least threshold, and the largest that still tells copies from chance
# The least where images are too few for all of the layout's components, and where they are too few to measure chance.
DETAIL_OF_SOME, DETAIL_OF_FEW = 0.65, 0.9
HEADROOM = 0.15
PLAIN_CORRELATION = 0.98
# A cluster of so many images, and of such a share of all, most of which are not plainly the same picture, was joined by chance or is a sequence.
LARGE_CLUSTER, LARGE_SHARE, CHECKED_PAIRS = 10, 0.2, 32
SAME_CORRELATION = 0.95
REMEDY = "set data.duplicates=identical, or give the patient or lesion of each image as its group"


Scorer = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Threshold:
    """What joins two images.

    Attributes:
        correlation: of the aligned textures, from which they are joined.
        detail: of their details, from which they are joined; None: details do not matter.
    """

    correlation: float
    detail: float | None

    def stated(self) -> dict[str, float]:
        """Return the values as a contract states them."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class NearDuplicates:
    """The pairs that may be joined, and what joins them.

    Attributes:
        threshold: of this dataset.
        identical: index of the first image with the same pixels, for each image.
        pairs: (N, 2), the neighbours.
        scores: (N, 3), of each pair the correlations of textures, details, and plain thumbnails.
    """

    threshold: Threshold
    identical: list[int]
    pairs: NDArray[np.int64]
    scores: NDArray[np.float64]

    def joined(self, margin: float = 0.0) -> NDArray[np.int64]:
        """Return the pairs that are near-duplicates, (N, 2), by a threshold that is stricter by a margin."""
        return self.pairs[_reaches(self.scores, self.threshold, margin)]

    def clusters(self, margin: float = 0.0) -> list[int]:
        """Return the cluster of each image, named by the index of its first member."""
        sets = DisjointSet(range(len(self.identical)))
        for a, b in [*enumerate(self.identical), *self.joined(margin).tolist()]:
            sets.merge(a, b)
        first: dict[int, int] = {}
        return [first.setdefault(sets[index], index) for index in range(len(self.identical))]


def near_duplicate_clusters(
    signatures: Path, digests: Sequence[str], correlation: float | None = None, workers: int = 1
) -> list[int]:
    """Return the cluster of each image, named by the index of its first member; see `find_near_duplicates`."""
    return find_near_duplicates(signatures, digests, correlation, workers).clusters()


def find_near_duplicates(
    signatures: Path, digests: Sequence[str], correlation: float | None = None, workers: int = 1
) -> NearDuplicates:
    """Find the near-duplicates among the images of a dataset.

    Memory holds a few windows' vectors and a few numbers per image; a file of 20 kB per image lies beside the signatures meanwhile.

    Args:
        signatures: file of `signature` records, one per image.
        digests: digest of each image's pixels.
        correlation: aligned correlation from which two images are joined, whatever unrelated ones score; None: calibrated on the dataset.
        workers: number of processes; the result does not depend on it.

    Raises:
        MaskLoomError: unrelated images are too alike to tell copies from chance, or a large cluster is a chain of chance matches.
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
    """Return the threshold for a dataset, by what its unrelated pairs score.

    Args:
        index: of its windows.
        distinct: images of which no two have the same pixels.
        scored: returns the scores of pairs.

    Raises:
        MaskLoomError: they score as much as copies.
    """
    if len(distinct) < FEWEST:
        return Threshold(CORRELATION, DETAIL_OF_FEW)
    details = scored(drawn_pairs(index, distinct))[:, 1]
    detail = chance_threshold(details, draw_size(len(distinct)), len(distinct))
    if detail > LARGEST_DETAIL:
        raise MaskLoomError(
            f"data.duplicates=near: unrelated images of this dataset are too alike to tell copies from chance (some of the {len(distinct)} "
            f"would correlate up to {detail:.3f} in what is not common to all; at most {LARGEST_DETAIL} can be told apart); {REMEDY}"
        )
    least = DETAIL
    if layout_size(index.count) < COMPONENTS:  # the layout is not known whole, and chance less well
        least, detail = DETAIL_OF_SOME, detail + HEADROOM * (1 - detail)
    return Threshold(CORRELATION, max(least, round(detail, 3)))  # rounded: equal on all machines


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
    """Check that the images of each large cluster are plainly copies of one another, not joined one by one through weak matches.

    Raises:
        MaskLoomError: most pairs of such a cluster are not.
    """
    clusters = np.array(found.clusters())
    distinct = np.unique(found.identical)  # of identical images one is enough
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
