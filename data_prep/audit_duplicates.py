"""Images that datasets share: identical ones and near-duplicates, across splits, across datasets, and with labels or masks that contradict.

Near-duplicates are found as in `near_duplicates`, on the prepared images less their padding. Those are smaller than the raw images on which `prepare`
formed groups, so a pair fails only where the images still match at `MARGIN` above the threshold; the others are warnings. Measured on BUSI (576 rows,
prepared at 128 x 128 and 64 x 64): the same 107 clusters as in the raw images, all inside a group; at 32 x 32 one more, below the margin.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.audit_index import PLAIN_SIDE, AuditIndex
from data_prep.near_duplicates import RECORD, near_duplicate_clusters
from pipeline.config import DataConfig
from pipeline.contract import Contract

MARGIN = 0.1
SHAPING_SPLITS = ("train", "validation")  # what a model is fitted to, and chosen by


@dataclass(frozen=True)
class Place:
    """Where an image lies."""

    dataset: str
    split: str
    sample_id: str
    group_id: str
    label: str | None


@dataclass(frozen=True)
class Finding:
    """Two images that are the same picture, or nearly, and what is wrong with that.

    Attributes:
        problem: `splits` (in two splits of the dataset), `datasets` (in both datasets), `labels` (with different labels), or `masks`.
        likeness: `identical` (every pixel) or `near`.
        correlation: of the two images reduced to 64 x 64.
        images: size of the set of look-alikes that the pair is taken from.
        fails: whether the dataset must not be used like this.
    """

    problem: str
    likeness: str
    correlation: float
    images: int
    fails: bool
    first: Place
    second: Place


class Dataset(NamedTuple):
    """A verified dataset."""

    folder: Path
    contract: Contract

    @property
    def rows(self) -> int:
        """Number of its rows."""
        return sum(split.rows for split in self.contract.splits.values())

    @property
    def near_correlation(self) -> float | None:
        """Threshold by which its groups were meant to catch near-duplicates; None where they were not."""
        stated = self.contract.description.preprocessing.get("near_duplicates")
        return float(stated["correlation"]) if isinstance(stated, dict) and "correlation" in stated else None


class _Member(NamedTuple):
    """An image in a set of look-alikes."""

    id: int
    dataset: int
    split: str
    sample: str
    group: str
    label: str | None
    image: bytes
    mask: bytes | None
    flat: bool

    @property
    def where(self) -> tuple[int, str]:
        return self.dataset, self.split


MEMBER = "id, dataset, split, sample, grp, label, image, mask, flat"


def _place(datasets: Sequence[Dataset], member: _Member) -> Place:
    return Place(str(datasets[member.dataset].folder), member.split, member.sample, member.group, member.label)


def _measured_on_itself(a: tuple[int, str], b: tuple[int, str]) -> bool:
    """Whether an image in both places would measure a model that it shaped. Places are (dataset, split)."""
    return a[1] != b[1] and (a[1] in SHAPING_SPLITS or b[1] in SHAPING_SPLITS)


def _relation(a: tuple[int, str], b: tuple[int, str]) -> str | None:
    """Return the problem that an image in both places is, or None. The audited dataset is number 0."""
    if a[0] == b[0] == 0:
        return "splits" if a[1] != b[1] else None
    return "datasets" if 0 in (a[0], b[0]) and a[0] != b[0] else None


def _contradicts(datasets: Sequence[Dataset], a: _Member, b: _Member) -> bool:
    """Whether two labels exclude each other: both are given, differ, and mean something to both datasets."""
    if a.label is None or b.label is None or a.label == b.label or 0 not in (a.dataset, b.dataset):
        return False
    known = [datasets[one.dataset].contract.description.labels for one in (a, b)]
    return a.label in known[1] and b.label in known[0]


def identical_findings(index: AuditIndex, datasets: Sequence[Dataset]) -> Iterator[Finding]:
    """Yield what identical images have in common that they should not; images of one grey level are all alike and mean nothing."""
    query = (
        f"SELECT {MEMBER} FROM images WHERE image IN"
        " (SELECT image FROM images WHERE NOT flat GROUP BY image HAVING COUNT(*) > 1) ORDER BY image, id"
    )
    for _, rows in groupby(map(_Member._make, index.rows.execute(query)), key=lambda member: member.image):
        yield from _set_findings(datasets, rows)


def _set_findings(datasets: Sequence[Dataset], members: Iterable[_Member]) -> Iterator[Finding]:
    """Yield the findings in one set of identical images; of a large set only the first image of each kind is kept in memory."""
    places: dict[tuple[int, str], _Member] = {}
    labels: dict[tuple[int, str | None], _Member] = {}
    masks: list[_Member] = []
    size = 0
    for member in members:
        size += 1
        places.setdefault(member.where, member)
        labels.setdefault((member.dataset, member.label), member)
        if (
            member.dataset == 0
            and member.mask is not None
            and len(masks) < 2
            and member.mask not in {m.mask for m in masks}
        ):
            masks.append(member)

    def finding(problem: str, a: _Member, b: _Member, fails: bool) -> Finding:
        return Finding(problem, "identical", 1.0, size, fails, _place(datasets, a), _place(datasets, b))

    for a, b in combinations(places.values(), 2):
        problem = _relation(a.where, b.where)
        if problem:
            yield finding(problem, a, b, _measured_on_itself(a.where, b.where))
    for a, b in combinations(labels.values(), 2):
        if _contradicts(datasets, a, b):
            yield finding("labels", a, b, True)
    if len(masks) == 2:
        yield finding("masks", masks[0], masks[1], False)


def near_findings(index: AuditIndex, datasets: Sequence[Dataset]) -> Iterator[Finding]:
    """Yield pairs of near-duplicates that lie in two splits, in two datasets, or carry two labels."""
    threshold = near_threshold(datasets)
    suspects = [members for members in _clusters(index, range(index.size), threshold) if _suspicious(datasets, members)]
    if not suspects:
        return
    clear_of: dict[int, int] = {}
    if datasets[0].near_correlation is not None:  # else no near-duplicate fails
        ids = sorted(member.id for members in suspects for member in members)
        clear = _clusters(index, ids, min(1.0, threshold + MARGIN))
        clear_of = {member.id: number for number, members in enumerate(clear) for member in members}
    thumbnails = np.memmap(index.thumbnails, np.uint8, "r", shape=(index.size, PLAIN_SIDE**2))
    for members in suspects:
        correlations = plain_correlations(np.stack([thumbnails[member.id] for member in members]))
        yield from _cluster_findings(datasets, members, correlations, clear_of)


def _cluster_findings(
    datasets: Sequence[Dataset],
    members: Sequence[_Member],
    correlations: NDArray[np.float32],
    clear_of: Mapping[int, int],
) -> Iterator[Finding]:
    """Yield the closest pair of each two places that share a cluster, and the closest pair with different labels.

    Args:
        datasets: the audited one first.
        members: of the cluster.
        correlations: (n, n), plain correlation of all pairs.
        clear_of: cluster at the stricter threshold, by id; empty where groups were not meant to catch near-duplicates.
    """

    def is_clear(a: _Member, b: _Member) -> bool:
        return a.id in clear_of and clear_of[a.id] == clear_of.get(b.id)

    best: dict[tuple[Any, ...], tuple[tuple[bool, float], int, int]] = {}
    told = set()  # by an identical pair already
    for i, j in combinations(range(len(members)), 2):
        a, b = members[i], members[j]
        keys: list[tuple[Any, ...]] = []
        if problem := _relation(a.where, b.where):
            keys.append((problem, *sorted((a.where, b.where))))
        if _contradicts(datasets, a, b):
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
            fails = key[0] == "splits" and clear and _measured_on_itself(a.where, b.where)
            yield Finding(
                key[0], "near", float(correlations[i, j]), len(members), fails, _place(datasets, a), _place(datasets, b)
            )


def plain_correlations(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the correlation of all pairs of thumbnails, (n, n); 0 with one that is flat.

    Args:
        thumbnails: (n, pixels).
    """
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True, dtype=np.float32)
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = centred / np.where(lengths > 0, lengths, 1)
    return np.clip(unit @ unit.T, -1, 1).astype(np.float32)


