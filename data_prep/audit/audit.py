"""The content audit of `maskloom verify`: statistics of the splits, and shared images.

A *failure* invalidates results: an image used for training or model selection that is also in a
test split, or one image with two labels. Everything else is only reported: near-duplicates between
datasets or slightly above the threshold, different masks of identical images, distributions.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from maskloom.data_prep.audit.duplicates import near_findings, near_threshold
from maskloom.data_prep.audit.index import AuditIndex
from maskloom.pipeline.dataset.audit.findings import Finding, failure_text, identical_findings, near_correlation
from maskloom.pipeline.dataset.contract import split_order
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.leaks import FIX, NEAR_LIMIT
from maskloom.pipeline.runs.sample_files import files_in_words

KEPT_FINDINGS = 1000  # per kind; further findings are only counted
REFERENCE = "train"
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class SplitContent:
    """Statistics of one split.

    Attributes:
        labels: number of rows per class; rows without a class are not counted.
        masks: number of rows with a mask; `empty_masks` of them have no foreground.
        flat_images: number of constant images.
        texts: number of distinct prompts.
        grey_mean, grey_std: mean over the images of their mean and standard deviation, 0..255.
        grey_spread: standard deviation of the image means.
    """

    dataset: str
    split: str
    rows: int
    groups: int
    labels: dict[str, int]
    masks: int
    empty_masks: int
    flat_images: int
    texts: int
    longest_text: str
    grey_mean: float
    grey_std: float
    grey_spread: float


@dataclass(frozen=True)
class RegionSizes:
    """Sizes of one foreground class over the images of a split and a label.

    Attributes:
        masks: number of rows with a mask.
        present: number of these whose mask has the class; the statistics below are over them.
        smallest, p5, median, p95, largest: fraction of the image area.
        components_median, components_most: number of connected components.
    """

    dataset: str
    split: str
    label: str | None
    mask_class: str
    masks: int
    present: int
    smallest: float
    p5: float
    median: float
    p95: float
    largest: float
    components_median: float
    components_most: int


@dataclass(frozen=True)
class ClassShift:
    """Difference between the class distributions of a split and of train.

    Attributes:
        label: the class whose share differs most.
        share, train_share: its shares.
        p_value: p-value of a chi-square test of equal shares. Images of a group are not
            independent, so it tends to be too small.
    """

    split: str
    label: str
    share: float
    train_share: float
    p_value: float

    @property
    def differs(self) -> bool:
        """Whether the difference is significant."""
        return self.p_value < SIGNIFICANT


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        datasets: the audited dataset, and those that it was compared with.
        notes: which checks were run, and which were not possible.
        findings: failures first, at most `KEPT_FINDINGS` of each kind.
        counts: total number of findings by problem and likeness.
        failed: total number of failures.
    """

    datasets: list[str]
    notes: list[str]
    findings: list[Finding]
    counts: dict[str, dict[str, int]]
    failed: int
    splits: list[SplitContent]
    regions: list[RegionSizes]
    shifts: list[ClassShift]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    def require_sound(self) -> None:
        """Check that there are no failures.

        Raises:
            MaskLoomError: there are failures; names the first of each kind.
        """
        firsts: dict[str, Finding] = {}
        for finding in self.findings:
            if finding.fails:
                firsts.setdefault(finding.problem, finding)
        if firsts:
            failures = "; ".join(failure_text(finding) for finding in firsts.values())
            places = (place for finding in firsts.values() for place in (finding.first, finding.second))
            files = files_in_words((Path(place.dataset), place.sample_id) for place in places)
            wrong = f"{self.datasets[0]}: {self.failed} pair(s) of images make results wrong: {failures}"
            raise MaskLoomError("; ".join(filter(None, (wrong, files, FIX))))


