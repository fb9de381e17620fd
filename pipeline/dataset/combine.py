"""`maskloom combine`: a real dataset and synthetic ones -> a combined dataset, in the same format.

All real rows are kept, split by split and in their order; synthetic rows are added to train alone.
Seed and ids decide which ones: every row has a place in one keyed order, and its first rows (of
each class, where classes are balanced) are taken. So a larger share contains a smaller one, and the
stages of a schedule are nested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.combining.card import combination_card
from maskloom.pipeline.dataset.combining.choice import chosen_rows
from maskloom.pipeline.dataset.combining.plan import (
    Combination,
    CombineOptions,
    check_options,
    check_output,
    intact_dataset,
    planned_datasets,
)
from maskloom.pipeline.dataset.combining.sets import SyntheticSet, ordered_pool, positions_of, verified_sets
from maskloom.pipeline.dataset.contract import Contract, Description, Parent
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.held_out_images import require_no_held_out_images
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import sole_maker, value_digest
from maskloom.pipeline.files.ownership import delete_folder
from maskloom.pipeline.files.reading import row_attributes
from maskloom.pipeline.progress import say

ROWS_PER_SHARD = 512


def combine(real: Path, synthetic: Sequence[Path], options: CombineOptions) -> list[Contract]:
    """Write a combined dataset, or with a schedule one per stage.

    The stages lie in `OUTPUT/stage-1` … `stage-K`; their synthetic share grows from none to all.

    Args:
        real: folder of a real dataset.
        synthetic: folders of datasets that were generated from it.
        options: see `CombineOptions`.

    Returns:
        The contracts, one per stage.

    Raises:
        MaskLoomError: a dataset is damaged, of another origin, or of another real dataset; a
            synthetic image is a copy of a held-out one; an option makes no sense; there are not enough synthetic rows; the output folder holds
            something else, or another process writes there.
    """
    check_options(options)
    source = verified_real(real)
    sets = verified_sets(synthetic, source)
    real_labels = [row["label"] for row in source.rows("train", ["label"])]
    pool = ordered_pool(sets, options.seed)
    chosen = chosen_rows(real_labels, pool, source.description.labels, options.ratio, options.balance)
    plans = planned_datasets(source, sets, chosen, options)
    check_output([real, *synthetic], plans, options)
    require_no_held_out_images(source, [one.dataset for one in sets])
    with sole_maker(options.output):
        leftovers = check_output([real, *synthetic], plans, options)  # again: another process may have been there
        contracts = [_written(plan, source, sets, real_labels) for plan in plans]
        for folder in leftovers:
            delete_folder(folder)
    return contracts


def verified_real(folder: Path) -> MaskPromptDataset:
    """Return the real dataset that rows are added to.

    Raises:
        MaskLoomError: it is damaged, not real, or has no train rows.
    """
    dataset = verify_fully(folder)
    if dataset.description.origin != "real":
        raise MaskLoomError(f"--real {folder}: a {dataset.description.origin} dataset; give the real one")
    if "train" not in dataset.contract.splits:
        raise MaskLoomError(f"--real {folder}: the train split is empty; there is nothing to add rows to")
    return dataset


def _written(
    plan: Combination, real: MaskPromptDataset, sets: Sequence[SyntheticSet], real_labels: Sequence[int | None]
) -> Contract:
    """Write one dataset, or leave it where it is there already."""
    if there := intact_dataset(plan):
        say(f"{plan.folder}: up to date")
        return there.contract
    description = _description(real.description, sets, plan)
    rows = {split: real.contract.splits[split].rows for split in real.contract.split_names}
    rows["train"] += len(plan.chosen)
    shards = plan_shards(rows, ROWS_PER_SHARD)
    writer = DatasetWriter(plan.folder, description, shards, plan.key)
    writer.prepare_folder()
    missing = set(writer.missing_shards())
    for split in rows:
        samples = _samples(split, real, sets, plan)
        for shard in (shard for shard in shards if shard.split == split):
            some = islice(samples, shard.stop - shard.start)
            if shard in missing:
                writer.write_shard(shard, some)
            else:
                for _ in some:  # written before an interruption: only pass over its rows
                    pass
    card = combination_card(description, real, sets, plan, real_labels)
    parent = Parent(path=os.path.relpath(real.folder.resolve(), plan.folder.resolve()), digest=real.digest)
    rejected = [
        {"path": one.prefix + sample, "reason": f"copy of the training image {original}"}
        for one in sets
        for sample, original in one.left_out.items()
    ]
    contract = writer.finish(card, rejected, value_digest(plan.settings), parent)
    say(f"{plan.folder}: train {rows['train']} rows (real {len(real_labels)}, synthetic {len(plan.chosen)})")
    return contract


def _description(about: Description, sets: Sequence[SyntheticSet], plan: Combination) -> Description:
    licences = dict.fromkeys([about.licence, *(one.dataset.description.licence for one in sets)])
    return about.model_copy(
        update={
            "origin": "combined",
            "preprocessing": {**about.preprocessing, "combination": dict(plan.settings)},
            "licence": "; ".join(licences),
        }
    )


def _samples(split: str, real: MaskPromptDataset, sets: Sequence[SyntheticSet], plan: Combination) -> Iterator[Sample]:
    """Yield the rows of a split, a few in memory at a time.

    The real ones come first, then the chosen ones, set by set in their order.
    """
    for row in real.rows(split):
        yield _sample(row, "")
    if split != "train":
        return
    for number, one in enumerate(sets):
        chosen = positions_of(plan.chosen, number)
        for position, row in enumerate(one.dataset.rows("train")):
            if position in chosen:
                yield _sample(row, one.prefix)


def _sample(row: Mapping[str, Any], prefix: str) -> Sample:
    """Return a stored row, its images as PNG bytes, with a prefix before its id."""
    pictures = {name: row[name] and row[name]["bytes"] for name in ("image", "mask", "conditioning_image")}
    attributes = row_attributes(row["attributes"], f"sample {row['sample_id']}")
    return Sample(**{**row, **pictures, "attributes": attributes, "sample_id": prefix + row["sample_id"]})
