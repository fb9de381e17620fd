"""`prepare`: raw dataset -> mask-and-prompt dataset.

First, every raw image, volume and slide is read by several processes or several jobs, in parts that
are kept on disk (`data_prep.parts`). Then near-duplicates, groups and splits are computed, and the
missing shards are written from the parts. Memory holds the list of samples and the pixels of a few.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Reject
from maskloom.data_prep.card import dataset_card
from maskloom.data_prep.left_out import group_by_reason, left_out_summary
from maskloom.data_prep.parallel import parallel_results, worker_count
from maskloom.data_prep.parts import (
    SIGNATURES,
    Part,
    Reading,
    clear_parts,
    found_samples,
    read_part,
    row_sample,
    scanned_parts,
    without_taken_ids,
)
from maskloom.data_prep.readers.file_names import printable
from maskloom.data_prep.small_classes import small_classes_summary
from maskloom.data_prep.splitting.groups import Found, Grouping, Row, consistent_rows, joined, without_seen
from maskloom.data_prep.splitting.near_duplicates import METHOD, RECORD, Threshold, find_near_duplicates
from maskloom.data_prep.splitting.splits import Group, split_of_groups
from maskloom.data_prep.survey import Source
from maskloom.pipeline.config.data import DataConfig, ExternalConfig
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.dataset.contract import EXTERNAL_PREFIX, LEDGER_FILE, SPLITS, Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, check_dataset_place, plan_shards
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import file_digest, value_digest, write_text
from maskloom.pipeline.files.ownership import OwnedFolder, check_places
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.progress import Advance, progress, say
from maskloom.pipeline.runs.run import CONFIG_FILE, Run
from maskloom.pipeline.runs.stage import Stage, open_run

PACKAGE = "maskloom.data_prep.datasets"
SCRATCH = ".prepare"
SHOWN_GROUPS = 5  # merged groups to name in the report
Splits = Mapping[str, Sequence[Row]]


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
    run = open_run(config)
    _check_places(run, sources, config.data)
    stage = Stage(run, "prepare", _inputs(sources, config.data), _settings(config), [run.dataset])
    if stage.skips(force):
        return
    reading = Reading(run.folder / SCRATCH / stage.key[:16], sources, config.data)
    if shard is not None:
        _read_shard(reading, shard, force)
        return
    check_dataset_place(run.dataset)
    with stage.recorded() as results:
        _clear_leftovers(run, reading.folder, keep_parts=merge or not force)
        parts = scanned_parts(sources)
        if merge:
            _require_all(parts, reading.folder)
        else:
            _read_missing(reading, parts)
        rows, rejected, joins = _usable_rows(reading, parts)
        splits = _checked_splits(rows, rejected, config)
        writer = _writer(run.dataset, _description(sources, config, joins), config, splits, stage.key)
        writer.prepare_folder(afresh=force)
        _write_shards(writer, reading, splits)
        ledger = [{"path": _shown_path(reject.path, sources), "reason": reject.reason} for reject in rejected]
        card = dataset_card(
            writer.description, _label_counts(splits), _group_counts(splits), [row["reason"] for row in ledger]
        )
        contract = writer.finish(card, ledger, stage.config_hash, parent=None)
        results.update(rows={split: part.rows for split, part in contract.splits.items()}, rejected=contract.rejected)
        _note_items(run, reading, parts)
        _report_truncated_prompts(config, MaskPromptDataset(run.dataset, contract))
        small_classes = small_classes_summary(reading.folder, parts)
        clear_parts(run.folder / SCRATCH)
    rows_written = sum(part.rows for part in contract.splits.values())
    if told := left_out_summary([Reject(**row) for row in ledger], rows_written, run.dataset / LEDGER_FILE):
        say(told)
    if small_classes:
        say(small_classes)


def _report_truncated_prompts(config: ExperimentConfig, dataset: MaskPromptDataset) -> None:
    """Report the prompts that the text encoder truncates, if the backbone is on this machine."""
    if config.train is None or not Path(config.train.pretrained_model_name_or_path).is_dir():
        return
    from maskloom.models.stable_diffusion.prompt_encoding import load_prompt_encoder, tell_cuts, training_prompts

    try:
        encoder = load_prompt_encoder(config.train)
    except MaskLoomError:  # the dataset is complete; training reports problems of the backbone
        return
    tell_cuts("prepare", encoder, training_prompts(dataset))


def open_adapter(data: DataConfig) -> DatasetAdapter:
    """Return the configured adapter with validated options.

    Raises:
        MaskLoomError: the dataset is unknown, an option is wrong, or the raw folder is missing.
    """
    return _adapter(data.dataset, data.raw_dir, data.options, "data.options")


def open_sources(data: DataConfig) -> tuple[Source, ...]:
    """Return the main dataset and the external ones.

    Raises:
        MaskLoomError: as for `open_adapter`; or the mask classes of an external dataset differ from
            those of the main one, or the dataset lacks what the conditioning needs.
    """
    adapter = open_adapter(data)
    info = adapter.info()
    _check_conditioning(data, info)
    duplicates = data.duplicates or info.duplicates
    main = Source(data.dataset, adapter, info, info.labels, duplicates, has_signatures=duplicates == "near")
    external = [_external_source(name, section, main) for name, section in data.external.items()]
    _check_intensity(data, [main, *external])
    return (main, *external)


def _adapter(name: str, raw_dir: Path | None, options: dict[str, Any], where: str) -> DatasetAdapter:
    adapter: type[DatasetAdapter] = load_plugin(PACKAGE, name, "dataset").Adapter
    return adapter(raw_dir, validated(options, adapter.Options, where))


def _external_source(name: str, section: ExternalConfig, main: Source) -> Source:
    where = f"data.external.{name}"
    if name == main.name:
        raise MaskLoomError(f"{where}: this is the main dataset; name another one")
    try:
        adapter = _adapter(name, section.raw_dir, section.options, f"{where}.options")
    except MaskLoomError as error:
        raise MaskLoomError(str(error).replace("data.raw_dir", f"{where}.raw_dir")) from None
    info = adapter.info()
    if info.mask_classes != main.info.mask_classes:
        raise MaskLoomError(
            f"{where}: its mask classes ({', '.join(info.mask_classes)}) are not those of {main.name} "
            f"({', '.join(main.info.mask_classes)}); set {where}=false, or prepare it as a separate experiment"
        )
    near = "near" in (main.duplicates, info.duplicates)
    return Source(name, adapter, info, main.labels, info.duplicates, f"{EXTERNAL_PREFIX}{name}", has_signatures=near)


def _check_conditioning(data: DataConfig, info: DatasetInfo) -> None:
    if data.conditioning in ("mask", "both") and len(info.mask_classes) < 2:
        raise MaskLoomError(
            f"data.conditioning={data.conditioning} needs masks and {data.dataset} has none; "
            "set data.conditioning=edges or data.conditioning=foreground"
        )
    if data.conditioning == "image" and info.paired_image is None:
        raise MaskLoomError(
            f"data.conditioning=image needs a second image of every sample and {data.dataset} has none; "
            "set data.conditioning=mask or data.conditioning=edges"
        )


def _check_intensity(data: DataConfig, sources: Sequence[Source]) -> None:
    """Check that `data.intensity` is not set for a dataset with its own window.

    Such a dataset may return values that are no longer in raw units.

    Raises:
        MaskLoomError: names the dataset and its own option.
    """
    for source in sources:
        if data.intensity is not None and "window" in source.adapter.Options.model_fields:
            options = f"data.external.{source.name}.options" if source.split else "data.options"
            raise MaskLoomError(
                f"data.intensity: {source.name} has its own window on the raw values; set data.intensity=null and {options}.window"
            )


def _inputs(sources: Sequence[Source], data: DataConfig) -> dict[str, str]:
    """Return a digest of each input."""
    inputs = {source.split or "raw": source.adapter.fingerprint() for source in sources}
    if data.stain is not None and data.stain.reference is not None:
        path = data.stain.reference
        if not path.is_file():
            raise MaskLoomError(f"data.stain.reference={path}: no such file; give an image of the stain to imitate")
        inputs["stain_reference"] = file_digest(path)
    return inputs


def _settings(config: ExperimentConfig) -> dict[str, Any]:
    """Return the settings that the dataset depends on.

    Not the location of the raw files, whose content has a fingerprint, nor the number of workers.
    """
    places = {"raw_dir": True, "num_workers": True, "stain": {"reference"}}
    data = config.data.model_dump(mode="json", exclude=places)  # type: ignore[arg-type]
    data["external"] = {name: section.options for name, section in config.data.external.items()}
    if not config.data.buckets:  # keeps the key of datasets of a single size
        del data["buckets"]
    data["options"] = {name: _ordered(value) for name, value in data["options"].items()}
    return {"data": data, "seed": config.seed}


def _ordered(option: Any) -> Any:
    """Return an option whose digest depends on the order of its keys, the order of mask classes."""
    if not isinstance(option, dict) or list(map(str, option)) == sorted(map(str, option)):
        return option
    return [[str(key), value] for key, value in option.items()]


def _check_places(run: Run, sources: Sequence[Source], data: DataConfig) -> None:
    """Check that no raw folder lies inside an output of the stage, or the other way round.

    Raises:
        MaskLoomError: names the key and both paths.
    """
    inputs = {
        "data.raw_dir" if not source.split else f"data.external.{source.name}.raw_dir": source.adapter.raw_dir
        for source in sources
    }
    if data.stain is not None:
        inputs["data.stain.reference"] = data.stain.reference
    check_places(inputs, [run.dataset, run.folder / SCRATCH, run.logs("prepare"), run.folder / CONFIG_FILE])


def _clear_leftovers(run: Run, parts_folder: Path, keep_parts: bool) -> None:
    """Remove parts of an interrupted run: those of other inputs or settings, or all of them."""
    clear_parts(run.folder / SCRATCH, keep=parts_folder if keep_parts else None)


def _read_shard(reading: Reading, shard: Shard, force: bool) -> None:
    """Read the parts of one job; jobs run concurrently, so each one removes only its own parts."""
    parts = scanned_parts(reading.sources)[shard.number - 1 :: shard.of]
    if force:
        for part in parts:
            part.forget(reading.folder)
    _read_missing(reading, parts)
    say(f"prepare: shard {shard.number}/{shard.of} has read its {len(parts)} part(s); `merge` writes the dataset")


def _read_missing(reading: Reading, parts: Sequence[Part]) -> None:
    """Read the parts that have not been read yet, in several processes."""
    OwnedFolder(reading.folder).claim()
    missing = [part for part in parts if not part.is_done(reading.folder)]
    total, left = (sum(len(part.entries) for part in some) for some in (parts, missing))
    workers = worker_count(len(missing), reading.data.num_workers)
    samples = 0
    with progress("reading raw images", total, "files", total - left) as advance:
        for size, usable in parallel_results(partial(_read, reading), missing, workers):
            samples += usable
            advance(size, note=f"{samples} samples")


def _read(reading: Reading, part: Part) -> tuple[int, int]:
    """Read a part; return its number of items and its number of usable samples."""
    return len(part.entries), read_part(reading, part)


def _require_all(parts: Sequence[Part], folder: Path) -> None:
    missing = [part.number for part in parts if not part.is_done(folder)]
    if missing:
        raise MaskLoomError(
            f"{len(missing)} of {len(parts)} parts have not been read (the first: {missing[0]}), or were read with another "
            "configuration or from other raw files; run the shards that did not finish again, or run without --shard to read the rest here"
        )


def _usable_rows(reading: Reading, parts: Sequence[Part]) -> tuple[list[Row], list[Reject], Threshold | None]:
    """Return the rows of the dataset with their groups, the rejects, and the duplicate threshold.

    Raises:
        MaskLoomError: no sample is usable, or near-duplicates cannot be distinguished from
            unrelated images.
    """
    sources = reading.sources
    found, rejected = found_samples(reading.folder, parts, sources)
    found, taken = without_taken_ids(found)
    main = [sample for sample in found if sample.source == 0]
    clusters, joins = _clusters(reading, main)
    grouping = consistent_rows(main, clusters)
    rows, united = grouping.rows, grouping.united
    rejected += taken + grouping.rejected
    if not rows:
        raise _nothing_usable(sources[0], rejected)
    if len(sources) > 1:
        fresh, seen = without_seen(found, _clusters(reading, found)[0])
        rejected += seen
        for index, source in enumerate(sources[1:], start=1):
            members = [(sample, cluster) for sample, cluster in fresh if sample.source == index]
            if source.duplicates != "near":  # near-duplicates are searched for only against the main dataset
                samples = [sample for sample, _ in members]
                members = list(zip(samples, _identical_clusters(samples), strict=True))
            external = consistent_rows(*zip(*members, strict=True)) if members else Grouping([], [], [])
            rejected += external.rejected
            if not external.rows:
                raise _nothing_usable(source, rejected)
            rows += external.rows
            united += external.united
    _report_duplicates(sources, united)
    return rows, rejected, joins


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


def _nothing_usable(source: Source, rejected: Sequence[Reject]) -> MaskLoomError:
    where = f"data.external.{source.name}.raw_dir" if source.split else "data.raw_dir"
    raw_dir = source.adapter.raw_dir
    rejected = [reject for reject in rejected if not source.split or _lies_in(raw_dir, reject.path)]
    if not rejected:
        return MaskLoomError(f"{where}={raw_dir}: no image found for {source.name}; give the folder of the raw dataset")
    first = rejected[0]
    return MaskLoomError(
        f"no usable image of {source.name} among {len(rejected)}; the first, {first.path}: {first.reason}; check {where}"
    )


def _clusters(reading: Reading, found: Sequence[Found]) -> tuple[list[int], Threshold | None]:
    """Return the duplicate cluster of each sample, and the threshold for near-duplicates.

    A cluster joins near-duplicates, identical raw pixels, and identical prepared images. The
    threshold is None if near-duplicates were not searched for.
    """
    near_name: dict[int, int] = {}
    joins: Threshold | None = None
    near = [index for index, sample in enumerate(found) if sample.has_signature]
    if near:
        signatures = reading.folder / SIGNATURES
        _join_signatures(reading.folder, [found[index] for index in near], signatures)
        digests = [found[index].digest or f"blank {index}" for index in near]
        workers = worker_count(len(near) // 100, reading.data.num_workers)
        duplicates = find_near_duplicates(signatures, digests, reading.data.near_duplicate_correlation, workers)
        near_name, joins = dict(zip(near, duplicates.clusters(), strict=True)), duplicates.threshold
    looks = [f"near {near_name[index]}" if index in near_name else None for index in range(len(found))]
    return joined([(look, *_pixels(sample)) for look, sample in zip(looks, found, strict=True)]), joins


def _identical_clusters(found: Sequence[Found]) -> list[int]:
    """Return the cluster of each sample by identical pixels alone."""
    return joined([_pixels(sample) for sample in found])


def _pixels(sample: Found) -> tuple[str | None, str | None]:
    """Return keys that are equal for identical raw pixels and for identical prepared images."""
    return f"raw {sample.digest}" if sample.digest else None, f"shown {sample.shown}" if sample.shown else None


def _join_signatures(folder: Path, found: Sequence[Found], signatures: Path) -> None:
    """Write the signatures of the samples to one file, in order."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for sample in found:
        wanted[sample.part].add(sample.record[0])
    with signatures.open("wb") as joined:
        for number, records in sorted(wanted.items()):
            part = Part(number, 0, ())
            with part.path(folder, "jsonl").open("rb") as lines, part.path(folder, "near").open("rb") as near:
                offset = 0
                for line in lines:
                    if json.loads(line).get("near"):
                        record = near.read(RECORD.itemsize)
                        if offset in records:
                            joined.write(record)
                    offset += len(line)