def open_datasets(folders: Sequence[Path]) -> list[MaskPromptDataset]:
    """Verify datasets whole and return them.

    Raises:
        MaskLoomError: one is not sound, or is given twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise MaskLoomError(f"--against: {folders[-1]} is given twice; name other datasets than {folders[0]}")
    return [verify_fully(folder) for folder in folders]


@contextmanager
def indexed(datasets: Sequence[MaskPromptDataset], near: bool | None) -> Iterator[AuditIndex]:
    """Yield the index of the datasets; its files are deleted afterwards.

    Args:
        datasets: the audited one first.
        near: see `near_plan`.
    """
    wanted, _ = near_plan(datasets, near)
    with TemporaryDirectory(prefix="maskloom-audit-") as scratch:
        index = AuditIndex(Path(scratch), wanted)
        try:
            for number, dataset in enumerate(datasets):
                index.add(number, dataset)
            index.close_pass()
            yield index
        finally:
            index.rows.close()


def near_plan(datasets: Sequence[MaskPromptDataset], near: bool | None) -> tuple[bool, str]:
    """Return whether to search for near-duplicates, and a note about it.

    Args:
        datasets: the datasets, the audited one first.
        near: the user's choice; None: decided by the contracts and the size of the datasets.
    """
    total = sum(dataset.num_rows for dataset in datasets)
    threshold = near_threshold(datasets)
    if near:
        return True, f"near-duplicates: looked for among {total} images, aligned correlation from {threshold}"
    if near is False:
        return False, "near-duplicates: not looked for (--no-near)"
    if all(near_correlation(dataset) is None for dataset in datasets):
        return (
            False,
            "near-duplicates: not looked for: the contract's preprocessing.near_duplicates is empty; --near looks all the same",
        )
    if total > NEAR_LIMIT:
        return (
            False,
            f"near-duplicates: not looked for: {total} images are more than {NEAR_LIMIT}; --near looks all the same",
        )
    return True, f"near-duplicates: looked for among {total} images, aligned correlation from {threshold}"


def audit(datasets: Sequence[MaskPromptDataset], index: AuditIndex, near: bool | None) -> Audit:
    """Return the audit of the datasets.

    Args:
        datasets: the audited dataset, then those that it is compared with.
        index: from `indexed`, for the same datasets.
        near: see `near_plan`.
    """
    findings = _Findings()
    notes = [near_plan(datasets, near)[1], *_size_notes(datasets)]
    try:
        near_duplicates = list(near_findings(index, datasets)) if index.near else []
    except MaskLoomError as error:  # unrelated images are too similar
        near_duplicates = []
        notes.append(f"near-duplicates: not available: {error}")
    for finding in chain(identical_findings(index.rows, datasets), near_duplicates):
        findings.add(finding)
    splits = [content for number in range(len(datasets)) for content in _split_contents(index, datasets, number)]
    return Audit(
        datasets=[str(dataset.folder) for dataset in datasets],
        notes=notes,
        findings=findings.in_order(),
        counts=findings.counts(),
        failed=findings.failed,
        splits=splits,
        regions=[sizes for number in range(len(datasets)) for sizes in _region_sizes(index, datasets, number)],
        shifts=class_shifts({s.split: s.labels for s in splits if s.dataset == str(datasets[0].folder)}),
    )


def _size_notes(datasets: Sequence[MaskPromptDataset]) -> list[str]:
    """Return a note for each dataset in which identical images cannot be recognised."""
    looks = [(one.description.sizes, one.description.channels) for one in datasets]
    return [
        f"{other.folder}: its images have another size or number of channels, so an image of both is identical in neither; "
        "only the search for near-duplicates finds it"
        for other, look in zip(datasets[1:], looks[1:], strict=True)
        if look != looks[0]
    ]


def class_shifts(labels: Mapping[str, Mapping[str, int]]) -> list[ClassShift]:
    """Return the class shift of every split relative to train.

    Args:
        labels: number of rows per class for each split.
    """
    from scipy.stats import chi2_contingency

    train = labels.get(REFERENCE, {})
    shifts = []
    for split, counts in labels.items():
        names = [name for name in dict.fromkeys([*train, *counts]) if train.get(name, 0) + counts.get(name, 0)]
        table = np.array([[one.get(name, 0) for name in names] for one in (counts, train)])
        if split == REFERENCE or len(names) < 2 or not table.sum(axis=1).all():
            continue
        shares = table / table.sum(axis=1, keepdims=True)
        most = int(np.abs(shares[0] - shares[1]).argmax())
        shifts.append(
            ClassShift(
                split,
                names[most],
                float(shares[0, most]),
                float(shares[1, most]),
                float(chi2_contingency(table).pvalue),
            )
        )
    return shifts


class _Findings:
    """Collects findings up to a limit per kind, and counts all of them."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str, bool], list[Finding]] = {}
        self.totals: Counter[tuple[str, str]] = Counter()
        self.failed = 0

    def add(self, finding: Finding) -> None:
        self.totals[finding.problem, finding.likeness] += 1
        self.failed += finding.fails
        kept = self.kept.setdefault((finding.problem, finding.likeness, finding.fails), [])
        if len(kept) < KEPT_FINDINGS:
            kept.append(finding)

    def in_order(self) -> list[Finding]:
        findings = [finding for kept in self.kept.values() for finding in kept]
        return sorted(findings, key=lambda f: (not f.fails, f.problem, f.likeness, -abs(f.correlation)))

    def counts(self) -> dict[str, dict[str, int]]:
        by_problem: dict[str, dict[str, int]] = {}
        for (problem, likeness), count in sorted(self.totals.items()):
            by_problem.setdefault(problem, {})[likeness] = count
        return by_problem


