"""`maskloom combine`: one real dataset and synthetic ones -> a combined dataset of the same contract.

Real rows are all kept, split by split and in their order; synthetic rows are added to train alone. Which ones is a matter of the seed and of
their ids: every row has a place in one keyed order, and the first rows of it (of each class, where classes are balanced) are taken. So a
larger share contains a smaller one, and the stages of a schedule are nested.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from maskloom.pipeline import __version__
from maskloom.pipeline.dataset.contract import (
    CONTRACT_FILE,
    PLAN_FILE,
    Contract,
    Description,
    Parent,
)
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, check_dataset_place, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json, sole_maker, value_digest
from maskloom.pipeline.files.formatting import markdown_cell
from maskloom.pipeline.files.ownership import OwnedFolder, check_places, delete_folder
from maskloom.pipeline.files.reading import row_attributes
from maskloom.pipeline.progress import say

ROWS_PER_SHARD = 512
KEY_PREFIX = "combine-"  # of the writer's key: tells a combined dataset, even an unfinished one, from any other
STAGE = "stage-{number}"
MAX_STAGES, MAX_RATIO = 1000, 1e6
SAME = ("channels", "image_size", "buckets", "mask_classes", "palette", "labels", "conditioning")
"""What the rows of one dataset share; a synthetic set takes it from the real one."""


@dataclass(frozen=True)
class CombineOptions:
    """The command line's switches.

    Attributes:
        output: folder of the dataset, or of the stages.
        ratio: synthetic rows for each real train row; None takes all there are, or as many as the balance needs.
        balance: every class gets the same number of train rows.
        schedule: number of stages; None writes one dataset.
        seed: keys the choice.
        force: replace another combination.
    """

    output: Path
    ratio: float | None = None
    balance: bool = False
    schedule: int | None = None
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class SyntheticRow:
    """A row that may be added.

    Attributes:
        set: number of its set on the command line, from 0.
        position: in the set's train split.
        label: index of its class, or None.
        order: its place in the keyed order.
    """

    set: int
    position: int
    label: int | None
    order: str


@dataclass(frozen=True)
class SyntheticSet:
    """A synthetic dataset whose rows may be added.

    Attributes:
        dataset: where they lie.
        prefix: put before its sample ids, where they would repeat another set's; mostly empty.
        labels: of its rows, in order.
        ids: its sample ids, in order.
    """

    dataset: MaskPromptDataset
    prefix: str
    labels: tuple[int | None, ...]
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Combination:
    """One dataset to write: where, the rows that are added, and the settings that it tells."""

    folder: Path
    chosen: tuple[SyntheticRow, ...]
    settings: Mapping[str, Any]
    key: str


def combine(real: Path, synthetic: Sequence[Path], options: CombineOptions) -> list[Contract]:
    """Write a combined dataset, or with a schedule `OUTPUT/stage-1` … `stage-K` whose synthetic share grows from none to the whole.

    Args:
        real: folder of a real dataset.
        synthetic: folders of datasets that were generated from it.
        options: see there.

    Returns:
        The contracts, one per stage.

    Raises:
        MaskLoomError: a dataset is damaged, of another origin, or of another real dataset; an option makes no sense; there are not enough
            synthetic rows; the output folder holds something else, or another process writes there.
    """
    _check_options(options)
    source = _verified_real(real)
    sets = _verified_sets(synthetic, source)
    real_labels = [row["label"] for row in source.rows("train", ["label"])]
    chosen = chosen_rows(real_labels, _ordered_pool(sets, options.seed), source.description.labels, options)
    plans = _plans(source, sets, chosen, options)
    _check_output([real, *synthetic], plans, options)
    with sole_maker(options.output):
        leftovers = _check_output([real, *synthetic], plans, options)  # again: another process may have been there
        contracts = [_written(plan, source, sets, real_labels) for plan in plans]
        for folder in leftovers:
            delete_folder(folder)
    return contracts


def chosen_rows(
    real_labels: Sequence[int | None],
    pool: Sequence[SyntheticRow],
    names: Sequence[str],
    options: CombineOptions,
) -> dict[int | None, list[SyntheticRow]]:
    """Return the rows to add, in the keyed order, under their class where classes are balanced and else all under None.

    Args:
        real_labels: label of every real train row.
        pool: every synthetic row, in the keyed order.
        names: of the labels.
        options: `ratio` and `balance` are read.

    Raises:
        MaskLoomError: there are not enough synthetic rows, or the ratio is too small for the classes to become equal.
    """
    if options.balance:
        return _balanced_rows(real_labels, pool, names, options.ratio)
    if options.ratio is None:
        return {None: list(pool)}
    wanted = round(options.ratio * len(real_labels))
    if wanted > len(pool):
        raise MaskLoomError(
            f"--ratio {options.ratio:g} takes {wanted} synthetic rows for {len(real_labels)} real ones, and there are "
            f"{len(pool)}; generate more (generate.num_images={wanted}), or give --ratio {_floored(len(pool) / len(real_labels))} or less"
        )
    return {None: list(pool[:wanted])}


def _balanced_rows(
    real_labels: Sequence[int | None], pool: Sequence[SyntheticRow], names: Sequence[str], ratio: float | None
) -> dict[int | None, list[SyntheticRow]]:
    if not names or None in real_labels:
        lacking = (
            f"{list(real_labels).count(None)} of the real train rows have none" if names else "the dataset has none"
        )
        raise MaskLoomError(f"--balance needs a class on every train row, and {lacking}; leave --balance out")
    counts = Counter(label for label in real_labels if label is not None)
    target = max(counts.values())
    if ratio is not None:
        target = (len(real_labels) + round(ratio * len(real_labels))) // len(counts)
        if target < max(counts.values()):
            least = (max(counts.values()) * len(counts) - len(real_labels)) / len(real_labels)
            raise MaskLoomError(
                f"--ratio {ratio:g} is too small for --balance: {names[counts.most_common(1)[0][0]]} alone has {max(counts.values())} of "
                f"{len(real_labels)} real train rows; give --ratio {_raised(least)} or more, or leave it out"
            )
    needed = {label: target - counts[label] for label in sorted(counts)}
    rows = {label: [row for row in pool if row.label == label] for label in needed}
    if any(len(rows[label]) < needed[label] for label in needed):
        short = "; ".join(
            f"{names[label]}: {needed[label]} needed, {len(rows[label])} there"
            for label in needed
            if len(rows[label]) < needed[label]
        )
        wanted = json.dumps({names[label]: count for label, count in needed.items() if count}, ensure_ascii=False)
        raise MaskLoomError(
            f"--balance: not enough synthetic rows for {target} train rows a class ({short}); generate with "
            f"{shlex.quote(f'generate.images_per_class={wanted}')}"
        )
    return {label: rows[label][:count] for label, count in needed.items()}


def _check_options(options: CombineOptions) -> None:
    if options.ratio is not None and not 0 < options.ratio <= MAX_RATIO:
        raise MaskLoomError(
            f"--ratio {options.ratio:g}: give a number above 0, at most {MAX_RATIO:g}, such as 1.0 for as many synthetic rows as real ones"
        )
    if options.schedule is not None and not 2 <= options.schedule <= MAX_STAGES:
        raise MaskLoomError(
            f"--schedule {options.schedule}: give 2 stages or more, and at most {MAX_STAGES}, for each is a whole dataset on disk; "
            "the first has no synthetic rows, the last has all"
        )


def _verified_real(folder: Path) -> MaskPromptDataset:
    dataset = verify_fully(folder)
    if dataset.description.origin != "real":
        raise MaskLoomError(f"--real {folder}: a {dataset.description.origin} dataset; give the real one")
    if "train" not in dataset.contract.splits:
        raise MaskLoomError(f"--real {folder}: the train split is empty; there is nothing to add rows to")
    return dataset


def _verified_sets(folders: Sequence[Path], real: MaskPromptDataset) -> list[SyntheticSet]:
    """Return the sets whose rows may be added, their ids told apart from all others."""
    taken = {row["sample_id"] for row in real.rows(columns=["sample_id"])}
    sets: list[SyntheticSet] = []
    for number, folder in enumerate(folders, start=1):
        dataset = verify_fully(folder)
        _check_set(dataset, real)
        if dataset.digest in {one.dataset.digest for one in sets}:
            raise MaskLoomError(f"--synthetic {folder}: these rows are given twice; name each synthetic dataset once")
        rows = [(row["sample_id"], row["label"]) for row in dataset.rows("train", ["sample_id", "label"])]
        prefix = ""
        while taken & {prefix + sample for sample, _ in rows}:
            prefix += f"set{number}-"
        taken |= {prefix + sample for sample, _ in rows}
        sets.append(SyntheticSet(dataset, prefix, tuple(label for _, label in rows), tuple(i for i, _ in rows)))
    return sets


def _check_set(dataset: MaskPromptDataset, real: MaskPromptDataset) -> None:
    """Only rows that were made from the train split of this very dataset may be added: others may know its held-out images."""
    folder, contract, about = dataset.folder, dataset.contract, dataset.description
    if about.origin != "synthetic":
        raise MaskLoomError(f"--synthetic {folder}: a {about.origin} dataset; give those that generate wrote")
    if contract.parent is None or contract.parent.digest != real.digest:
        raise MaskLoomError(
            f"--synthetic {folder}: not made from {real.folder} as it is now, and may know images that are held out there; run generate again"
        )
    held_out = [split for split in contract.split_names if split != "train"]
    if held_out:
        raise MaskLoomError(f"--synthetic {folder}: has rows in {held_out[0]}; synthetic rows may lie in train only")
    other = [key for key in SAME if getattr(about, key) != getattr(real.description, key)]
    if other:
        raise MaskLoomError(
            f"--synthetic {folder}: its {other[0]} is {getattr(about, other[0])}, that of {real.folder} is {getattr(real.description, other[0])}"
        )


def _ordered_pool(sets: Sequence[SyntheticSet], seed: int) -> list[SyntheticRow]:
    """Return every synthetic row in an order that depends on the seed, its set's content and its id alone."""
    pool = []
    for number, one in enumerate(sets):
        for position, (sample, label) in enumerate(zip(one.ids, one.labels, strict=True)):
            key = hashlib.sha256(f"{seed}\0{one.dataset.digest}\0{sample}".encode()).hexdigest()
            pool.append(SyntheticRow(number, position, label, key))
    return sorted(pool, key=lambda row: row.order)