def _checked_splits(rows: Sequence[Row], rejected: Sequence[Reject], config: ExperimentConfig) -> Splits:
    """Return the rows of each split.

    Raises:
        MaskLoomError: a split would be empty; names the most frequent reason for inputs left out.
    """
    try:
        return _rows_by_split(rows, config)
    except MaskLoomError as error:
        if not rejected:
            raise
        commonest = group_by_reason(rejected)[0]
        told = f"{len(rejected)} of {len(rejected) + len(rows)} inputs were left out, {len(commonest.paths)} of them: {commonest.reason}"
        raise MaskLoomError(f"{error} ({told})") from None


def _rows_by_split(rows: Sequence[Row], config: ExperimentConfig) -> dict[str, list[Row]]:
    """Return the rows of each split, shuffled in an order that depends only on the ids."""
    members: dict[str, list[Found]] = defaultdict(list)
    for row in rows:
        if row.item.source == 0:
            members[row.group].append(row.item)
    groups = [_group(name, items) for name, items in members.items()]
    split_of = split_of_groups(groups, config.data.splits, config.seed)
    split_of |= {row.group: row.item.split for row in rows if row.item.source and row.item.split}
    mixed = sorted(rows, key=lambda row: value_digest(row.item.sample_id))
    names = [*SPLITS, *(f"{EXTERNAL_PREFIX}{name}" for name in config.data.external)]
    return {split: [row for row in mixed if split_of[row.group] == split] for split in names}


