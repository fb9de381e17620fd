"""`prepare`: raw dataset -> mask-and-prompt dataset.

First, every raw image, volume and slide is read by several processes or several jobs, in parts that
are kept on disk (`data_prep.parts`). Then near-duplicates, groups and splits are computed
(`data_prep.rows`), and the missing shards are written from the parts. Memory holds the list of
samples and the pixels of a few.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from maskloom.data_prep.adapter import Reject
from maskloom.data_prep.card import dataset_card
from maskloom.data_prep.description import describe_dataset
from maskloom.data_prep.inputs import dataset_settings, input_digests, input_places
from maskloom.data_prep.item_log import write_item_log
from maskloom.data_prep.left_out import left_out_summary
from maskloom.data_prep.parts import Part, Reading, clear_parts, read_part, scanned_parts, stored_samples
from maskloom.data_prep.rows import RowsBySplit, rows_by_split, usable_rows
from maskloom.data_prep.small_classes import small_classes_summary
from maskloom.data_prep.sources import open_sources, shown_path
from maskloom.data_prep.transparency import transparency_summary, transparent_images
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import LEDGER_FILE, Contract, Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import DatasetWriter, check_dataset_place, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, check_places
from maskloom.pipeline.parallel import parallel_results, worker_count
from maskloom.pipeline.progress import progress, say
from maskloom.pipeline.runs.run import CONFIG_FILE
from maskloom.pipeline.runs.sample_files import write_sample_files
from maskloom.pipeline.runs.stage import Stage, open_run

SCRATCH = ".prepare"


class Shard(NamedTuple):
    """One of `of` jobs that read the raw data together; `number` counts from 1."""

    number: int
    of: int


def prepare(config: ExperimentConfig, force: bool, shard: Shard | None = None, merge: bool = False) -> None:
    """Write the mask-and-prompt dataset of an experiment to `RUN/dataset`.

    Args:
        config: the experiment.
        force: read and write everything again.
        shard: read only the parts of this job, and write no dataset.
        merge: read nothing; write the dataset from the parts read by the shards.

    Raises:
        MaskLoomError: the raw folder or an option is wrong, no usable image remains, or a shard has
            not finished.
    """
    sources = open_sources(config.data)
    stain_reference = config.data.stain.reference if config.data.stain else None
    run = open_run(config)
    scratch, logs = run.folder / SCRATCH, run.logs("prepare")
    check_places(input_places(sources, stain_reference), [run.dataset, scratch, logs, run.folder / CONFIG_FILE])
    stage = Stage(run, "prepare", input_digests(sources, stain_reference), dataset_settings(config), [run.dataset])
    if stage.skips(force):
        return
    reading = Reading(scratch / stage.key[:16], sources, config.data)
    if shard is not None:
        read_shard(reading, shard, force)
        return
    check_dataset_place(run.dataset)
    with stage.recorded() as results:
        # Parts of other inputs or settings go; an interrupted run with these ones continues.
        clear_parts(scratch, keep=reading.folder if merge or not force else None)
        parts = scanned_parts(sources)
        if merge:
            require_all_read(parts, reading.folder)
        else:
            read_missing(reading, parts)
        usable = usable_rows(reading, parts)
        splits = rows_by_split(usable, config)
        rejects = [Reject(shown_path(reject.path, sources), reject.reason) for reject in usable.rejected]
        description = describe_dataset(sources, config, usable.threshold)
        contract = _write_dataset(stage, reading, description, splits, rejects, force)
        results.update(rows={split: part.rows for split, part in contract.splits.items()}, rejected=contract.rejected)
        write_item_log(logs / "items.jsonl", reading.folder, parts, sources)
        kept = (row.item for rows in splits.values() for row in rows)
        write_sample_files(run.dataset, ((one.sample_id, shown_path(one.path, sources)) for one in kept))
        _report_truncated_prompts(config, MaskPromptDataset(run.dataset, contract))
        small_classes = small_classes_summary(reading.folder, parts, config.data.resize_mode)
        transparent = transparent_images(reading.folder, parts, sources)
        results.update({"transparent": transparent} if transparent else {})
        clear_parts(scratch)
    left_out = left_out_summary(rejects, sum(map(len, splits.values())), run.dataset / LEDGER_FILE)
    rows = ", ".join(f"{split} {contract.splits[split].rows}" for split in contract.split_names)
    told = f"prepare: wrote {run.dataset} ({rows} rows)"
    for summary in filter(None, (left_out, small_classes, transparency_summary(transparent), told)):
        say(summary)


def read_shard(reading: Reading, shard: Shard, force: bool) -> None:
    """Read the parts of one job; jobs run concurrently, so each one removes only its own parts."""
    parts = scanned_parts(reading.sources)[shard.number - 1 :: shard.of]
    if force:
        for part in parts:
            part.forget(reading.folder)
    read_missing(reading, parts)
    say(f"prepare: shard {shard.number}/{shard.of} has read its {len(parts)} part(s); `merge` writes the dataset")


def read_missing(reading: Reading, parts: Sequence[Part]) -> None:
    """Read the parts that have not been read yet, in several processes."""
    OwnedFolder(reading.folder).claim()
    missing = [part for part in parts if not part.is_done(reading.folder)]
    total, left = (sum(len(part.entries) for part in some) for some in (parts, missing))
    workers = worker_count(len(missing), reading.data.num_workers)
    samples = 0
    with progress("reading raw images", total, "files", total - left) as advance:
        for size, usable in parallel_results(partial(read_part, reading), missing, workers):
            samples += usable
            advance(size, note=f"{samples} samples")


def require_all_read(parts: Sequence[Part], folder: Path) -> None:
    """Check that no part is missing.

    Raises:
        MaskLoomError: names the first missing part.
    """
    missing = [part.number for part in parts if not part.is_done(folder)]
    if missing:
        raise MaskLoomError(
            f"{len(missing)} of {len(parts)} parts have not been read (the first: {missing[0]}), or were read with another "
            "configuration or from other raw files; run the shards that did not finish again, or run without --shard to read the rest here"
        )


def _write_dataset(
    stage: Stage,
    reading: Reading,
    description: Description,
    splits: RowsBySplit,
    rejects: Sequence[Reject],
    force: bool,
) -> Contract:
    """Write the shards that are missing, then card, ledger and contract."""
    ids = {split: [(row.item.sample_id, row.group) for row in rows] for split, rows in splits.items()}
    shards = plan_shards({split: len(rows) for split, rows in splits.items()}, reading.data.rows_per_shard)
    writer = DatasetWriter(stage.run.dataset, description, shards, value_digest([stage.key, ids]))
    writer.prepare_folder(from_scratch=force)
    missing = writer.missing_shards()
    total = sum(map(len, splits.values()))
    with progress("writing rows", total, "rows", total - sum(shard.stop - shard.start for shard in missing)) as advance:
        for shard in missing:
            rows = splits[shard.split][shard.start : shard.stop]
            writer.write_shard(shard, stored_samples(reading, rows, advance))
    labels = {split: Counter(row.item.label or "none" for row in rows) for split, rows in splits.items()}
    groups = {split: len({row.group for row in rows}) for split, rows in splits.items()}
    card = dataset_card(description, labels, groups, [reject.reason for reject in rejects])
    return writer.finish(card, map(asdict, rejects), stage.config_hash, parent=None)


def _report_truncated_prompts(config: ExperimentConfig, dataset: MaskPromptDataset) -> None:
    """Report the prompts that the text encoder truncates, if the backbone is on this machine."""
    if config.train is None or not Path(config.train.pretrained_model_name_or_path).is_dir():
        return
    from maskloom.models.stable_diffusion.prompt_encoding import (
        load_prompt_encoder,
        report_truncation,
        training_prompts,
    )

    try:
        encoder = load_prompt_encoder(config.train)
    except MaskLoomError:  # the dataset is complete; training reports problems of the backbone
        return
    report_truncation("prepare", encoder, training_prompts(dataset))
