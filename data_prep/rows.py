"""From the samples that were read to the rows of each split: duplicates, groups, splits."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from maskloom.data_prep.adapter import Reject
from maskloom.data_prep.left_out import group_by_reason
from maskloom.data_prep.parts import SIGNATURES, Part, Reading, found_samples, without_taken_ids
from maskloom.data_prep.sources import Source
from maskloom.data_prep.splitting.groups import Found, Grouping, Row, consistent_rows, joined, without_seen
from maskloom.data_prep.splitting.splits import Group, split_of_groups
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import EXTERNAL_PREFIX, SPLITS
from maskloom.pipeline.dataset.near_duplicates.search import RECORD, Threshold, find_near_duplicates
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.parallel import worker_count
from maskloom.pipeline.progress import say

SHOWN_GROUPS = 5  # merged groups to name in the report
RowsBySplit = Mapping[str, Sequence[Row]]


class UsableRows(NamedTuple):
    """The rows of a dataset.

    Attributes:
        rows: samples with their groups, in listing order.
        rejected: the samples that are left out.
        threshold: of near-duplicates; None if they were not searched for.
    """

    rows: list[Row]
    rejected: list[Reject]
    threshold: Threshold | None


def usable_rows(reading: Reading, parts: Sequence[Part]) -> UsableRows:
    """Return the rows of the dataset, whose groups keep duplicates together.

    Raises:
        MaskLoomError: no sample is usable, or near-duplicates cannot be distinguished from
            unrelated images.
    """
    found, rejected = found_samples(reading.folder, parts, reading.sources)
    found, taken = without_taken_ids(found)
    main = [sample for sample in found if sample.source == 0]
    clusters, threshold = duplicate_clusters(reading, main)
    grouping = consistent_rows(main, clusters)
    rows, united = grouping.rows, grouping.united
    rejected += taken + grouping.rejected
    if not rows:
        raise _nothing_usable(reading.sources[0], rejected)
    if len(reading.sources) > 1:
        fresh, seen = without_seen(found, duplicate_clusters(reading, found)[0])
        rejected += seen
        for index, source in enumerate(reading.sources[1:], start=1):
            external = _external_rows(
                source, [(sample, cluster) for sample, cluster in fresh if sample.source == index]
            )
            rejected += external.rejected
            if not external.rows:
                raise _nothing_usable(source, rejected)
            rows += external.rows
            united += external.united
    _report_duplicates(reading.sources, united)
    return UsableRows(rows, rejected, threshold)


def _external_rows(source: Source, members: Sequence[tuple[Found, int]]) -> Grouping:
    """Group the samples of an external source, given with their duplicate clusters."""
    samples, clusters = [sample for sample, _ in members], [cluster for _, cluster in members]
    if source.duplicates != "near":  # near-duplicates are searched for only against the main dataset
        clusters = joined([_pixel_keys(sample) for sample in samples])
    return consistent_rows(samples, clusters)


def duplicate_clusters(reading: Reading, found: Sequence[Found]) -> tuple[list[int], Threshold | None]:
    """Return the duplicate cluster of each sample, and the threshold for near-duplicates.

    A cluster joins near-duplicates, identical raw pixels, and identical prepared images. The
    threshold is None if near-duplicates were not searched for.
    """
    near_name: dict[int, int] = {}
    threshold: Threshold | None = None
    near = [index for index, sample in enumerate(found) if sample.has_signature]
    if near:
        signatures = reading.folder / SIGNATURES
        _join_signatures(reading.folder, [found[index] for index in near], signatures)
        digests = [found[index].digest or f"blank {index}" for index in near]
        workers = worker_count(len(near) // 100, reading.data.num_workers)
        duplicates = find_near_duplicates(signatures, digests, reading.data.near_duplicate_correlation, workers)
        near_name, threshold = dict(zip(near, duplicates.clusters(), strict=True)), duplicates.threshold
    looks = [f"near {near_name[index]}" if index in near_name else None for index in range(len(found))]
    return joined([(look, *_pixel_keys(sample)) for look, sample in zip(looks, found, strict=True)]), threshold


def _pixel_keys(sample: Found) -> tuple[str | None, str | None]:
    """Return keys that are equal for identical raw pixels and for identical prepared images."""
    return f"raw {sample.digest}" if sample.digest else None, f"shown {sample.shown}" if sample.shown else None


def _join_signatures(folder: Path, found: Sequence[Found], signatures: Path) -> None:
    """Write the signatures of the samples to one file, in order."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for sample in found:
        wanted[sample.part].add(sample.record[0])
    with signatures.open("wb") as target:
        for number, records in sorted(wanted.items()):
            part = Part(number, 0, ())
            with part.path(folder, "jsonl").open("rb") as lines, part.path(folder, "near").open("rb") as near:
                offset = 0
                for line in lines:
                    if json.loads(line).get("near"):
                        record = near.read(RECORD.itemsize)
                        if offset in records:
                            target.write(record)
                    offset += len(line)


