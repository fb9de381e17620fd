"""Near-duplicates across splits, across datasets, and with contradicting labels.

The search is that of `near_duplicates`, on the prepared images without padding. These are smaller
than the raw images on which `prepare` formed groups, so a pair fails only if it still matches at
`MARGIN` above the threshold; other pairs are warnings. Measured on BUSI (576 rows, prepared at 128
x 128 and 64 x 64): the same 107 clusters as on the raw images, all within groups; at 32 x 32 one
more, below the margin.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.audit.index import PLAIN_SIDE, AuditIndex
from maskloom.pipeline.dataset.audit.findings import (
    MEMBER,
    Finding,
    Member,
    contradicts,
    measured_on_itself,
    near_correlation,
    place,
    relation,
)
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.near_duplicates.search import CORRELATION, find_near_duplicates
from maskloom.pipeline.parallel import worker_count

MARGIN = 0.1
IMAGES_PER_TASK = 200


def near_findings(index: AuditIndex, datasets: Sequence[MaskPromptDataset]) -> Iterator[Finding]:
    """Yield pairs of near-duplicates that lie in two splits or datasets, or carry two labels."""
    threshold = near_threshold(datasets)
    # Constant images match without being duplicates; they get unique digests.
    query = "SELECT id, image, flat FROM images ORDER BY id"
    digests = [f"flat {number}" if flat else image.hex() for number, image, flat in index.rows.execute(query)]
    workers = worker_count(len(digests) // IMAGES_PER_TASK, None)
    found = find_near_duplicates(index.signatures, digests, None if threshold == CORRELATION else threshold, workers)
    suspects = [members for members in _clusters(index, found.clusters()) if _suspicious(datasets, members)]
    if not suspects:
        return
    # If groups were not meant to keep near-duplicates together, none fails.
    clear_of = {} if near_correlation(datasets[0]) is None else dict(enumerate(found.clusters(MARGIN)))
    thumbnails = np.memmap(index.thumbnails, np.uint8, "r", shape=(index.size, PLAIN_SIDE**2))
    for members in suspects:
        correlations = plain_correlations(np.stack([thumbnails[member.id] for member in members]))
        yield from _cluster_findings(datasets, members, correlations, clear_of)


def _cluster_findings(
    datasets: Sequence[MaskPromptDataset],
    members: Sequence[Member],
    correlations: NDArray[np.float32],
    clear_of: Mapping[int, int],
) -> Iterator[Finding]:
    """Yield the closest pair of each two splits or datasets, and of different labels.

    Args:
        datasets: the datasets, the audited one first.
        members: the members of the cluster.
        correlations: (n, n), plain correlation of all pairs.
        clear_of: cluster at the stricter threshold, by id; empty if groups were not meant to keep
            near-duplicates together.
    """

    def is_clear(a: Member, b: Member) -> bool:
        return a.id in clear_of and clear_of[a.id] == clear_of.get(b.id)

    best: dict[tuple[Any, ...], tuple[tuple[bool, float], int, int]] = {}
    told = set()  # already reported by an identical pair
    for i, j in combinations(range(len(members)), 2):
        a, b = members[i], members[j]
        keys: list[tuple[Any, ...]] = []
        if problem := relation(a.where, b.where):
            keys.append((problem, *sorted((a.where, b.where))))
        if contradicts(datasets, a, b):
            keys.append(("labels",))
        for key in keys:
            if a.image == b.image:
                told.add(key)
            else:
                rank = is_clear(a, b), abs(float(correlations[i, j]))
                best[key] = max(best.get(key, (rank, i, j)), (rank, i, j))
    for key, ((clear, _), i, j) in best.items():
        if key not in told:
            a, b = members[i], members[j]
            fails = key[0] == "splits" and clear and measured_on_itself(a.where, b.where)
            yield Finding(
                key[0], "near", float(correlations[i, j]), len(members), fails, place(datasets, a), place(datasets, b)
            )


def plain_correlations(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the correlation of all pairs of thumbnails, (n, n); 0 for constant ones.

    Args:
        thumbnails: (n, pixels).
    """
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True, dtype=np.float32)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(lengths > 0, lengths, 1)
    return np.clip(unit @ unit.T, -1, 1).astype(np.float32)


def _suspicious(datasets: Sequence[MaskPromptDataset], members: Sequence[Member]) -> bool:
    return any(relation(a.where, b.where) or contradicts(datasets, a, b) for a, b in combinations(members, 2))


def _clusters(index: AuditIndex, cluster_of: Sequence[int]) -> list[list[Member]]:
    """Return the clusters with several images; `cluster_of` is the cluster of each image."""
    by_cluster: dict[int, list[int]] = {}
    for number, cluster in enumerate(cluster_of):
        by_cluster.setdefault(cluster, []).append(number)
    query = f"SELECT {MEMBER} FROM images WHERE id = ?"
    return [
        [Member._make(index.rows.execute(query, (number,)).fetchone()) for number in numbers]
        for numbers in by_cluster.values()
        if len(numbers) > 1
    ]


def near_threshold(datasets: Sequence[MaskPromptDataset]) -> float:
    """Return the threshold of the aligned correlation: that used for grouping, else the default."""
    stated = [correlation for one in datasets if (correlation := near_correlation(one)) is not None]
    return stated[0] if stated else CORRELATION
