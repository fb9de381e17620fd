"""Identical images in two splits or two datasets, or with contradicting labels or masks.

A *failure* invalidates results: an image that is used for training or model selection and also for
testing, or an image with two labels.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import NamedTuple

from maskloom.pipeline.dataset.dataset import MaskPromptDataset

SHAPING_SPLITS = ("train", "validation")  # used for training and model selection


@dataclass(frozen=True)
class Place:
    """Location of an image."""

    dataset: str
    split: str
    sample_id: str
    group_id: str
    label: str | None


@dataclass(frozen=True)
class Finding:
    """Two images that are identical or near-duplicates, and the problem with that.

    Attributes:
        problem: `splits` (in two splits of the dataset), `datasets` (in both datasets), `labels`
            (with different labels), or `masks` (with different masks).
        likeness: `identical` (every pixel) or `near`.
        correlation: correlation of the two images, reduced to 64 x 64.
        images: number of images in the set of near-duplicates from which the pair is taken.
        fails: whether the dataset must not be used like this.
    """

    problem: str
    likeness: str
    correlation: float
    images: int
    fails: bool
    first: Place
    second: Place


class Member(NamedTuple):
    """An image in a set of near-duplicates."""

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
        """Dataset and split."""
        return self.dataset, self.split


MEMBER = "id, dataset, split, sample, grp, label, image, mask, flat"


def place(datasets: Sequence[MaskPromptDataset], member: Member) -> Place:
    """Return the location of an image, with the folder of its dataset."""
    return Place(str(datasets[member.dataset].folder), member.split, member.sample, member.group, member.label)


def near_correlation(dataset: MaskPromptDataset) -> float | None:
    """Return the threshold with which groups unite near-duplicates, or None if they do not."""
    return stated_threshold(dataset, "correlation")


def stated_threshold(dataset: MaskPromptDataset, name: str) -> float | None:
    """Return a threshold for near-duplicates that the contract states, or None.

    Args:
        dataset: the dataset.
        name: `correlation` (of aligned textures) or `detail` (of their details).
    """
    stated = dataset.description.preprocessing.get("near_duplicates")
    return float(stated[name]) if isinstance(stated, dict) and name in stated else None


def measured_on_itself(a: tuple[int, str], b: tuple[int, str]) -> bool:
    """Return whether an image in both places is trained on and tested on.

    Args:
        a: (dataset, split).
        b: (dataset, split).
    """
    return a[1] != b[1] and (a[1] in SHAPING_SPLITS or b[1] in SHAPING_SPLITS)


def relation(a: tuple[int, str], b: tuple[int, str]) -> str | None:
    """Return the problem of an image in both places, or None; the audited dataset is number 0."""
    if a[0] == b[0] == 0:
        return "splits" if a[1] != b[1] else None
    return "datasets" if 0 in (a[0], b[0]) and a[0] != b[0] else None


def contradicts(datasets: Sequence[MaskPromptDataset], a: Member, b: Member) -> bool:
    """Return whether two labels contradict: both are given, differ, and exist in both datasets."""
    if a.label is None or b.label is None or a.label == b.label or 0 not in (a.dataset, b.dataset):
        return False
    known = [datasets[one.dataset].description.labels for one in (a, b)]
    return a.label in known[1] and b.label in known[0]


def identical_findings(rows: sqlite3.Connection, datasets: Sequence[MaskPromptDataset]) -> Iterator[Finding]:
    """Yield the problems of identical images; uniform images are ignored.

    Args:
        rows: database with a table `images` of at least the columns `MEMBER`, and an index on
            `image`.
        datasets: the datasets of its rows, the audited one first.
    """
    query = (
        f"SELECT {MEMBER} FROM images WHERE image IN"
        " (SELECT image FROM images WHERE NOT flat GROUP BY image HAVING COUNT(*) > 1) ORDER BY image, id"
    )
    for _, alike in groupby(map(Member._make, rows.execute(query)), key=lambda member: member.image):
        yield from _set_findings(datasets, alike)


def _set_findings(datasets: Sequence[MaskPromptDataset], members: Iterable[Member]) -> Iterator[Finding]:
    """Yield the findings in a set of identical images: of a failure, every image that is in the second place."""
    members = list(members)
    places: dict[tuple[int, str], Member] = {}
    labels: dict[tuple[int, str | None], Member] = {}
    masks: list[Member] = []
    for member in members:
        places.setdefault(member.where, member)
        labels.setdefault((member.dataset, member.label), member)
        if (
            member.dataset == 0
            and member.mask is not None
            and len(masks) < 2
            and member.mask not in {m.mask for m in masks}
        ):
            masks.append(member)

    def finding(problem: str, a: Member, b: Member, fails: bool) -> Finding:
        return Finding(problem, "identical", 1.0, len(members), fails, place(datasets, a), place(datasets, b))

    for a, b in combinations(places.values(), 2):
        problem = relation(a.where, b.where)
        if problem and not measured_on_itself(a.where, b.where):
            yield finding(problem, a, b, False)
        elif problem:
            for member in members:
                if member.where == b.where:
                    yield finding(problem, a, member, True)
    for a, b in combinations(labels.values(), 2):
        if contradicts(datasets, a, b):
            yield finding("labels", a, b, True)
    if len(masks) == 2:
        yield finding("masks", masks[0], masks[1], False)


def failure_row(finding: Finding) -> dict[str, str]:
    """Return a failure for a file."""
    places = (("image", finding.second), ("shows", finding.first))
    where = {
        key: value
        for name, one in places
        for key, value in ((name, one.sample_id), (f"{name}_split", one.split), (f"{name}_dataset", one.dataset))
    }
    return {**where, "problem": failure_text(finding)}


def failure_text(finding: Finding) -> str:
    """Return a failure in words."""
    a, b = finding.first, finding.second
    alike = "identical images" if finding.likeness == "identical" else "near-duplicates"
    if finding.problem == "labels":
        return f"{alike} with different labels: {a.sample_id} ({a.label}) and {b.sample_id} ({b.label})"
    if finding.problem == "datasets":
        return f"{alike} in both datasets: {a.sample_id} ({a.split}) and {b.sample_id} ({b.split} of {b.dataset})"
    return f"{alike} in two splits: {a.sample_id} ({a.split}) and {b.sample_id} ({b.split})"
