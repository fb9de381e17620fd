"""Verify a mask-and-prompt dataset. Every stage runs the quick part before it computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from maskloom.pipeline.dataset.contract import (
    CONTRACT_FILE,
    EXTERNAL_PREFIX,
    LEDGER_FILE,
    SPLITS,
    Description,
    arrow_schema,
    summarise_splits,
)
from maskloom.pipeline.dataset.dataset import MaskPromptDataset, shard_rows
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import file_digest
from maskloom.pipeline.files.reading import row_attributes
from maskloom.pipeline.progress import progress

REPAIR = "the dataset was changed after it was written: write it again with --force"


def verify_quickly(folder: Path) -> MaskPromptDataset:
    """Check hashes, schema, counts, ids, group leakage and parents; decode no image.

    Returns:
        The verified dataset.

    Raises:
        MaskLoomError: the dataset is invalid; the error names the file and the first problem.
    """
    dataset = MaskPromptDataset.open(folder)
    _check_files(dataset)
    _check_schema(dataset)
    _check_ids(dataset)
    if dataset.contract.parent is not None:
        _check_parents(dataset)
    if dataset.description.origin == "combined":
        _check_combination(dataset)
    return dataset


def verify_for_training(folder: Path) -> MaskPromptDataset:
    """Verify a dataset quickly and check that a generator may be trained on it.

    Raises:
        MaskLoomError: see `verify_quickly`; or it holds synthetic rows, or its train split is
            empty.
    """
    dataset = verify_quickly(folder)
    if dataset.description.origin != "real":
        raise MaskLoomError(
            f"{folder}: a {dataset.description.origin} dataset; a generator is trained on real images only"
        )
    if "train" not in dataset.contract.splits:
        raise MaskLoomError(f"{folder}: the train split is empty; lower data.splits.validation and data.splits.test")
    return dataset


def verify_fully(folder: Path) -> MaskPromptDataset:
    """Check everything that `verify_quickly` checks, and the content of every row.

    The content is: image sizes and modes, mask values, prompts, labels and attributes.

    Raises:
        MaskLoomError: the dataset is invalid; the error names the file and the sample.
    """
    dataset = verify_quickly(folder)
    with progress("verifying", dataset.num_rows, "rows") as advance:
        for shard in dataset.shards():
            for row in shard_rows(shard):
                problem = _row_problem(row, dataset.description)
                if problem:
                    raise MaskLoomError(f"{shard}: sample {row['sample_id']}: {problem}; {REPAIR}")
                advance()
    return dataset


def _check_files(dataset: MaskPromptDataset) -> None:
    folder, files = dataset.folder, dataset.contract.files
    for file, digest in files.items():
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise MaskLoomError(f"{folder / CONTRACT_FILE}: the file {file!r} lies outside the dataset; {REPAIR}")
        if file == LEDGER_FILE and not path.is_file():
            continue  # it names raw files, and is not published with a dataset
        if not path.is_file():
            raise MaskLoomError(f"{path}: missing although {CONTRACT_FILE} lists it; {REPAIR}")
        if file_digest(path) != digest:
            raise MaskLoomError(f"{path}: its SHA-256 differs from {CONTRACT_FILE}; {REPAIR}")
    extra = sorted(
        str(p.relative_to(folder)) for p in (folder / "data").glob("*.parquet") if f"data/{p.name}" not in files
    )
    if extra:
        raise MaskLoomError(
            f"{folder / extra[0]}: not listed in {CONTRACT_FILE}, but its rows would be read with the dataset; move it away"
        )


def _check_schema(dataset: MaskPromptDataset) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    expected = arrow_schema(dataset.description)
    for shard in dataset.shards():
        try:
            schema = pq.read_schema(shard)
        except pa.ArrowInvalid as error:
            raise MaskLoomError(f"{shard}: not a Parquet file ({one_line(error)}); {REPAIR}") from None
        if schema.names != expected.names or schema.types != expected.types:
            raise MaskLoomError(f"{shard}: columns {schema.names} are not the contract's {expected.names}; {REPAIR}")


def _check_ids(dataset: MaskPromptDataset) -> None:
    folder, ids = dataset.folder, dataset.ids()
    unknown = [split for split in sorted(ids) if split not in SPLITS and not split.startswith(EXTERNAL_PREFIX)]
    if unknown:
        raise MaskLoomError(
            f"{folder}: unknown split {unknown[0]!r}; a dataset has {', '.join(SPLITS)} and {EXTERNAL_PREFIX}NAME"
        )
    if summarise_splits(ids) != dataset.contract.splits:
        raise MaskLoomError(f"{folder / CONTRACT_FILE}: rows, groups or ids differ from the shards'; {REPAIR}")
    counts = Counter(sample for rows in ids.values() for sample, _ in rows)
    repeated = [sample for sample, count in counts.items() if count > 1]
    if repeated:
        raise MaskLoomError(
            f"{folder}: sample_id {repeated[0]!r} occurs {counts[repeated[0]]} times; ids must be unique"
        )
    split_of: dict[str, str] = {}
    for split, rows in ids.items():
        for _, group in rows:
            if split_of.setdefault(group, split) != split:
                raise MaskLoomError(
                    f"{folder}: group {group!r} lies in both {split_of[group]} and {split}; "
                    "a group must lie in one split"
                )


def _check_parents(dataset: MaskPromptDataset) -> None:
    """Check that every parent of a synthetic row lies in the train split of the real dataset."""
    import pyarrow.parquet as pq

    assert dataset.contract.parent is not None
    place = (dataset.folder.resolve() / dataset.contract.parent.path).resolve()
    if not place.is_dir():
        raise MaskLoomError(
            f"{dataset.folder}: the real dataset that it was made from is not at {place}; keep it in its run, or move the whole run"
        )
    parent = MaskPromptDataset.open(place)
    if parent.digest != dataset.contract.parent.digest:
        again = "combine" if dataset.description.origin == "combined" else "generate"
        raise MaskLoomError(f"{dataset.folder}: made from another version of {parent.folder}; run {again} again")
    split_of = {sample: split for split, rows in parent.ids().items() for sample, _ in rows}
    for shard in dataset.shards():
        for parent_id in pq.read_table(shard, columns=["parent_id"])["parent_id"].to_pylist():
            split = split_of.get(parent_id)
            if split not in ("train", None):
                raise MaskLoomError(
                    f"{shard}: parent {parent_id!r} lies in the {split} split of {parent.folder}; "
                    "masks may come from train only"
                )
            if parent_id is not None and split is None:
                raise MaskLoomError(f"{shard}: parent {parent_id!r} is not in {parent.folder}; run generate again")


def _check_combination(dataset: MaskPromptDataset) -> None:
    """Check a combined dataset: all rows of the real one, and synthetic rows only in train."""
    folder, contract = dataset.folder, dataset.contract
    if contract.parent is None:
        raise MaskLoomError(f"{folder / CONTRACT_FILE}: a combined dataset must name its real one; run combine again")
    parent = MaskPromptDataset.open((folder / contract.parent.path).resolve())
    for split in sorted(contract.splits.keys() | parent.contract.splits.keys()):
        origins = {row["sample_id"]: row["origin"] for row in dataset.rows(split, ["sample_id", "origin"])}
        if split != "train" and "synthetic" in origins.values():
            raise MaskLoomError(f"{folder}: the {split} split holds synthetic rows; they may lie in train only")
        real = {sample for sample, _ in parent.ids(split).get(split, [])}
        if {sample for sample, origin in origins.items() if origin == "real"} != real:
            raise MaskLoomError(
                f"{folder}: the real rows of its {split} split are not those of {parent.folder}; run combine again"
            )


def _row_problem(row: dict[str, Any], about: Description) -> str | None:
    """Return what is wrong with a row, or None."""
    try:
        image, conditioning = png_array(row["image"]["bytes"]), png_array(row["conditioning_image"]["bytes"])
        mask = None if row["mask"] is None else png_array(row["mask"]["bytes"])
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        return f"an image cannot be decoded ({one_line(error)})"
    size = image.shape[:2]
    if (
        size not in about.sizes
        or image.shape != (size if about.channels == 1 else (*size, 3))
        or image.dtype != np.uint8
    ):
        sizes = " or ".join(map(str, about.sizes))
        return f"image is {image.shape} {image.dtype}, the contract says {sizes} with {about.channels} channel(s)"
    if conditioning.shape != (*size, 3):
        return f"conditioning_image is {conditioning.shape}, beside this image it must be {(*size, 3)}"
    if mask is not None:
        if mask.shape != size:
            return f"mask is {mask.shape}, the image {size}"
        if mask.max(initial=0) >= len(about.mask_classes):
            return f"mask holds the value {mask.max()}, the classes end at {len(about.mask_classes) - 1}"
    if row["label"] is not None and not 0 <= row["label"] < len(about.labels):
        return f"label {row['label']} is not one of {len(about.labels)} labels"
    if not row["text"]:
        return "text is empty"
    try:
        row_attributes(row["attributes"], "")
    except MaskLoomError:
        return "attributes are not a JSON object of strings"
    if row["origin"] not in (("real", "synthetic") if about.origin == "combined" else (about.origin,)):
        return f"origin is {row['origin']!r}, the contract says {about.origin!r}"
    return None
