"""Altered copies of held-out images among the images that shape a model, by the search for copies.

The check of every stage (`pipeline.runs.copies`) looks for near-duplicates. Before an evaluation, the
stronger search that finds copies of training images (`evaluate.copies`) looks for held-out ones, too:
padded with any grey, blurred, cropped and mirrored, shifted. Its thresholds come from the train
images, which are other groups than the held-out ones. The result is kept in
`logs/audit/DIGEST-altered.json` of the run, so that the check runs once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from maskloom.evaluate.copies import CopyJudge, calibrated_judge, comparable_batches, copy_judge, copy_rows, fisher_z
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.pipeline.dataset.audit.limits import NEAR_LIMIT
from maskloom.pipeline.errors import LeakedImages
from maskloom.pipeline.progress import say
from maskloom.pipeline.results import CopyRow
from maskloom.pipeline.runs.audit_record import is_recorded, record_path, write_audit_record
from maskloom.pipeline.runs.copies import leak_fix
from maskloom.pipeline.runs.leak_list import files_of_leaks, leaks_in_words
from maskloom.pipeline.runs.run import Run

if TYPE_CHECKING:
    from maskloom.evaluate.scores.copies import Matches

VERSION = 10  # of this check; a new version makes every record stale
# In Fisher's z. One image stops everything, and some sets have thousands: among real images that
# thresholds had not seen, none exceeded them by more than 0.25. Altered copies mostly exceed them by 0.7.
MARGIN = 0.3


def require_no_altered_held_out_images(run: Run, inputs: EvaluationInputs) -> None:
    """Check that no train or synthetic image is an altered validation, test or external image.

    Call it after `require_no_held_out_copies`, before anything is computed or deleted. More than
    `NEAR_LIMIT` images are not compared, which that check reports.

    Raises:
        LeakedImages: an image is such a copy; the error names the samples.
    """
    datasets = [inputs.real, *(one.dataset for one in inputs.synthetic.values())]
    record, rows = record_path(run, datasets, "-altered"), sum(dataset.num_rows for dataset in datasets)
    if is_recorded(record, VERSION, datasets) or rows > NEAR_LIMIT:
        return
    start, judge = time.monotonic(), held_out_judge(inputs)
    if judge is None:
        return
    real, found = [(inputs.train, row) for row in judge.held_out], []
    sets = [one for one in inputs.synthetic.values() if len(one)]
    suspected = [suspects_in(judge, image_set) for image_set in sets]
    del judge  # its descriptors need not lie in memory beside those of the train images
    for image_set, suspects in zip(sets, suspected, strict=True):
        found += [(image_set, row) for row in confirmed(inputs, suspects)]
    if real or found:
        split_of = {sample: one.split for one in held_out_sets(inputs) for sample in one.columns["sample_id"]}
        shows = str(inputs.real.folder)
        leaks = [_as_row(*pair, split_of[pair[1].original], shows) for pair in real + found]
        shown = leaks_in_words(record, list(map(_in_words, leaks)), leaks)
        raise LeakedImages(
            f"{inputs.real.folder}: {len(leaks)} image(s) are altered copies of held-out images: {shown}",
            leak_fix(bool(real), bool(found)),
            files_of_leaks(leaks),
        )
    write_audit_record(record, VERSION, datasets, rows, True)
    say(f"no altered held-out images among {rows} images ({time.monotonic() - start:.1f} s)")


def held_out_sets(inputs: EvaluationInputs) -> list[ImageSet]:
    """Return the splits that measure: validation, test and external sets, as far as there are any."""
    return [one for one in (inputs.validation, inputs.test, *inputs.externals.values()) if len(one)]


def held_out_judge(inputs: EvaluationInputs) -> CopyJudge | None:
    """Return the judge that finds held-out images; None where there are none.

    Its `held_out` are the train images that are copies of held-out ones. It is not kept: its
    descriptors take 36 kB per held-out image.
    """
    known = held_out_sets(inputs)
    return calibrated_judge(known, [inputs.train], MARGIN) if known else None


@dataclass(frozen=True)
class Suspects:
    """Images of a set that resemble held-out ones, before they are compared with train images.

    Attributes:
        image_set: the set.
        rows: (S,) row of each in it.
        matches: what each resembles among the held-out images.
        originals: ids of the held-out images.
        thresholds: by measure.
    """

    image_set: ImageSet
    rows: list[int]
    matches: list[Matches]
    originals: list[str]
    thresholds: dict[str, float]


def leaked_in(inputs: EvaluationInputs, judge: CopyJudge, image_set: ImageSet) -> list[CopyRow]:
    """Return the images of a set that are altered held-out ones; see `confirmed`."""
    return confirmed(inputs, suspects_in(judge, image_set))


def suspects_in(judge: CopyJudge, image_set: ImageSet) -> Suspects:
    """Return the images of a set that resemble held-out ones."""
    samples = image_set.columns["sample_id"]
    found = judge.search.matches_in(comparable_batches(image_set), len(image_set))
    names = {row.sample_id for row in copy_rows(samples, judge.originals, found, judge.thresholds)}
    rows = [row for row, sample in enumerate(samples) if sample in names]
    matches = [found.of(row) for row in rows]
    return Suspects(image_set, rows, matches, judge.originals, judge.thresholds)


def confirmed(inputs: EvaluationInputs, suspects: Suspects) -> list[CopyRow]:
    """Return the suspects that are altered held-out images.

    Such an image also resembles its original by `MARGIN` more than any train image: one that shows
    little, as a smooth blob, resembles images of every split.
    """
    if not suspects.rows:
        return []
    batches = comparable_batches(suspects.image_set, suspects.rows)
    known = copy_judge(inputs).search.matches_in(batches, len(suspects.rows))
    samples = suspects.image_set.columns["sample_id"]
    rows = []
    for number, (row, found) in enumerate(zip(suspects.rows, suspects.matches, strict=True)):
        near_train = {
            name: float(np.tanh(fisher_z(values[number]) + MARGIN)) for name, values in known.similarity.items()
        }
        limits = {name: max(one, near_train[name]) for name, one in suspects.thresholds.items()}
        rows += copy_rows([samples[row]], suspects.originals, found, limits)
    return rows


def _as_row(image_set: ImageSet, row: CopyRow, split: str, shows: str) -> dict[str, Any]:
    """Return a leak for the file of all leaks.

    Args:
        image_set: where the image is.
        row: what it shows.
        split: of the image that it shows.
        shows: folder of the dataset of that image.
    """
    return {
        "image": row.sample_id,
        "image_split": image_set.split,
        "image_dataset": str(image_set.dataset.folder),
        "shows": row.original,
        "shows_split": split,
        "shows_dataset": shows,
        "problem": row.transformation,
        "measure": row.measure,
        "similarity": row.similarity,
        "threshold": row.threshold,
    }


def _in_words(leak: Mapping[str, Any]) -> str:
    return (
        "{image} ({image_split} of {image_dataset}) shows {shows} ({shows_split}, {problem}, {measure} {similarity:.2f} "
        "above {threshold:.2f})".format_map(leak)
    )