def _group(name: str, items: Sequence[Found]) -> Group:
    """Return a group for splitting; its class is the most frequent one among its samples."""
    label = Counter(item.label for item in items).most_common(1)[0][0]
    return Group(name, len(items), label, next((item.split for item in items if item.split), None))


def _writer(
    folder: Path, description: Description, config: ExperimentConfig, splits: Splits, stage_key: str
) -> DatasetWriter:
    shards = plan_shards({split: len(rows) for split, rows in splits.items()}, config.data.rows_per_shard)
    ids = {split: [(row.item.sample_id, row.group) for row in rows] for split, rows in splits.items()}
    return DatasetWriter(folder, description, shards, value_digest([stage_key, ids]))


def _description(sources: Sequence[Source], config: ExperimentConfig, joins: Threshold | None) -> Description:
    data, main = config.data, sources[0]
    info = main.info
    return Description(
        dataset=data.dataset,
        origin="real",
        modality=info.modality,
        channels=info.channels,
        image_size=data.image_size,
        buckets=tuple(data.sizes[1:]),
        mask_classes=info.mask_classes,
        palette=info.palette,
        labels=info.labels,
        prompt_templates=info.prompt_templates,
        conditioning=data.conditioning,
        preprocessing={
            "resize_mode": data.resize_mode,
            "resampling": "image: antialiased bicubic; mask: nearest neighbour, a class that would vanish keeps one pixel",
            "intensity": _stated(data.intensity),
            "stain": None if data.stain is None else {"method": data.stain.method, "reference": _reference(data)},
            "duplicates": main.duplicates,
            "near_duplicates": None if joins is None else {"method": METHOD, **joins.stated()},
            "splits": data.splits.model_dump(),
            "seed": config.seed,
            "options": data.options,
            **({"external": {source.name: _about(source) for source in sources[1:]}} if len(sources) > 1 else {}),
        },
        licence=info.licence,
        citation=info.citation,
        homepage=info.homepage,
    )


