"""`prepare`: raw dataset -> mask-and-prompt dataset.

Two passes over the raw images. The first decodes and checks each one and keeps a signature on disk; near-duplicates, groups and
splits follow from that. The second writes the shards that are not there yet. Memory holds the list of images and the pixels of a few.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.adapter import DatasetAdapter, DatasetInfo, RawItem, Reject
from data_prep.card import dataset_card
from data_prep.grouping import Row, consistent_rows
from data_prep.near_duplicates import METHOD, near_duplicate_clusters
from data_prep.parallel import ordered_map
from data_prep.resizing import resized
from data_prep.splitting import Group, split_of_groups
from data_prep.survey import survey_samples
from pipeline.conditioning import conditioning_image
from pipeline.config import DataConfig, ExperimentConfig
from pipeline.config_loading import validated
from pipeline.contract import CONTRACT_FILE, SPLITS, DatasetWriter, Description, Sample, plan_shards
from pipeline.errors import MaskLoomError, RejectedSample
from pipeline.files import remove_folder, value_digest
from pipeline.plugins import load_plugin
from pipeline.progress import Advance, progress
from pipeline.prompts import mask_attributes, render_prompt
from pipeline.runs import Run, Stage, open_run

PACKAGE = "data_prep.datasets"
SCRATCH = ".prepare"
Splits = Mapping[str, Sequence[Row]]


def prepare(config: ExperimentConfig, force: bool) -> None:
    """Write the mask-and-prompt dataset of an experiment to `RUN/dataset`.

    Raises:
        MaskLoomError: the raw folder or an option is wrong, or no usable image remains.
    """
    adapter = open_adapter(config.data)
    info = adapter.info()
    run = open_run(config)
    stage = Stage(run, "prepare", {"raw": adapter.fingerprint()}, _settings(config), [run.dataset / CONTRACT_FILE])
    if stage.skips(force):
        return
    with stage.recorded() as results:
        _clear_leftovers(run)
        rows, rejected = _usable_rows(adapter, info, config.data, run)
        splits = _rows_by_split(rows, config)
        writer = _writer(run.dataset, info, config, splits, stage.key)
        writer.prepare_folder()
        _write_shards(writer, adapter, info, splits)
        ledger = [{"path": _shown_path(reject.path, adapter.raw_dir), "reason": reject.reason} for reject in rejected]
        card = dataset_card(
            writer.description, _label_counts(splits), _group_counts(splits), [row["reason"] for row in ledger]
        )
        contract = writer.finish(card, ledger, stage.config_hash, parent=None)
        results.update(rows={split: part.rows for split, part in contract.splits.items()}, rejected=contract.rejected)


def open_adapter(data: DataConfig) -> DatasetAdapter:
    """Return the adapter that a configuration names, with its options checked.

    Raises:
        MaskLoomError: the dataset is unknown, an option is wrong, or the raw folder is missing.
    """
    adapter: type[DatasetAdapter] = load_plugin(PACKAGE, data.dataset, "dataset").Adapter
    return adapter(data.raw_dir, validated(data.options, adapter.Options, "data.options"))


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return what the dataset depends on; not the place of the raw folder, whose content has a fingerprint."""
    return {"data": config.data.model_dump(mode="json", exclude={"raw_dir"}), "seed": config.seed}


def _clear_leftovers(run: Run) -> None:
    """Remove what a killed run left beside the dataset, and a whole dataset: it is of other inputs, edited, or forced anew."""
    if (run.dataset / CONTRACT_FILE).is_file():
        remove_folder(run.dataset)
    for folder in (*run.folder.glob(f".{run.dataset.name}.*.doomed"), run.folder / SCRATCH):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _scratch_folder(run: Run) -> Iterator[Path]:
    """Yield an empty folder on the disk of the run, and delete it afterwards."""
    folder = run.folder / SCRATCH
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _usable_rows(
    adapter: DatasetAdapter, info: DatasetInfo, data: DataConfig, run: Run
) -> tuple[list[Row], list[Reject]]:
    """Return the rows of the dataset in scan order, each with its group, and everything that is left out.

    Raises:
        MaskLoomError: nothing is usable.
    """
    with _scratch_folder(run) as scratch:
        signatures = scratch / "signatures.bin"
        survey = survey_samples(adapter, info, signatures)
        clusters = list(range(len(survey.items)))
        if info.duplicates == "near" and survey.items:
            clusters = near_duplicate_clusters(signatures, survey.digests, data.near_duplicate_correlation)
    rows, inconsistent = consistent_rows(survey.items, clusters)
    rejected = survey.rejected + inconsistent
    if not rows:
        first = rejected[0]
        raise MaskLoomError(
            f"no usable image among {len(rejected)}; the first, {first.path}: {first.reason}; check data.raw_dir"
        )
    return rows, rejected


