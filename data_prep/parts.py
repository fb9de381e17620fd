"""Parts: batches of raw items that are read together and kept on disk until the dataset is written.

A part is a slide, a volume, or some dozens of images. Parts are independent of each other, so they
can be read by several processes or by several cluster jobs (`--shard i/n`), and none is read twice:
the records of a part appear on disk at once when it is complete. Each part has three files:

    part-00012.jsonl   one record per sample: ids, prompt, location of its pixels; or a reject with
                       its reason
    part-00012.bin     the images of the samples as PNG, concatenated
    part-00012.near    their near-duplicate signatures, concatenated

They are not flushed to the disk: a part that a crash of the machine has damaged does not match its
seal (`part-00012.sha256`) and is read again.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from maskloom.data_prep.adapter import DatasetAdapter, RawItem, Reject
from maskloom.data_prep.processing.stains import stain_normaliser
from maskloom.data_prep.readers.file_names import as_seen, printable
from maskloom.data_prep.sources import Source
from maskloom.data_prep.splitting.groups import Found, Row
from maskloom.data_prep.survey import PreparedSample, prepared_sample
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.cpu_memory import keep_freed_memory
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.dataset.writer import Sample
from maskloom.pipeline.errors import RejectedSample
from maskloom.pipeline.files.atomic import TEMPORARY_SUFFIX, atomic_path, file_digest
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder
from maskloom.pipeline.progress import Advance, say

SIGNATURES = "signatures.bin"
VECTORS = "signatures.windows"  # temporary file of the near-duplicate search
SEAL = "sha256"  # suffix of the file that is written last, with the digests of the part's other files
SUFFIXES = ("jsonl", "bin", "near")
PART_FILES = (*(f"part-*.{suffix}" for suffix in (*SUFFIXES, SEAL)), SIGNATURES, VECTORS, f".*{TEMPORARY_SUFFIX}")
fitted_stains = lru_cache(maxsize=1)(stain_normaliser)  # once per process
PICTURES = ("image", "mask", "conditioning_image")


@dataclass(frozen=True)
class Part:
    """A batch of listed items of one source.

    Attributes:
        number: position among all parts, in listing order.
        source: index of the source.
        entries: the items and rejects listed by `DatasetAdapter.scan`.
    """

    number: int
    source: int
    entries: tuple[RawItem | Reject, ...]

    def path(self, folder: Path, suffix: str) -> Path:
        """Return the path of one of the part's files."""
        return folder / f"part-{self.number:06d}.{suffix}"

    def is_done(self, folder: Path) -> bool:
        """Whether the part has been read and its files are intact; damage is reported."""
        seal = self.path(folder, SEAL)
        if not seal.is_file():
            return False
        if seal.read_bytes() == _digests(self, folder):
            return True
        say(f"{self.path(folder, 'jsonl')}: damaged since it was written; reading that part of the raw data again")
        return False

    def forget(self, folder: Path) -> None:
        """Mark the part as unread."""
        self.path(folder, SEAL).unlink(missing_ok=True)


@dataclass(frozen=True)
class Reading:
    """Settings shared by all parts.

    Attributes:
        folder: folder of the parts.
        sources: the datasets; the first is the main one, whose channels, labels and palette apply
            to all.
        data: the `data` section of the configuration.
    """

    folder: Path
    sources: tuple[Source, ...]
    data: DataConfig


def scanned_parts(sources: Sequence[Source]) -> list[Part]:
    """List the raw items of every source and divide them into parts."""
    parts: list[Part] = []
    for index, source in enumerate(sources):
        entries = list(source.adapter.scan())
        size = source.adapter.items_per_part
        for start in range(0, len(entries), size):
            parts.append(Part(len(parts), index, tuple(entries[start : start + size])))
    return parts


def read_part(reading: Reading, part: Part) -> tuple[int, int]:
    """Read one part, write its files, and return its numbers of items and of usable samples.

    Raises:
        MaskLoomError: the configuration does not fit the dataset.
    """
    keep_freed_memory()
    usable = 0
    with ExitStack() as files:
        records, pictures, signatures = (
            files.enter_context(
                files.enter_context(atomic_path(part.path(reading.folder, suffix), flush=False)).open("wb")
            )
            for suffix in SUFFIXES
        )
        for entry in _samples(reading, part):
            if isinstance(entry, Reject):
                record: dict[str, Any] = {"path": entry.path, "reason": entry.reason}
            else:
                usable += 1
                item, sample = entry
                signatures.write(sample.signature)
                record = _record(item, sample, pictures)
            records.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    with atomic_path(part.path(reading.folder, SEAL), flush=False) as temporary:
        temporary.write_bytes(_digests(part, reading.folder))
    return len(part.entries), usable


def _digests(part: Part, folder: Path) -> bytes:
    """Return the digests of a part's files, one per line; `missing` for an absent file."""
    paths = [part.path(folder, suffix) for suffix in SUFFIXES]
    return "".join(f"{file_digest(path) if path.is_file() else 'missing'}\n" for path in paths).encode()


def clear_parts(scratch: Path, keep: Path | None = None) -> None:
    """Delete the part files in the marked subfolders, and the folders that are then empty.

    Args:
        scratch: folder with one subfolder for each set of inputs and settings.
        keep: a subfolder to keep.
    """
    for folder in scratch.glob("*"):
        if folder == keep or folder.is_symlink() or not OwnedFolder(folder).is_marked():
            continue
        for path in [path for pattern in (*PART_FILES, MANIFEST) for path in folder.glob(pattern)]:
            path.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    if scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()


