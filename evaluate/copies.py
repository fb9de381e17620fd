"""The synthetic images that are copies of training images, judged one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet, filled, grey_batches
from maskloom.pipeline.errors import LeakedImages
from maskloom.pipeline.results import NAMED_COPIES, CopyRow, named_copies
from maskloom.pipeline.runs.sample_files import files_in_words

if TYPE_CHECKING:
    from maskloom.evaluate.scores.copies import CopySearch, Matches


@dataclass(frozen=True)
class CopyJudgement:
    """What was found in a real dataset and the synthetic ones made from it.

    Attributes:
        thresholds: by measure, the similarity above which an image is a copy.
        held_out: held-out real images that are copies of training images themselves.
        synthetic: the copies of each synthetic set, by its name.
        average: by measure, the similarity that the average training image of any class reaches.
    """

    thresholds: dict[str, float]
    held_out: list[CopyRow]
    synthetic: dict[str, list[CopyRow]]
    average: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CopyJudge:
    """Finds copies of known images in any image set, by what is usual among other real images.

    Attributes:
        search: the search among the known images: those of train, or the held-out ones (`evaluate.leaks`).
        originals: their sample ids.
        thresholds: see `CopyJudgement`.
        held_out: the images that set the thresholds and are copies of known images themselves.
    """

    search: CopySearch
    originals: list[str]
    thresholds: dict[str, float]
    held_out: list[CopyRow]

    def copies_in(self, image_set: ImageSet) -> list[CopyRow]:
        """Return the images of a set that are copies of known images."""
        if not len(image_set):
            return []
        found = self.search.matches_in(comparable_batches(image_set), len(image_set))
        return copy_rows(image_set.columns["sample_id"], self.originals, found, self.thresholds)


def copy_judge(inputs: EvaluationInputs) -> CopyJudge:
    """Return the judge of the real images, whatever the synthetic sets.

    It is calibrated once. The descriptors that it searches, 36 kB per image, are made again after a
    release.
    """
    from maskloom.evaluate.scores.copies import CopySearch

    held_out = [one for one in (inputs.validation, inputs.test) if len(one)]
    search: CopySearch = inputs.once("copy search", lambda: CopySearch(comparable(inputs.train)), large=True)
    originals = inputs.train.columns["sample_id"]
    thresholds, copies = inputs.once("copy thresholds", lambda: calibration(search, originals, held_out))
    return CopyJudge(search, originals, thresholds, copies)


def judged_copies(inputs: EvaluationInputs) -> CopyJudgement:
    """Return the copies in every synthetic set; computed once."""
    found: CopyJudgement = inputs.once("copies", lambda: _judged(inputs))
    return found


def require_no_training_copies(inputs: EvaluationInputs, listed: Path) -> None:
    """Check that no synthetic image is a copy, where copies are to stop the evaluation.

    Args:
        inputs: the sets.
        listed: the file that lists all copies, for the error.

    Raises:
        LeakedImages: some are; names the first of each set with their originals.
    """
    if inputs.on_copies != "stop":
        return
    found, named = [], []
    for name, copies in judged_copies(inputs).synthetic.items():
        folder, count = inputs.synthetic[name].dataset.folder, len(inputs.synthetic[name])
        if copies:
            found.append(
                f"{folder}: {len(copies)} of {count} images are copies of training images: {named_copies(copies)}"
            )
        for row in copies[:NAMED_COPIES]:
            named += [(folder, row.sample_id), (inputs.real.folder, row.original)]
    if found:
        raise LeakedImages(
            " | ".join(found),
            f"{listed} lists all of them: delete them, or set evaluate.on_copies=drop to leave them out",
            files_in_words(named),
        )


def searched_sets(inputs: EvaluationInputs) -> dict[str, list[CopyRow]]:
    """Return the copies in each set by its digest, where they were or must be searched; else nothing."""
    judgement = judged_copies(inputs) if inputs.on_copies == "stop" else inputs.made("copies")
    if judgement is None:
        return {}
    return {inputs.synthetic[name].dataset.digest: rows for name, rows in judgement.synthetic.items()}


def rows_without_copies(inputs: EvaluationInputs, name: str, samples: list[str]) -> NDArray[np.int64]:
    """Return the rows of a synthetic set that downstream models train on, by their sample ids."""
    if inputs.on_copies != "drop":
        return np.arange(len(samples))
    copies = {row.sample_id for row in judged_copies(inputs).synthetic[name]}
    return np.array([row for row, sample in enumerate(samples) if sample not in copies], dtype=np.int64)


def left_out_warnings(inputs: EvaluationInputs, names: Iterable[str]) -> list[str]:
    """Return which copies downstream models do not see."""
    if inputs.on_copies != "drop":
        return []
    found = {name: judged_copies(inputs).synthetic[name] for name in names}
    return [
        f"{name}: {len(copies)} images are left out, because they are copies of training images: {named_copies(copies)}"
        for name, copies in found.items()
        if copies
    ]


def left_out_words(inputs: EvaluationInputs, names: Iterable[str]) -> str:
    """Return how many images downstream models do not see, for the end of a verdict."""
    if inputs.on_copies != "drop":
        return ""
    counts = {name: (len(judged_copies(inputs).synthetic[name]), len(inputs.synthetic[name])) for name in names}
    return "".join(
        f" {copies} of {total} {name} images were left out, as they are copies of training images."
        for name, (copies, total) in counts.items()
        if copies
    )


def calibrated_judge(
    known: Sequence[ImageSet],
    unseen: Sequence[ImageSet],
    margin: float = 0.0,
) -> CopyJudge:
    """Return a judge that finds copies of known images.

    Args:
        known: the image sets that are searched.
        unseen: real images of other groups, which set the thresholds.
        margin: see `copy_threshold`.
    """
    from maskloom.evaluate.scores.copies import CopySearch

    search = CopySearch(np.concatenate([batch for one in known for batch in comparable_batches(one)]))
    originals = [sample for one in known for sample in one.columns["sample_id"]]
    return CopyJudge(search, originals, *calibration(search, originals, unseen, margin))


def calibration(
    search: CopySearch,
    originals: list[str],
    unseen: Sequence[ImageSet],
    margin: float = 0.0,
) -> tuple[dict[str, float], list[CopyRow]]:
    """Return the thresholds of copies by measure, and the unseen images that are copies.

    Args:
        search: the search among the known images.
        originals: their sample ids.
        unseen: see `calibrated_judge`.
        margin: see `copy_threshold`.
    """
    from maskloom.evaluate.scores.copies import SIMILARITIES, copy_thresholds

    matches = [search.matches_in(comparable_batches(one), len(one)) for one in unseen]
    best = {name: np.concatenate([np.zeros(0), *(one.similarity[name] for one in matches)]) for name in SIMILARITIES}
    thresholds = copy_thresholds(best, len(originals), margin)
    copies = [
        row
        for one, found in zip(unseen, matches, strict=True)
        for row in copy_rows(one.columns["sample_id"], originals, found, thresholds)
    ]
    return thresholds, copies


def _judged(inputs: EvaluationInputs) -> CopyJudgement:
    judge, labels = copy_judge(inputs), inputs.train.labels
    averages = np.stack(
        [judge.search.train.mean(axis=0, where=(labels == one)[:, None, None]) for one in np.unique(labels)]
    )
    of_averages = judge.search.matches(averages.round().astype(np.uint8)).similarity
    return CopyJudgement(
        judge.thresholds,
        judge.held_out,
        {name: judge.copies_in(one) for name, one in inputs.synthetic.items()},
        {name: float(values.max()) for name, values in of_averages.items()},
    )


def copy_rows(samples: list[str], originals: list[str], found: Matches, thresholds: dict[str, float]) -> list[CopyRow]:
    """Return the images that exceed a threshold, each by the measure that exceeds its own most.

    The original is named by a measure that looks closer. Among images that resemble each other, such as
    neighbouring slices, short descriptors often prefer a neighbour of the true one. Coarse details
    after registration, together with the whole image, tell them apart; where only a part agrees, the
    displaced part does.

    Args:
        samples: sample ids of the images.
        originals: sample ids of the training images.
        found: the best matches of the images.
        thresholds: by measure.
    """
    from maskloom.evaluate.scores.copies import OVERLAP, PART, SIMILARITIES, WHOLE_COARSE

    excess = np.stack([fisher_z(found.similarity[name]) - fisher_z(thresholds[name]) for name in SIMILARITIES])
    rows = []
    for index in np.flatnonzero(excess.max(axis=0) > 0):
        name = SIMILARITIES[int(excess[:, index].argmax())]
        in_part = name in (PART, OVERLAP) and excess[SIMILARITIES.index(WHOLE_COARSE), index] <= 0
        closer = OVERLAP if in_part else WHOLE_COARSE
        rows.append(
            CopyRow(
                sample_id=samples[index],
                original=originals[found.index[closer][index]],
                transformation=found.transformation[closer][index],
                measure=name,
                similarity=round(float(found.similarity[name][index]), 4),
                threshold=round(thresholds[name], 4),
            )
        )
    return rows


def comparable(image_set: ImageSet) -> NDArray[np.uint8]:
    """Return the images of a set as the search for copies compares them, (N, side, side) uint8."""
    from maskloom.evaluate.scores.descriptors import SIDE

    return filled(comparable_batches(image_set), (len(image_set), SIDE, SIDE))


def comparable_batches(image_set: ImageSet, rows: Sequence[int] | None = None) -> Iterator[NDArray[np.uint8]]:
    """Yield images in grey without uniform borders, (B, side, side) uint8; see `ImageSet.batches`."""
    from maskloom.evaluate.scores.borders import without_border
    from maskloom.evaluate.scores.descriptors import SIDE

    for batch in grey_batches(image_set, SIDE, rows):
        yield np.stack([without_border(image) for image in batch])


def fisher_z(similarity: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Return Fisher's z of similarities in 0..1."""
    return np.asarray(np.arctanh(np.clip(similarity, 0, 0.999999)))
