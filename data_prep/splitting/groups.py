"""Groups of rows that must stay in one split: patients, clusters of near-duplicates, or both."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from maskloom.data_prep.adapter import Reject
from maskloom.data_prep.readers.file_names import comparable
from maskloom.pipeline.dataset.contract import SPLITS

MOST_GROUPS = 5  # that may share an image: a patient with two ids, but not the title page of every examination


@dataclass(frozen=True, slots=True)
class Found:
    """The in-memory entry of a usable sample: what grouping and splitting need, and its record.

    Attributes:
        source: index of the source.
        has_signature: whether the `.near` file of the part has a signature for it.
        part: number of the part.
        record: (offset, length) of its line in the `.jsonl` file of the part, in bytes.
    """

    sample_id: str
    path: str
    label: str | None
    group: str | None
    split: str | None
    digest: str
    shown: str
    source: int
    has_signature: bool
    part: int
    record: tuple[int, int]


@dataclass(frozen=True)
class Row:
    """A future row: a sample and the name of its group."""

    item: Found
    group: str


@dataclass(frozen=True)
class Grouping:
    """The result of grouping.

    Attributes:
        rows: the samples that are used, in order.
        rejected: the other samples, with the reason.
        united: names of groups that were merged because they share duplicates.
    """

    rows: list[Row]
    rejected: list[Reject]
    united: list[tuple[str, ...]]


def consistent_rows(items: Sequence[Found], clusters: Sequence[int]) -> Grouping:
    """Group the items, and reject those that contradict their group.

    Rejected are: images shared by more than `MOST_GROUPS` groups (a title page or test pattern,
    which belongs to no patient and would merge all of them); all images of a cluster of duplicates
    with several labels (at least one label is wrong, and it is unknown which); and, in a group that
    the dataset assigns to several splits, the images outside the most held-out split.

    Args:
        items: the usable items.
        clusters: duplicate cluster of each item.
    """
    own, shared = _without_shared_pictures(items, clusters)
    agreeing, rejected = _without_label_conflicts(own)
    links = [
        (f"cluster {cluster}", f"group {comparable(item.group)}" if item.group else None) for item, cluster in agreeing
    ]
    kept: dict[str, Row] = {}
    rejected = shared + rejected
    united = []
    for members in _by(joined(links)):
        group = [agreeing[index][0] for index in members]
        inside, outside = _without_split_conflicts(group)
        kept |= {row.item.sample_id: row for row in inside}
        rejected += outside
        names = {comparable(item.group): item.group for item in reversed(group) if item.group}
        if len(names) > 1:
            united.append(tuple(sorted(names.values())))
    return Grouping([kept[item.sample_id] for item in items if item.sample_id in kept], rejected, united)


def without_seen(samples: Sequence[Found], clusters: Sequence[int]) -> tuple[list[tuple[Found, int]], list[Reject]]:
    """Return the samples without duplicates in an earlier source, and the rejects.

    An external test image that is also in the main dataset would invalidate the test.

    Args:
        samples: the samples of all sources, the main dataset first.
        clusters: near-duplicate cluster of each sample.
    """
    owner: dict[int, Found] = {}
    kept, rejected = [], []
    for sample, cluster in zip(samples, clusters, strict=True):
        first = owner.setdefault(cluster, sample)
        if first.source == sample.source:
            kept.append((sample, cluster))
        else:
            rejected.append(Reject(sample.path, f"near-duplicate of an image of another source: {first.sample_id}"))
    return kept, rejected


def joined(keys: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """Return the connected component of each row, where rows are linked by common keys except None.

    A component is named by one of its rows.
    """
    from scipy.cluster.hierarchy import DisjointSet  # here, as processes that read parts need none of it

    sets = DisjointSet(range(len(keys)))
    first: dict[Hashable, int] = {}
    for row, of_row in enumerate(keys):
        for key in of_row:
            if key is not None:
                sets.merge(first.setdefault(key, row), row)
    return [sets[row] for row in range(len(keys))]


def _without_shared_pictures(
    items: Sequence[Found], clusters: Sequence[int]
) -> tuple[list[tuple[Found, int]], list[Reject]]:
    """Return the items with their clusters, and rejects for images that are in too many groups."""
    groups: dict[str, set[str]] = defaultdict(set)
    for item in items:
        if item.shown and item.group:
            groups[item.shown].add(item.group)
    kept, rejected = [], []
    for item, cluster in zip(items, clusters, strict=True):
        count = len(groups.get(item.shown, ()))
        if count > MOST_GROUPS:
            rejected.append(Reject(item.path, f"the same picture lies in {count} groups, so it is no patient's own"))
        else:
            kept.append((item, cluster))
    return kept, rejected


def _without_label_conflicts(items: Sequence[tuple[Found, int]]) -> tuple[list[tuple[Found, int]], list[Reject]]:
    kept, rejected = [], []
    for members in _by(cluster for _, cluster in items):
        found = [items[index][0] for index in members]
        labels = sorted({item.label or "none" for item in found})
        if len(labels) == 1:
            kept += [items[index] for index in members]
            continue
        names = ", ".join(item.sample_id for item in found)
        reason = f"near-duplicates with different labels ({', '.join(labels)}): {names}"
        rejected += [Reject(item.path, reason) for item in found]
    return kept, rejected


def _without_split_conflicts(items: Sequence[Found]) -> tuple[list[Row], list[Reject]]:
    """Return the rows of a group in its most held-out published split, and rejects for the others.

    A published test split stays unchanged: images without a split do not join it through their
    group.
    """
    name = next((item.group for item in items if item.group), items[0].sample_id)
    fixed = {item.split for item in items if item.split}
    # The images of an external dataset all have the same split, which is not in SPLITS.
    split = max(fixed, key=SPLITS.index) if len(fixed) > 1 else next(iter(fixed), None)
    allowed = (None, split) if split in (None, "train") else (split,)
    inside = [Row(item, name) for item in items if item.split in allowed]
    holder = next((item.sample_id for item in items if item.split == split), "")
    reason = f"group {name} also lies in the dataset's {split} split: {holder}"
    return inside, [Reject(item.path, reason) for item in items if item.split not in allowed]


def _by(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the indices of each key, in order of first appearance."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        members[key].append(index)
    return list(members.values())
