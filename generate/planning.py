"""Plans the rows of a synthetic dataset: counts per class, parent mask and seed of each row.

A plan depends on the dataset, the configuration and `seed`, never on the generator. Every generator
gets the same masks, prompts and seeds, so that differences between their datasets are differences
between generators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from maskloom.pipeline.config.generate import GenerateConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.files.reading import row_attributes

# Names of the independent random streams under the experiment's seed.
PARENT_STREAM, NOISE_STREAM, REPLACEMENT_STREAM = 1, 2, 3
MAX_PARENTS = 10  # tried for one row before the run stops with an error


@dataclass(frozen=True)
class TrainRow:
    """A row of the train split whose mask may be used.

    Attributes:
        position: index in the train split.
        label: index into the description's labels, or None.
        attributes: the values that its prompt was rendered from.
    """

    position: int
    sample_id: str
    group_id: str
    label: int | None
    attributes: Mapping[str, str]


@dataclass(frozen=True)
class PlannedRow:
    """A row to generate.

    Attributes:
        index: index of the row, 0 .. number of rows - 1.
        source: `train` (the mask unchanged) or `warped`.
        parent: the train row whose mask is used, or tried first.
        seed: seed of the image's noise, 0 .. 2**32 - 1.
    """

    index: int
    source: str
    parent: TrainRow
    seed: int


def read_parents(dataset: MaskPromptDataset, split: str = "train") -> list[TrainRow]:
    """Return the rows whose masks may be used, without their images.

    Raises:
        MaskLoomError: `split` is held out (any split except train), or empty.
    """
    if split != "train":
        raise MaskLoomError(f"{dataset.folder}: masks of the {split} split must not be seen by a generator; use train")
    table = dataset.split(split).select_columns(["sample_id", "group_id", "label", "attributes"])
    return [
        TrainRow(
            position,
            row["sample_id"],
            row["group_id"],
            row["label"],
            row_attributes(row["attributes"], f"sample {row['sample_id']}"),
        )
        for position, row in enumerate(table)
    ]


def plan_rows(
    parents: Sequence[TrainRow], labels: Sequence[str], config: GenerateConfig, seed: int
) -> list[PlannedRow]:
    """Return the rows to generate, interleaved by class so that any range of rows is balanced.

    Args:
        parents: the train rows.
        labels: names of the image-level classes; may be empty.
        config: counts and mask sources.
        seed: the experiment's seed.

    Raises:
        MaskLoomError: a class is unknown, has no train mask, or its count is negative.
    """
    by_label = group_by_label(parents)
    counts = rows_per_label(by_label, labels, config)
    drafts = []
    for label, count in counts.items():
        stream = _stream_number(label)
        for place, (source, parent) in enumerate(
            _sources_and_parents(by_label[label], config.mask_source, count, seed, stream)
        ):
            drafts.append(((place + 0.5) / count, stream, source, parent))
    drafts.sort(key=lambda draft: draft[:2])
    return [PlannedRow(i, source, parent, noise_seed(seed, i)) for i, (_, _, source, parent) in enumerate(drafts)]


def rows_drawn_again(rows: Sequence[PlannedRow], indices: Sequence[int], number: int) -> list[PlannedRow]:
    """Return rows of a plan with other seeds: the same class, mask source and parent.

    The index of a row, and with it its id, noise and warp, depends on the round and on no other row.

    Args:
        rows: the whole plan.
        indices: of the rows to draw again, in ascending order.
        number: of the round, from 1.
    """
    again = [(rows[index], len(rows) * number + index) for index in indices]
    return [replace(row, index=index, seed=(row.seed + index - row.index) % 2**32) for row, index in again]


def group_by_label(parents: Sequence[TrainRow]) -> dict[int | None, list[TrainRow]]:
    """Return the train rows of each label, in the order of the labels; rows without one first."""
    groups: dict[int | None, list[TrainRow]] = {}
    for parent in sorted(parents, key=lambda row: (_stream_number(row.label), row.position)):
        groups.setdefault(parent.label, []).append(parent)
    return groups


def rows_per_label(
    by_label: Mapping[int | None, Sequence[TrainRow]], labels: Sequence[str], config: GenerateConfig
) -> dict[int | None, int]:
    """Return the number of rows for each label: as configured, spread evenly, or as in train.

    Raises:
        MaskLoomError: a configured class is unknown, has no train mask, or its count is negative.
    """
    if config.images_per_class is not None:
        return _exact_counts(config.images_per_class, by_label, labels)
    if config.num_images is None:
        return {label: len(rows) for label, rows in by_label.items()}
    known: list[int | None] = [label for label in by_label if label is not None]
    known = known or [None]
    share, rest = divmod(config.num_images, len(known))
    return {label: share + (place < rest) for place, label in enumerate(known)}


def replacement_parents(
    row: PlannedRow, by_label: Mapping[int | None, Sequence[TrainRow]], seed: int
) -> Iterator[TrainRow]:
    """Yield the row's parent, then others of its class in random order, `MAX_PARENTS` at most."""
    yield row.parent
    others = [parent for parent in by_label[row.parent.label] if parent is not row.parent]
    order = np.random.default_rng([seed, REPLACEMENT_STREAM, row.index]).permutation(len(others))
    for place in order[: MAX_PARENTS - 1]:
        yield others[place]