def _split_contents(index: AuditIndex, datasets: Sequence[MaskPromptDataset], number: int) -> Iterator[SplitContent]:
    """Yield the statistics of each split of one dataset, train first."""
    query = """
        SELECT COUNT(*), COUNT(DISTINCT grp), COUNT(mask), COALESCE(SUM(foreground = 0), 0), SUM(flat), COUNT(DISTINCT text),
               AVG(grey_mean), AVG(grey_std), AVG(grey_mean * grey_mean)
        FROM images WHERE dataset = ? AND split = ?"""
    splits = [
        split for (split,) in index.rows.execute("SELECT DISTINCT split FROM images WHERE dataset = ?", (number,))
    ]
    for split in sorted(splits, key=split_order):
        key = number, split
        rows, groups, masks, empty, flat, texts, mean, spread, mean_square = index.rows.execute(query, key).fetchone()
        labels = (
            "SELECT label, COUNT(*) FROM images WHERE dataset = ? AND split = ? AND label IS NOT NULL GROUP BY label"
        )
        counts = dict(index.rows.execute(labels, key).fetchall())
        longest = "SELECT text FROM images WHERE dataset = ? AND split = ? ORDER BY LENGTH(text) DESC, id LIMIT 1"
        yield SplitContent(
            dataset=str(datasets[number].folder),
            split=split,
            rows=rows,
            groups=groups,
            labels={name: counts.get(name, 0) for name in datasets[number].description.labels},
            masks=masks,
            empty_masks=empty,
            flat_images=flat,
            texts=texts,
            longest_text=index.rows.execute(longest, key).fetchone()[0],
            grey_mean=mean,
            grey_std=spread,
            grey_spread=max(0.0, mean_square - mean * mean) ** 0.5,
        )


def _region_sizes(index: AuditIndex, datasets: Sequence[MaskPromptDataset], number: int) -> Iterator[RegionSizes]:
    """Yield the sizes of each foreground class by label and split, where it occurs."""
    about = datasets[number].description
    masks = (
        "SELECT label, split, COUNT(mask) FROM images WHERE dataset = ? GROUP BY label, split HAVING COUNT(mask) > 0"
    )
    parts = index.rows.execute(masks, (number,)).fetchall()
    position = {label: place for place, label in enumerate((*about.labels, None))}
    query = "SELECT class, share, components FROM regions WHERE dataset = ? AND label IS ? AND split = ? ORDER BY class"
    for label, split, count in sorted(parts, key=lambda part: (position[part[0]], split_order(part[1]))):
        found = index.rows.execute(query, (number, label, split))
        for value, regions in groupby(found, key=lambda row: row[0]):
            shares, components = np.array([row[1:] for row in regions]).T
            smallest, p5, median, p95, largest = map(float, np.quantile(shares, (0, 0.05, 0.5, 0.95, 1)))
            yield RegionSizes(
                dataset=str(datasets[number].folder),
                split=split,
                label=label,
                mask_class=about.mask_classes[value],
                masks=count,
                present=len(shares),
                smallest=smallest,
                p5=p5,
                median=median,
                p95=p95,
                largest=largest,
                components_median=float(np.median(components)),
                components_most=int(components.max()),
            )
