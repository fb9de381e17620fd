"""`maskloom export`: write a dataset in the layout of another tool, see `exporters/`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloom.pipeline import __version__
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.dataset.copies import copies_handed_on
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.exporter import DatasetExporter, ExportSource
from maskloom.pipeline.dataset.held_out_images import require_none_of_its_parent
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json, write_json
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder, check_places, whole_folder
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.progress import say

PACKAGE = "maskloom.pipeline.dataset.exporters"
PROVENANCE_FILE = "maskloom.json"
SAME = ("format", "digest", "splits", "options")  # two exports with the same provenance here are equal


@dataclass(frozen=True)
class ExportOptions:
    """Options of the command.

    Attributes:
        format: file name in `pipeline/dataset/exporters`.
        output: folder of the export.
        splits: splits to export; empty: all.
        values: options of the format, as `key=value`.
        force: replace an export of different data.
    """

    format: str
    output: Path
    splits: Sequence[str] = ()
    values: Sequence[str] = ()
    force: bool = False


def export(dataset: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a dataset atomically in the layout of another tool, together with its provenance.

    Args:
        dataset: folder of a mask-and-prompt dataset: real, synthetic or combined.
        options: options of the command.

    Returns:
        The content of `maskloom.json`.

    Raises:
        MaskLoomError: the format, an option or a split is unknown; the dataset is damaged or does
            not fit the layout; a synthetic image is a copy of a held-out one; the output folder
            contains other files.
    """
    exporter = open_exporter(options.format, options.values)
    verified = verify_fully(dataset)
    require_none_of_its_parent(verified)
    copies = copies_handed_on(verified)
    source = ExportSource.surveyed(verified, _chosen_splits(verified, options.splits), copies.left_out)
    if not source.counts:
        raise MaskLoomError(f"{dataset}: every row is a copy of a training image; there are no rows to export")
    _check_fit(exporter, source, options.format)
    provenance = _provenance(exporter, source, options.format, copies.kept)
    _check_output(options.output, dataset, provenance, options.force)
    with whole_folder(options.output.resolve()) as folder:
        exporter.write(source, folder)
        write_json(folder / PROVENANCE_FILE, provenance)
    splits = ", ".join(f"{split} {count}" for split, count in provenance["splits"].items())
    origins = ", ".join(f"{origin} {count}" for origin, count in provenance["rows_by_origin"].items())
    say(f"{options.output}: {options.format}, {splits} rows ({origins}); masks: {provenance['masks']}")
    return provenance


def open_exporter(name: str, values: Sequence[str]) -> DatasetExporter:
    """Return the exporter of a format.

    Raises:
        MaskLoomError: a format or option is unknown (the error suggests the nearest), or a value is
            invalid.
    """
    exporter: type[DatasetExporter] = load_plugin(PACKAGE, name, "format").Exporter
    for value in values:
        if "=" not in value:
            raise MaskLoomError(f"option {value!r}: write key=value; `maskloom export --help` shows how")
    given = dict(value.split("=", 1) for value in values)
    return exporter(validated(given, exporter.Options, f"{PACKAGE}.{name}"))


def _chosen_splits(dataset: MaskPromptDataset, names: Sequence[str]) -> tuple[str, ...]:
    """Return the splits to export in the contract's order; no names select all.

    Raises:
        MaskLoomError: a split is unknown or empty, or there are no rows at all.
    """
    known = dataset.contract.split_names
    unknown = [name for name in names if name not in known]
    if unknown:
        raise MaskLoomError(f"{dataset.folder}: no rows in a split {unknown[0]!r}; it has {', '.join(known)}")
    chosen = tuple(name for name in known if not names or name in names)
    if not chosen:
        raise MaskLoomError(f"{dataset.folder}: there are no rows to export")
    return chosen


def _check_fit(exporter: DatasetExporter, source: ExportSource, name: str) -> None:
    """Check that the rows have the masks and labels that the format needs.

    Raises:
        MaskLoomError: they do not; the error names a sample.
    """
    if exporter.needs_masks and source.without_mask is not None:
        raise MaskLoomError(
            f"{source.folder}: sample {source.without_mask} has no mask; {name} needs one beside every image: "
            "leave its split out with --split, or use imagefolder"
        )
    if exporter.needs_labels and source.without_label is not None:
        raise MaskLoomError(
            f"{source.folder}: sample {source.without_label} has no class; {name} sorts images into folders of classes: "
            "leave its split out with --split, or use another format"
        )
    exporter.check(source)


def _provenance(
    exporter: DatasetExporter, source: ExportSource, name: str, kept_copies: Mapping[str, str]
) -> dict[str, Any]:
    """Return the content of `maskloom.json`, with the exported copies of training images among it.

    It contains no local path and no time, so that the same dataset gives the same bytes.
    """
    about = source.about
    rows_by_origin: Counter[str] = Counter()
    rows_by_split = dict.fromkeys(source.splits, 0)
    for (split, origin, _), count in source.counts.items():
        rows_by_origin[origin] += count
        rows_by_split[split] += count
    return {
        "format": name,
        "options": exporter.options.model_dump(mode="json"),
        "dataset": about.dataset,
        "origin": about.origin,
        "digest": source.dataset.digest,
        "splits": rows_by_split,
        "rows_by_origin": dict(sorted(rows_by_origin.items())),
        **({"copies_left_out": dict(source.left_out)} if source.left_out else {}),
        **({"copies_kept": dict(kept_copies)} if kept_copies else {}),
        "masks": exporter.mask_values(about),
        "mask_classes": list(about.mask_classes),
        "labels": list(about.labels),
        "modality": about.modality,
        "licence": about.licence,
        "citation": about.citation,
        "homepage": about.homepage,
        "maskloom_version": __version__,
    }


def _check_output(output: Path, dataset: Path, provenance: Mapping[str, Any], force: bool) -> None:
    """Check that the output folder is missing or empty, or contains an export that may be replaced.

    Raises:
        MaskLoomError: it is not; other files are never deleted.
    """
    check_places({"dataset": dataset}, [output])
    if output.exists() and not output.is_dir():
        raise MaskLoomError(f"--output {output}: a file; give a new or empty folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    path = output / PROVENANCE_FILE
    if not path.is_file() or not OwnedFolder(output).is_marked():
        raise MaskLoomError(
            f"--output {output}: not empty and not an earlier export ({PROVENANCE_FILE} or {MANIFEST} is missing); "
            "give a new or empty folder"
        )
    earlier = read_json(path, "delete the folder, or give another one")
    if not force and (not isinstance(earlier, dict) or any(earlier.get(key) != provenance[key] for key in SAME)):
        raise MaskLoomError(
            f"--output {output}: holds an export of something else (see {PROVENANCE_FILE}); "
            "give another folder, or --force to replace it"
        )