def check_parents_are_train(rows: Sequence[PlannedRow], dataset: MaskPromptDataset) -> None:
    """Check that no planned row uses a mask of a held-out row, or of a group with held-out rows.

    Raises:
        MaskLoomError: names the row and its split.
    """
    held_out = {
        name: split for split, pairs in dataset.ids().items() if split != "train" for pair in pairs for name in pair
    }
    for row in rows:
        for name in (row.parent.sample_id, row.parent.group_id):
            if name in held_out:
                raise MaskLoomError(
                    f"{dataset.folder}: the mask of {name!r} lies in the {held_out[name]} split; masks may come from train only"
                )


def noise_seed(seed: int, index: int) -> int:
    """Return the seed of a row's noise, 0 .. 2**32 - 1; different for every row of a run."""
    first = int(np.random.SeedSequence([seed, NOISE_STREAM]).generate_state(1, np.uint32)[0])
    return (first + index) % 2**32


def _stream_number(label: int | None) -> int:
    return 0 if label is None else label + 1


def _exact_counts(
    asked: Mapping[str, int], by_label: Mapping[int | None, Sequence[TrainRow]], labels: Sequence[str]
) -> dict[int | None, int]:
    counts: dict[int | None, int] = {}
    for name, count in asked.items():
        key = f"generate.images_per_class.{name}"
        if name not in labels:
            raise MaskLoomError(f"{key}: the dataset has no such class: {nearest_name(name, list(labels))}")
        if count < 0:
            raise MaskLoomError(f"{key}={count}: a count must not be negative")
        label = list(labels).index(name)
        if count and label not in by_label:
            raise MaskLoomError(f"{key}={count}: no train row has this class, so there is no mask to start from")
        if count:
            counts[label] = count
    if not counts:
        raise MaskLoomError("generate.images_per_class: all counts are zero; ask for at least one image")
    return counts


def _sources_and_parents(
    candidates: Sequence[TrainRow], sources: Sequence[str], count: int, seed: int, stream: int
) -> Iterator[tuple[str, TrainRow]]:
    """Yield `count` pairs of source and parent.

    Sources alternate. Each goes through all parents, in a new random order every time.
    """
    parents = [
        _reshuffled(candidates, np.random.default_rng([seed, PARENT_STREAM, stream, place]))
        for place in range(len(sources))
    ]
    for place in range(count):
        turn = place % len(sources)
        yield sources[turn], next(parents[turn])


def _reshuffled(candidates: Sequence[TrainRow], rng: np.random.Generator) -> Iterator[TrainRow]:
    """Yield all candidates in random order, without end, reshuffled for every pass."""
    while True:
        for place in rng.permutation(len(candidates)):
            yield candidates[place]


def label_counts(rows: Sequence[PlannedRow], labels: Sequence[str]) -> dict[str, int]:
    """Return the number of rows per class name; `none` counts rows without a label."""
    counted = Counter("none" if row.parent.label is None else labels[row.parent.label] for row in rows)
    return dict(sorted(counted.items()))