def _samples(reading: Reading, part: Part) -> Iterator[tuple[RawItem, PreparedSample] | Reject]:
    """Yield every sample of a part, prepared, or its reject."""
    source, main = reading.sources[part.source], reading.sources[0].info
    for item in _expanded(source.adapter, part.entries):
        if isinstance(item, Reject):
            yield item
            continue
        try:
            stains = None if reading.data.stain is None else fitted_stains(reading.data.stain)
            sample = prepared_sample(source, reading.data, main.channels, main.palette, stains, item)
        except RejectedSample as error:
            yield Reject(item.path, str(error))
        else:
            yield item, sample


def _expanded(adapter: DatasetAdapter, entries: Sequence[RawItem | Reject]) -> Iterator[RawItem | Reject]:
    """Yield the items inside each listed one, such as the slices of a volume, and the rejects."""
    for entry in entries:
        if isinstance(entry, Reject):
            yield entry
            continue
        try:
            yield from adapter.expand(entry)
        except RejectedSample as error:
            yield Reject(entry.path, str(error))


def _record(item: RawItem, sample: PreparedSample, pictures: BinaryIO) -> dict[str, Any]:
    """Write the images of a sample and return its record."""
    places = {}
    for name in PICTURES:
        pixels = getattr(sample, name)
        if pixels is not None:
            start = pictures.tell()
            places[name] = [start, pictures.write(png_bytes(pixels))]
    return {
        "sample_id": item.sample_id,
        "path": printable(item.path),
        "label": item.label,
        "group": item.group,
        "split": item.split,
        "digest": sample.digest,
        "shown": sample.shown,
        "near": bool(sample.signature),
        "text": sample.text,
        "attributes": sample.attributes,
        "pictures": places,
        "kept": sample.kept,
        "lost": sample.lost,
        "areas": sample.areas,
        "darkened": sample.darkened,
    }


def found_samples(folder: Path, parts: Sequence[Part], sources: Sequence[Source]) -> tuple[list[Found], list[Reject]]:
    """Return the samples of all parts in listing order, and the rejects.

    Ids and groups of an external source are prefixed with its name; its samples form its own split.
    """
    found: list[Found] = []
    rejected: list[Reject] = []
    for part in parts:
        source = sources[part.source]
        with part.path(folder, "jsonl").open("rb") as lines:
            offset = 0
            for line in lines:
                record = json.loads(line)
                if "reason" in record:
                    rejected.append(Reject(record["path"], record["reason"]))
                else:
                    found.append(_found(record, part, source, (offset, len(line))))
                offset += len(line)
    return found, rejected


def _found(record: dict[str, Any], part: Part, source: Source, place: tuple[int, int]) -> Found:
    prefix = f"{source.name}-" if source.split else ""
    return Found(
        sample_id=f"{prefix}{record['sample_id']}",
        path=record["path"],
        label=record["label"],
        group=None if record["group"] is None else f"{prefix}{record['group']}",
        split=source.split or record["split"],
        digest=record["digest"],
        shown=record["shown"],
        source=part.source,
        has_signature=record["near"],
        part=part.number,
        record=place,
    )


Identified = TypeVar("Identified", RawItem, Found)


def without_taken_ids(samples: Sequence[Identified]) -> tuple[list[Identified], list[Reject]]:
    """Return the samples with unique ids, and a reject for each later sample with the same id."""
    owner: dict[str, str] = {}
    kept, rejected = [], []
    for sample in samples:
        if sample.sample_id in owner:
            # Only the file name: the published ledger must not reveal the location of the raw
            # folder.
            first = Path(owner[sample.sample_id]).name
            alike = as_seen(first) == as_seen(Path(sample.path).name)
            same = ", whose name looks the same; rename one of them" if alike else ""
            reason = f"its sample_id {sample.sample_id} is already that of {ascii(first) if alike else first}{same}"
            rejected.append(Reject(sample.path, reason))
        else:
            owner[sample.sample_id] = sample.path
            kept.append(sample)
    return kept, rejected


def stored_samples(reading: Reading, rows: Sequence[Row], advance: Advance) -> Iterator[Sample]:
    """Yield the rows of the dataset, with their images as the stored PNG bytes."""
    for row in rows:
        found = row.item
        part = Part(found.part, found.source, ())
        record = json.loads(_bytes_at(part.path(reading.folder, "jsonl"), *found.record))
        pixels = part.path(reading.folder, "bin")
        pictures = {name: _bytes_at(pixels, *place) for name, place in record["pictures"].items()}
        yield Sample(
            image=pictures["image"],
            mask=pictures.get("mask"),
            conditioning_image=pictures["conditioning_image"],
            text=record["text"],
            label=None if found.label is None else reading.sources[0].labels.index(found.label),
            sample_id=found.sample_id,
            group_id=row.group,
            source=reading.sources[found.source].name,
            origin="real",
            attributes=record["attributes"],
        )
        advance()


def _bytes_at(path: Path, offset: int, length: int) -> bytes:
    """Return a byte range of a file.

    Rows are shuffled over all parts, so each call reads from a different file and closes it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)