def _suspicious(datasets: Sequence[Dataset], members: Sequence[_Member]) -> bool:
    return any(_relation(a.where, b.where) or _contradicts(datasets, a, b) for a, b in combinations(members, 2))


def _clusters(index: AuditIndex, ids: Sequence[int], correlation: float) -> list[list[_Member]]:
    """Return the near-duplicate clusters of several images among some of the index."""
    rows = (index.rows.execute("SELECT image, flat FROM images WHERE id = ?", (number,)).fetchone() for number in ids)
    # Images of one grey level are alike without being duplicates; they get digests of their own.
    digests = [f"flat {number}" if flat else image.hex() for number, (image, flat) in zip(ids, rows, strict=True)]
    by_cluster: dict[int, list[int]] = {}
    found = near_duplicate_clusters(_signatures(index, ids), digests, correlation)
    for number, cluster in zip(ids, found, strict=True):
        by_cluster.setdefault(cluster, []).append(number)
    return [[_member(index, number) for number in numbers] for numbers in by_cluster.values() if len(numbers) > 1]


def _signatures(index: AuditIndex, ids: Sequence[int]) -> Path:
    """Return a file of the signatures of some images, in the order of their ids."""
    if len(ids) == index.size:
        return index.signatures
    path = index.signatures.with_name("chosen.bin")
    with index.signatures.open("rb") as source, path.open("wb") as chosen:
        for number in ids:
            source.seek(number * RECORD.itemsize)
            chosen.write(source.read(RECORD.itemsize))
    return path


def _member(index: AuditIndex, number: int) -> _Member:
    return _Member._make(index.rows.execute(f"SELECT {MEMBER} FROM images WHERE id = ?", (number,)).fetchone())


def near_threshold(datasets: Sequence[Dataset]) -> float:
    """Return the aligned correlation from which images are near-duplicates: as grouping had it, else the default."""
    stated = [dataset.near_correlation for dataset in datasets if dataset.near_correlation is not None]
    return stated[0] if stated else float(DataConfig.model_fields["near_duplicate_correlation"].default)
