"""What was judged: one line per image, counts by class and reason, and what loses more than the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.filtering.judge import Judgement
from maskloom.evaluate.inputs import ImageSet
from maskloom.pipeline.filter_summary import SubsetCounts

NO_CLASS = "no class"
SMALL = "small lesions (the third with the smallest masks)"
LOSES_MORE, UNLIKELY = 0.1, 0.01  # difference of the rejected shares, and its largest p value, for a warning
AREA_SIDE = 128


@dataclass(frozen=True)
class Draw:
    """The judged images of one round.

    Attributes:
        number: of the round; 0: the generated dataset.
        image_set: its images.
        rows: index in the plan of each image, (N,), ascending.
        judgement: of its images.
    """

    number: int
    image_set: ImageSet
    rows: NDArray[np.int64]
    judgement: Judgement


def class_names(image_set: ImageSet) -> list[str]:
    """Return the name of each image's class."""
    about = image_set.dataset.description
    return [about.label_name(label) or NO_CLASS for label in image_set.columns["label"]]


def ledger_rows(draw: Draw, thresholds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return one line of the ledger per image of a round, in order."""
    columns, names, judgement = draw.image_set.columns, class_names(draw.image_set), draw.judgement
    lines = []
    for place, sample in enumerate(columns["sample_id"]):
        failed = [name for name, rejected in judgement.rejected.items() if rejected[place]]
        scores = {name: _number(values[place]) for name, values in judgement.scores.items()}
        lines.append(
            {
                "sample_id": sample,
                "row": int(draw.rows[place]),
                "round": draw.number,
                "class": names[place],
                "parent_id": columns["parent_id"][place],
                "scores": scores,
                "thresholds": {name: _number(limit) for name, limit in thresholds.items()},
                "accepted": not failed,
                "rejected_by": failed,
                "reason": "; ".join(f"{name} {scores[name]:.3f} < {thresholds[name]:.3f}" for name in failed),
            }
        )
    return lines


def _number(value: float) -> float | None:
    """Return a score with six digits; None where the criterion does not apply."""
    return None if np.isnan(value) else round(float(value), 6)


def subset_counts(first: Draw, kept: NDArray[np.bool_]) -> list[SubsetCounts]:
    """Return the counts of each class and of small lesions.

    Args:
        first: the generated dataset, judged.
        kept: (N,) whether each of its rows was kept or filled again.
    """
    counts = []
    for name, members in subsets(first.image_set).items():
        by = {name: int(rejected[members].sum()) for name, rejected in first.judgement.rejected.items()}
        judged, rejected = int(members.sum()), int((~first.judgement.accepted[members]).sum())
        counts.append(
            SubsetCounts(
                name=name, images=judged, rejected=rejected, rejected_by=by, unfilled=int((~kept[members]).sum())
            )
        )
    return counts


def subsets(image_set: ImageSet) -> dict[str, NDArray[np.bool_]]:
    """Return which images are of each class, and which have the smallest masks, by name."""
    names = np.array(class_names(image_set))
    found = {name: names == name for name in dict.fromkeys(names.tolist())}
    areas = np.array([np.count_nonzero(mask) for mask in image_set.masks((AREA_SIDE, AREA_SIDE))[0]])
    visible = areas[areas > 0]
    if len(set(visible.tolist())) > 1:
        found[SMALL] = (areas > 0) & (areas <= np.quantile(visible, 1 / 3))
    return found


def loss_warnings(first: Draw) -> list[str]:
    """Return a sentence for each class, and for small lesions, that loses much more than the other images."""
    from scipy.stats import fisher_exact

    rejected, warnings = ~first.judgement.accepted, []
    for name, members in subsets(first.image_set).items():
        inside, outside = rejected[members], rejected[~members]
        if not len(outside) or inside.mean() - outside.mean() < LOSES_MORE:
            continue
        table = [[one.sum(), len(one) - one.sum()] for one in (inside, outside)]
        if fisher_exact(table, alternative="greater").pvalue < UNLIKELY:
            warnings.append(
                f"{name}: {inside.mean():.0%} of {len(inside)} images are rejected, and {outside.mean():.0%} of the others: "
                "the filter drops what is hard, and the filtered set shows less of it unless it is filled again"
            )
    return warnings


def unfilled_warnings(counts: Sequence[SubsetCounts]) -> list[str]:
    """Return a sentence about the rows of each class that no round could fill."""
    return [
        f"{one.name}: {one.unfilled} of {one.images} images are missing in the filtered set, because every draw was rejected"
        for one in counts
        if one.unfilled and one.name != SMALL
    ]