def _stated(intensity: Any) -> dict[str, Any] | str:
    return "as the dataset says" if intensity is None else intensity.model_dump(mode="json", exclude_none=True)


def _reference(data: DataConfig) -> str:
    """Return the stain reference: name and digest of the image, without its local path."""
    assert data.stain is not None
    path = data.stain.reference
    return "published reference vectors" if path is None else f"{path.name} ({file_digest(path)[:16]})"


def _about(source: Source) -> dict[str, str]:
    info = source.info
    return {"licence": info.licence, "citation": info.citation, "homepage": info.homepage}


def _write_shards(writer: DatasetWriter, reading: Reading, splits: Splits) -> None:
    missing = writer.missing_shards()
    total = sum(len(rows) for rows in splits.values())
    done = total - sum(shard.stop - shard.start for shard in missing)
    labels = reading.sources[0].labels
    with progress("writing rows", total, "rows", done) as advance:
        for shard in missing:
            rows = splits[shard.split][shard.start : shard.stop]
            samples = (
                row_sample(reading.folder, reading.sources[row.item.source], labels, row.item, row.group)
                for row in rows
            )
            writer.write_shard(shard, _counted(samples, advance))


def _counted(samples: Iterator[Sample], advance: Advance) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        advance()


def _note_items(run: Run, reading: Reading, parts: Sequence[Part]) -> None:
    """Write samples and rejects per slide or volume to `logs/prepare/items.jsonl`."""
    lines = []
    for part in parts:
        adapter = reading.sources[part.source].adapter
        if adapter.items_per_part != 1:
            continue
        text = part.path(reading.folder, "jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        reasons = Counter(re.split(r"[:(]", record["reason"])[0].strip() for record in records if "reason" in record)
        status = {
            "path": _shown_path(part.entries[0].path, reading.sources),
            "samples": len(records) - reasons.total(),
            "rejected": dict(reasons),
        }
        lines.append(json.dumps(status, ensure_ascii=False, sort_keys=True) + "\n")
    if lines:
        write_text(run.logs("prepare") / "items.jsonl", "".join(lines))


def _shown_path(path: str, sources: Sequence[Source]) -> str:
    """Return a path relative to its raw folder, so that the published ledger has no local path."""
    for source in sources:
        raw_dir = source.adapter.raw_dir
        if raw_dir and _lies_in(raw_dir, path):
            relative = str(Path(printable(path)).relative_to(printable(str(raw_dir))))
            return f"{source.name}/{relative}" if source.split else relative
    return printable(path)


def _lies_in(raw_dir: Path | None, path: str) -> bool:
    return raw_dir is not None and Path(printable(path)).is_relative_to(printable(str(raw_dir)))


def _label_counts(splits: Splits) -> dict[str, Counter[str]]:
    return {split: Counter(row.item.label or "none" for row in rows) for split, rows in splits.items()}


def _group_counts(splits: Splits) -> dict[str, int]:
    return {split: len({row.group for row in rows}) for split, rows in splits.items()}