def _rows_by_split(rows: Sequence[Row], config: ExperimentConfig) -> dict[str, list[Row]]:
    """Return the rows of each split, in an order that mixes classes and sources and depends on nothing but the ids."""
    members: dict[str, list[RawItem]] = defaultdict(list)
    for row in rows:
        members[row.group].append(row.item)
    split_of = split_of_groups(
        [_group(name, items) for name, items in members.items()], config.data.splits, config.seed
    )
    mixed = sorted(rows, key=lambda row: value_digest(row.item.sample_id))
    return {split: [row for row in mixed if split_of[row.group] == split] for split in SPLITS}


def _group(name: str, items: Sequence[RawItem]) -> Group:
    """Return a group for splitting; its class is the most frequent one (a patient may have lesions of several)."""
    label = Counter(item.label for item in items).most_common(1)[0][0]
    return Group(name, len(items), label, next((item.split for item in items if item.split), None))


def _writer(folder: Path, info: DatasetInfo, config: ExperimentConfig, splits: Splits, stage_key: str) -> DatasetWriter:
    shards = plan_shards({split: len(rows) for split, rows in splits.items()}, config.data.rows_per_shard)
    ids = {split: [(row.item.sample_id, row.group) for row in rows] for split, rows in splits.items()}
    return DatasetWriter(folder, _description(info, config), shards, value_digest([stage_key, ids]))


def _description(info: DatasetInfo, config: ExperimentConfig) -> Description:
    data = config.data
    near_duplicates = (
        {"method": METHOD, "correlation": data.near_duplicate_correlation} if info.duplicates == "near" else None
    )
    return Description(
        dataset=data.dataset,
        origin="real",
        modality=info.modality,
        channels=info.channels,
        image_size=data.image_size,
        mask_classes=info.mask_classes,
        palette=info.palette,
        labels=info.labels,
        prompt_templates=info.prompt_templates,
        conditioning=data.conditioning,
        preprocessing={
            "resize_mode": data.resize_mode,
            "resampling": "image: antialiased bicubic; mask: nearest neighbour",
            "near_duplicates": near_duplicates,
            "splits": data.splits.model_dump(),
            "seed": config.seed,
            "options": data.options,
        },
        licence=info.licence,
        citation=info.citation,
        homepage=info.homepage,
    )


def _write_shards(writer: DatasetWriter, adapter: DatasetAdapter, info: DatasetInfo, splits: Splits) -> None:
    missing = writer.missing_shards()
    total = sum(len(rows) for rows in splits.values())
    done = total - sum(shard.stop - shard.start for shard in missing)
    with progress("writing rows", total, "rows", done) as advance:
        for shard in missing:
            rows = splits[shard.split][shard.start : shard.stop]
            samples = ordered_map(partial(_sample, adapter, info, writer.description), rows)
            writer.write_shard(shard, _counted(samples, advance))


def _counted(samples: Iterator[Sample], advance: Advance) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        advance()


def _sample(adapter: DatasetAdapter, info: DatasetInfo, about: Description, row: Row) -> Sample:
    """Decode, resize and describe one row.

    Raises:
        MaskLoomError: the sample, readable before, no longer is.
    """
    item = row.item
    try:
        raw = adapter.load(item)
    except RejectedSample as error:
        raise MaskLoomError(
            f"{item.path}: changed while it was being prepared ({error}); run the same command again"
        ) from error
    image, mask = resized(raw, about.image_size, about.preprocessing["resize_mode"], info.channels)
    label = {"label": item.label} if item.label is not None else {}
    values = {"modality": info.modality, **label, **mask_attributes(mask, info.mask_classes), **item.attributes}
    return Sample(
        image=image,
        mask=mask,
        conditioning_image=conditioning_image(mask, image, about.conditioning, info.palette),
        text=render_prompt(info.prompt_templates, item.sample_id, values),
        label=None if item.label is None else info.labels.index(item.label),
        sample_id=item.sample_id,
        group_id=row.group,
        source=about.dataset,
        origin=about.origin,
        attributes=values,
    )


def _shown_path(path: str, raw_dir: Path | None) -> str:
    """Return a raw path relative to the raw folder, so that a published ledger does not tell where the folder was."""
    return str(Path(path).relative_to(raw_dir)) if raw_dir and Path(path).is_relative_to(raw_dir) else path


def _label_counts(splits: Splits) -> dict[str, Counter[str]]:
    return {split: Counter(row.item.label or "none" for row in rows) for split, rows in splits.items()}


def _group_counts(splits: Splits) -> dict[str, int]:
    return {split: len({row.group for row in rows}) for split, rows in splits.items()}