def _plans(
    real: MaskPromptDataset,
    sets: Sequence[SyntheticSet],
    chosen: Mapping[int | None, Sequence[SyntheticRow]],
    options: CombineOptions,
) -> list[Combination]:
    """Return the datasets to write: one, or one per stage, whose share of the chosen rows grows linearly from none to all."""
    stages = options.schedule or 1
    plans = []
    for stage in range(1, stages + 1):
        share = 1.0 if options.schedule is None else (stage - 1) / (stages - 1)
        rows = tuple(row for some in chosen.values() for row in some[: round(share * len(some))])
        settings = {
            "ratio": options.ratio,
            "balance": options.balance,
            "seed": options.seed,
            "stage": None if options.schedule is None else f"{stage} of {stages}",
            "real": real.digest,
            "synthetic": [_set_settings(one) for one in sets],
        }
        folder = options.output if options.schedule is None else options.output / STAGE.format(number=stage)
        key = KEY_PREFIX + value_digest([__version__, settings, sorted((row.set, row.position) for row in rows)])
        plans.append(Combination(folder, rows, settings, key))
    return plans


def _set_settings(one: SyntheticSet) -> dict[str, Any]:
    """Return what the contract states about a set; not where it lies on this machine."""
    generation = one.dataset.description.preprocessing.get("generation", {})
    return {
        "digest": one.dataset.digest,
        "generator": generation.get("generator", "unknown") if isinstance(generation, dict) else "unknown",
        "sample_id_prefix": one.prefix,
    }


