"""Check before training and evaluation that no image is both trained and tested on.

This is the part of `maskloom verify` that can fail. Images are compared pixel by pixel. If the
groups of the real dataset should also catch near-duplicates, `maskloom verify` itself is run on it.
Groups, hashes and parents have already been checked (`pipeline.dataset.verification`).

The result is kept in `logs/audit/DIGEST.json` of the run, under the digest of the datasets, so that
the check runs once for all stages and resumed runs. Only a dataset without leaks has a record.
"""

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from maskloom.pipeline.dataset.audit.findings import (
    Finding,
    Place,
    failure_row,
    failure_text,
    identical_findings,
    near_correlation,
)
from maskloom.pipeline.dataset.audit.limits import NEAR_LIMIT
from maskloom.pipeline.dataset.audit.pixels import decoded_image, is_blank, pixel_digest
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import LeakedImages, MaskLoomError, one_line
from maskloom.pipeline.progress import progress, say
from maskloom.pipeline.runs.audit_record import is_recorded, record_path, write_audit_record
from maskloom.pipeline.runs.leak_list import files_of_leaks, leaks_in_words
from maskloom.pipeline.runs.run import Run

VERSION = 1  # of this check; a new version makes every record stale
FIX = "prepare the dataset again with data.duplicates=identical or near, so that such images share a group or are left out"
NEAR_FIX = (
    "near-duplicates share a group where data.duplicates=near finds them: the dataset has been changed since, or joined "
    "from parts; prepare it again from the raw images, with the patient of each image as its group"
)
SYNTHETIC_FIX = (
    "no image may be trained on that measures the result: generate the set again from this dataset, "
    "or leave it out with generate.generators.NAME=false"
)
SCHEMA = """
CREATE TABLE images (
    id INTEGER PRIMARY KEY, dataset INTEGER, split TEXT, sample TEXT, grp TEXT, label TEXT, image BLOB, mask BLOB, flat INTEGER
);
"""
INSERT = "INSERT INTO images (dataset, split, sample, grp, label, image, flat) VALUES (?, ?, ?, ?, ?, ?, ?)"


def require_no_leaks(run: Run, datasets: Sequence[MaskPromptDataset]) -> None:
    """Check that no image is shared by train or validation and a held-out split, or has two labels.

    Call it with verified datasets before anything is computed or deleted. The check runs once per
    content, and only on the first process of a distributed run.

    Args:
        run: the run that keeps the record.
        datasets: the real dataset, then any synthetic datasets made from it.

    Raises:
        LeakedImages: an image leaks or has two labels; the error names the samples and their files.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    real = datasets[0]
    record = record_path(run, datasets)
    if is_recorded(record, VERSION, datasets):
        return
    start = time.monotonic()
    rows, failures = _failures(datasets)
    _require_none(record, real, failures, FIX)
    near = len(datasets) == 1 and looks_for_near_duplicates(real)
    if near:
        _require_none(record, real, _near_duplicates(real), NEAR_FIX)
    write_audit_record(record, VERSION, datasets, rows, near)
    also = ", near-duplicates included" if near else ""
    say(f"audit: {rows} images in {time.monotonic() - start:.1f} s, none found in two splits{also}")


def _require_none(record: Path, real: MaskPromptDataset, failures: Sequence[Finding], fix: str) -> None:
    """Check that there are no failures.

    Raises:
        LeakedImages: there are some; `fix` says what to do about real images.
    """
    if not failures:
        return
    leaks = list(map(failure_row, failures))
    found = leaks_in_words(record, list(map(failure_text, failures)), leaks)
    remedy = SYNTHETIC_FIX if all(finding.problem == "datasets" for finding in failures) else fix
    wrong = f"{real.folder}: {len(failures)} pair(s) of images make results wrong: {found}"
    raise LeakedImages(wrong, remedy, files_of_leaks(leaks))


def looks_for_near_duplicates(dataset: MaskPromptDataset) -> bool:
    """Return whether a dataset is checked for near-duplicates without being asked.

    This is so if its groups should catch near-duplicates, and it has at most `NEAR_LIMIT` rows.
    """
    return near_correlation(dataset) is not None and dataset.num_rows <= NEAR_LIMIT


def _failures(datasets: Sequence[MaskPromptDataset]) -> tuple[int, list[Finding]]:
    """Return the number of images, and the failures; memory grows with the number of failures alone."""
    with _pixel_rows(datasets) as rows:
        failures = [finding for finding in identical_findings(rows, datasets) if finding.fails]
        return rows.execute("SELECT COUNT(*) FROM images").fetchone()[0], failures


@contextmanager
def _pixel_rows(datasets: Sequence[MaskPromptDataset]) -> Iterator[sqlite3.Connection]:
    """Yield a database with the pixel digests of all images; SQLite spills it to disk if large.

    Raises:
        MaskLoomError: the temporary file of the database cannot be written.
    """
    total = sum(dataset.num_rows for dataset in datasets)
    rows = sqlite3.connect("")
    try:
        rows.executescript(SCHEMA)
        with progress("comparing pixels", total, "images") as advance, rows:
            for number, dataset in enumerate(datasets):
                for values in _image_values(number, dataset):
                    rows.execute(INSERT, values)
                    advance()
        rows.execute("CREATE INDEX images_by_pixels ON images (image)")
        yield rows
    except sqlite3.Error as error:
        raise MaskLoomError(
            f"{gettempdir()}: images cannot be compared ({error}); free space there, or set TMPDIR to another folder"
        ) from error
    finally:
        rows.close()


def _image_values(number: int, dataset: MaskPromptDataset) -> Iterator[tuple[Any, ...]]:
    """Yield the values of `INSERT` for each image of a dataset.

    Raises:
        MaskLoomError: an image cannot be decoded.
    """
    columns = ["image", "label", "sample_id", "group_id"]
    for split in dataset.contract.split_names:
        for row in dataset.rows(split, columns):
            image = decoded_image(dataset.folder, row)
            label = dataset.description.label_name(row["label"])
            yield number, split, row["sample_id"], row["group_id"], label, pixel_digest(image), is_blank(image)


def _near_duplicates(dataset: MaskPromptDataset) -> list[Finding]:
    """Return the failures that `verify --near` finds, in a separate process: `data_prep` is a stage.

    Raises:
        MaskLoomError: `verify` failed for another reason; with its own message.
    """
    with TemporaryDirectory(prefix="maskloom-near-") as folder:
        file = Path(folder) / "audit.json"
        command = [
            sys.executable,
            "-m",
            "maskloom.data_prep",
            "verify",
            str(dataset.folder),
            "--near",
            "--json",
            str(file),
        ]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        listed = json.loads(file.read_text(encoding="utf-8"))["findings"] if file.is_file() else []
    failures = [
        Finding(**{**one, "first": Place(**one["first"]), "second": Place(**one["second"])})
        for one in listed
        if one["fails"]
    ]
    if answer.returncode and not failures:
        lines = answer.stderr.strip().splitlines() or [f"{' '.join(command)}: exit code {answer.returncode}"]
        raise MaskLoomError(one_line(lines[-1]).removeprefix("error: "))
    return failures
