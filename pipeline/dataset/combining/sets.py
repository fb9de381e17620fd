"""The synthetic datasets whose rows may be added to a real one, and their rows in a keyed order."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.copies import copies_handed_on
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError

SAME = ("channels", "image_size", "buckets", "mask_classes", "palette", "labels", "conditioning")
"""What the rows of one dataset share; a synthetic set takes it from the real one."""


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
        dataset: the dataset.
        prefix: put before its sample ids if they would repeat those of another set; mostly empty.
        labels: of its rows, in order.
        ids: its sample ids, in order.
        left_out: those of copies of training images, which are not added, and their originals.
        kept: those of copies that may be added, and their originals.
    """

    dataset: MaskPromptDataset
    prefix: str
    labels: tuple[int | None, ...]
    ids: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def generator(self) -> str:
        """Name of the generator, as the contract states it."""
        generation = self.dataset.description.preprocessing.get("generation", {})
        return str(generation.get("generator", "unknown")) if isinstance(generation, dict) else "unknown"

    def kept_among(self, positions: Collection[int]) -> dict[str, str]:
        """Return the copies, with their originals, among the rows at some positions."""
        return {self.ids[one]: self.kept[self.ids[one]] for one in sorted(positions) if self.ids[one] in self.kept}

    def settings(self, positions: Collection[int]) -> dict[str, Any]:
        """Return what the contract states about the set; not where it lies on this machine.

        Args:
            positions: of the rows that are added.
        """
        kept = self.kept_among(positions)
        return {
            "digest": self.dataset.digest,
            "generator": self.generator,
            "sample_id_prefix": self.prefix,
            **({"copies_left_out": dict(self.left_out)} if self.left_out else {}),
            **({"copies_kept": kept} if kept else {}),
        }


def verified_sets(folders: Sequence[Path], real: MaskPromptDataset) -> list[SyntheticSet]:
    """Return the sets whose rows may be added, with sample ids that differ from all others.

    Raises:
        MaskLoomError: a set is damaged, given twice, or was not made from the real dataset.
    """
    taken = {row["sample_id"] for row in real.rows(columns=["sample_id"])}
    sets: list[SyntheticSet] = []
    for number, folder in enumerate(folders, start=1):
        dataset = verify_fully(folder)
        _check_set(dataset, real)
        if dataset.digest in {one.dataset.digest for one in sets}:
            raise MaskLoomError(f"--synthetic {folder}: these rows are given twice; name each synthetic dataset once")
        copies = copies_handed_on(dataset)
        rows = [(row["sample_id"], row["label"]) for row in dataset.rows("train", ["sample_id", "label"])]
        prefix = ""
        while taken & {prefix + sample for sample, _ in rows}:
            prefix += f"set{number}-"
        taken |= {prefix + sample for sample, _ in rows}
        ids, labels = tuple(sample for sample, _ in rows), tuple(label for _, label in rows)
        sets.append(SyntheticSet(dataset, prefix, labels, ids, copies.left_out, copies.kept))
    return sets


def _check_set(dataset: MaskPromptDataset, real: MaskPromptDataset) -> None:
    """Check that a set was made from the train split of this very real dataset.

    Others may know its held-out images.
    """
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


def positions_of(rows: Sequence[SyntheticRow], number: int) -> set[int]:
    """Return the positions of the rows that are of one set; `number` as in `SyntheticRow.set`."""
    return {row.position for row in rows if row.set == number}


def ordered_pool(sets: Sequence[SyntheticSet], seed: int) -> list[SyntheticRow]:
    """Return every synthetic row, in an order keyed to the seed, its set's content and its id."""
    pool = []
    for number, one in enumerate(sets):
        for position, (sample, label) in enumerate(zip(one.ids, one.labels, strict=True)):
            if sample in one.left_out:
                continue
            key = hashlib.sha256(f"{seed}\0{one.dataset.digest}\0{sample}".encode()).hexdigest()
            pool.append(SyntheticRow(number, position, label, key))
    return sorted(pool, key=lambda row: row.order)