def _nothing_usable(source: Source, rejected: Sequence[Reject]) -> MaskLoomError:
    where = f"{source.section}.raw_dir"
    rejected = [reject for reject in rejected if not source.split or source.holds(reject.path)]
    if not rejected:
        return MaskLoomError(
            f"{where}={source.adapter.raw_dir}: no image found for {source.name}; give the folder of the raw dataset"
        )
    first = rejected[0]
    return MaskLoomError(
        f"no usable image of {source.name} among {len(rejected)}; the first, {first.path}: {first.reason}; check {where}"
    )


def _report_duplicates(sources: Sequence[Source], united: Sequence[tuple[str, ...]]) -> None:
    """Report merged groups, and datasets in which duplicates were not searched for."""
    for source in sources:
        if source.duplicates == "none":
            say(
                f"prepare: data.duplicates=none: identical images of {source.name} were not looked for; "
                "training and evaluation stop where splits share one"
            )
    if united:
        first = "; ".join(" = ".join(names) for names in united[:SHOWN_GROUPS])
        more = f"; and {len(united) - SHOWN_GROUPS} more" if united[SHOWN_GROUPS:] else ""
        say(f"prepare: groups of the dataset that share images were united, each now lies in one split: {first}{more}")


def rows_by_split(usable: UsableRows, config: ExperimentConfig) -> dict[str, list[Row]]:
    """Return the rows of each split, shuffled in an order that depends only on the ids.

    Raises:
        MaskLoomError: a split would be empty; names the most frequent reason for inputs left out.
    """
    rows, rejected = usable.rows, usable.rejected
    try:
        split_of = split_of_groups(_groups(rows), config.data.splits, config.seed)
    except MaskLoomError as error:
        if not rejected:
            raise
        commonest = group_by_reason(rejected)[0]
        told = f"{len(rejected)} of {len(rejected) + len(rows)} inputs were left out, {len(commonest.paths)} of them: {commonest.reason}"
        raise MaskLoomError(f"{error} ({told})") from None
    split_of |= {row.group: row.item.split for row in rows if row.item.source and row.item.split}
    mixed = sorted(rows, key=lambda row: value_digest(row.item.sample_id))
    names = [*SPLITS, *(f"{EXTERNAL_PREFIX}{name}" for name in config.data.external)]
    return {split: [row for row in mixed if split_of[row.group] == split] for split in names}


def _groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups of the main dataset; the class of a group is its most frequent one."""
    members: dict[str, list[Found]] = defaultdict(list)
    for row in rows:
        if row.item.source == 0:
            members[row.group].append(row.item)
    return [
        Group(
            name,
            rows=len(items),
            label=Counter(item.label for item in items).most_common(1)[0][0],
            split=next((item.split for item in items if item.split), None),
        )
        for name, items in members.items()
    ]
