"""Groups: what must lie in one split. Patients where the dataset knows them, near-duplicates where it does not, or both."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from scipy.cluster.hierarchy import DisjointSet

from maskloom.data_prep.adapter import Reject
from maskloom.data_prep.readers.file_names import comparable
from maskloom.pipeline.dataset.contract import SPLITS

MOST_GROUPS = 5  # that may share a picture: a patient with two names, not a page that every examination begins with


@dataclass(frozen=True, slots=True)
class Found:
    """What is kept in memory of one usable sample: enough to group and split, and the place of its record.

    Attributes:
        source: index of its source.
        has_signature: whether the part's `.near` file holds a record of it.
        part: number of its part.
        record: (offset, length) of its line in the part's `.jsonl`, in bytes.
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
    """One row to be: a sample and the name of its group."""

    item: Found
    group: str


@dataclass(frozen=True)
class Grouping:
    """What becomes of some samples.

    Attributes:
        rows: those that are used, in their order.
        rejected: the others, with the reason.
        united: names of groups of the dataset that became one, because images of both are duplicates.
    """

    rows: list[Row]
    rejected: list[Reject]
    united: list[tuple[str, ...]]


def consistent_rows(items: Sequence[Found], clusters: Sequence[int]) -> Grouping:
    """Return the items, each with the name of its group, and those that contradict their group.

    Left out are pictures that more than `MOST_GROUPS` groups share (a title page, a test pattern: of no patient, and they would join all of
    them), all images of a cluster of duplicates that carries several labels (at least one label is wrong, and nothing says
    which), and of a group that the dataset itself spreads over several splits, those outside the most held-out one.

    Args:
        items: the usable items.
        clusters: cluster of duplicates of each item.
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
    """Return the samples whose cluster no earlier source has, each with its cluster, and the others as rejects.

    An external test image that the main dataset holds as well would be no test.

    Args:
        samples: those of all sources, the main dataset's first.
        clusters: near-duplicate cluster of each.
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
    """Return the component of each row, named by one of its rows; rows that share a key (other than None) are linked."""
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
    """Return the items with their clusters, less those whose very picture lies in too many groups of the dataset."""
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
    """Return a group's items, named, less those that do not lie in the most held-out split that the dataset itself gives the group.

    A published test split stays what it is: an image without a split that belongs to one of its groups does not join it.
    """
    name = next((item.group for item in items if item.group), items[0].sample_id)
    fixed = {item.split for item in items if item.split}
    # An external set's images all have the same split, which is none of these.
    split = max(fixed, key=SPLITS.index) if len(fixed) > 1 else next(iter(fixed), None)
    allowed = (None, split) if split in (None, "train") else (split,)
    inside = [Row(item, name) for item in items if item.split in allowed]
    holder = next((item.sample_id for item in items if item.split == split), "")
    reason = f"group {name} also lies in the dataset's {split} split: {holder}"
    return inside, [Reject(item.path, reason) for item in items if item.split not in allowed]


def _by(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the indices that share a key, for each key in order of first appearance."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        members[key].append(index)
    return list(members.values())