def _check_output(inputs: Sequence[Path], plans: Sequence[Combination], options: CombineOptions) -> list[Path]:
    """Refuse every place that holds anything but a combination; return the stages of a longer schedule, which the new one replaces."""
    check_places(
        {("--synthetic" if number else "--real") + f" {folder}": folder for number, folder in enumerate(inputs)},
        [options.output],
    )
    if options.output.exists() and not options.output.is_dir():
        raise MaskLoomError(f"--output {options.output}: a file; give a new or empty folder")
    leftovers = []
    if options.schedule is not None:
        if (options.output / PLAN_FILE).is_file():
            raise MaskLoomError(
                f"--output {options.output}: holds a dataset, and --schedule writes several; give another folder"
            )
        planned = {plan.folder for plan in plans}
        leftovers = [
            p for p in sorted(options.output.glob(STAGE.format(number="*"))) if p not in planned and p.is_dir()
        ]
    for folder, key in [*((plan.folder, plan.key) for plan in plans), *((folder, "") for folder in leftovers)]:
        _check_place(folder, key, options.force)
    for plan in plans:
        check_dataset_place(plan.folder)
    return leftovers


def _check_place(folder: Path, key: str, force: bool) -> None:
    """A folder is written to if it is empty, or the very dataset that is planned, finished or not; with force, any combination."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    plan = folder / PLAN_FILE
    known = read_json(plan, "delete it") if plan.is_file() else None
    there = known.get("key") if isinstance(known, dict) else None
    if not isinstance(there, str) or not there.startswith(KEY_PREFIX) or not OwnedFolder(folder).is_marked():
        raise MaskLoomError(f"--output {folder}: not empty and not a combined dataset; give a new or empty folder")
    if there != key and not force:
        raise MaskLoomError(
            f"--output {folder}: holds another combination; give another folder, or --force to replace it"
        )


def _written(
    plan: Combination, real: MaskPromptDataset, sets: Sequence[SyntheticSet], real_labels: Sequence[int | None]
) -> Contract:
    """Write one dataset, or leave it where it is there already."""
    if there := _intact(plan):
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
    card = _card(description, real, sets, plan, real_labels)
    parent = Parent(path=os.path.relpath(real.folder.resolve(), plan.folder.resolve()), digest=real.digest)
    contract = writer.finish(card, [], value_digest(plan.settings), parent)
    say(f"{plan.folder}: train {rows['train']} rows (real {len(real_labels)}, synthetic {len(plan.chosen)})")
    return contract


def _intact(plan: Combination) -> MaskPromptDataset | None:
    """Return the planned dataset if it was written whole and has not been edited since."""
    if not (plan.folder / CONTRACT_FILE).is_file():
        return None
    if read_json(plan.folder / PLAN_FILE, "delete it") != {"key": plan.key}:
        return None
    dataset = MaskPromptDataset.open(plan.folder)
    return dataset if dataset.changed_file() is None else None


def _samples(split: str, real: MaskPromptDataset, sets: Sequence[SyntheticSet], plan: Combination) -> Iterator[Sample]:
    """Yield the rows of a split, a few in memory at a time: the real ones, then the chosen ones set by set in their order."""
    for row in real.rows(split):
        yield _sample(row, "")
    if split != "train":
        return
    for number, one in enumerate(sets):
        chosen = {row.position for row in plan.chosen if row.set == number}
        for position, row in enumerate(one.dataset.rows("train")):
            if position in chosen:
                yield _sample(row, one.prefix)


def _sample(row: Mapping[str, Any], prefix: str) -> Sample:
    pictures = {name: row[name] and row[name]["bytes"] for name in ("image", "mask", "conditioning_image")}
    attributes = row_attributes(row["attributes"], f"sample {row['sample_id']}")
    return Sample(**{**row, **pictures, "attributes": attributes, "sample_id": prefix + row["sample_id"]})


def _description(about: Description, sets: Sequence[SyntheticSet], plan: Combination) -> Description:
    licences = dict.fromkeys([about.licence, *(one.dataset.description.licence for one in sets)])
    return about.model_copy(
        update={
            "origin": "combined",
            "preprocessing": {**about.preprocessing, "combination": dict(plan.settings)},
            "licence": "; ".join(licences),
        }
    )


def _card(
    about: Description,
    real: MaskPromptDataset,
    sets: Sequence[SyntheticSet],
    plan: Combination,
    real_labels: Sequence[int | None],
) -> str:
    """Return README.md: rows by origin and class, what was added, licence and citation."""
    front = yaml.safe_dump(
        {
            "license": "other",
            "license_name": re.sub(r"[^a-z0-9.]+", "-", about.licence.lower()).strip("-"),
            "tags": ["medical", "maskloom", "mask-and-prompt", "combined", "synthetic"],
        },
        sort_keys=False,
    )
    added = Counter(row.set for row in plan.chosen)
    lines = [
        f"---\n{front}---\n",
        f"# {about.dataset}: real and synthetic rows\n",
        f"{about.modality.capitalize()} images in MaskLoom's mask-and-prompt format: all rows of the real dataset, and synthetic ones in the train"
        " split. `origin` tells them apart. Validation, test and external splits hold real rows only. Synthetic images are not patients.\n",
        "## Train rows\n",
        _class_table(about.labels, real_labels, plan.chosen),
        "## Other splits\n",
        "".join(
            f"- {split}: {real.contract.splits[split].rows} real\n"
            for split in real.contract.split_names
            if split != "train"
        )
        or "None.\n",
        "## Synthetic datasets\n",
        "| generator | rows taken | rows there | licence | digest |\n| --- | --- | --- | --- | --- |\n"
        + "".join(
            f"| {_set_settings(one)['generator']} | {added[number]} | {len(one.ids)} | {markdown_cell(one.dataset.description.licence)} |"
            f" `{one.dataset.digest[:12]}` |\n"
            for number, one in enumerate(sets)
        ),
        f"Ratio: {'as many as there are or are needed' if plan.settings['ratio'] is None else plan.settings['ratio']}; classes balanced: "
        f"{'yes' if plan.settings['balance'] else 'no'}; stage: {plan.settings['stage'] or 'the only one'}; seed {plan.settings['seed']}.\n",
        "## Licence and citation\n",
        f"Real rows: {real.description.licence}. {about.citation}. {about.homepage}".strip() + "\n",
    ]
    return "\n".join(lines)


def _class_table(names: Sequence[str], real_labels: Sequence[int | None], chosen: Sequence[SyntheticRow]) -> str:
    real, synthetic = Counter(real_labels), Counter(row.label for row in chosen)
    labels: list[int | None] = [*range(len(names))]
    if real[None] or synthetic[None]:
        labels.append(None)
    lines = [
        f"| {'no class' if label is None else markdown_cell(names[label])} | {real[label]} | {synthetic[label]} | {real[label] + synthetic[label]} |\n"
        for label in labels
    ]
    total = f"| all | {real.total()} | {synthetic.total()} | {real.total() + synthetic.total()} |\n"
    return "| class | real | synthetic | together |\n| --- | --- | --- | --- |\n" + "".join(lines) + total


def _floored(value: float) -> str:
    """Return a number with two decimals that is not above `value`."""
    return f"{math.floor(value * 100) / 100:g}"


def _raised(value: float) -> str:
    """Return a number with two decimals that is not below `value`."""
    return f"{math.ceil(value * 100) / 100:g}"
