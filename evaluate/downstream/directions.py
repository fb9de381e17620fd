"""Whether higher or lower values of a score are better.

MaskLoom's own scores stand in one table. Scores of other software are judged by the words of their
name. What follows ` of `, ` at `, a comma or a parenthesis names a class, a threshold or a unit, such as
`Dice of bone loss`: it says nothing of the direction.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from maskloom.evaluate.scores.classification import CALIBRATION_ERROR, CLASSIFICATION_SCORES
from maskloom.evaluate.scores.segmentation import DICE, FALSE_POSITIVES, HD95, IOU, SENSITIVITY

HIGHER, LOWER = "higher", "lower"
OWN_SCORES = {
    DICE: HIGHER,
    IOU: HIGHER,
    "surface Dice": HIGHER,
    HD95: LOWER,
    SENSITIVITY: HIGHER,
    FALSE_POSITIVES: LOWER,
    "recall": HIGHER,
    "specificity": HIGHER,
    **{name: LOWER if name == CALIBRATION_ERROR else HIGHER for name in CLASSIFICATION_SCORES},
}
"""By whole name, or by what stands before a class, a threshold or a unit."""
LOWER_WORDS = re.compile(
    r"\b(errors?|loss(es)?|brier|entropy|perplexity|divergence|differences?|deviations?|failures?"
    r"|miss(ed|es)?|misclassifi\w+|undetected|unfound|negative log likelihood"
    r"|false (positives?|negatives?|alarms?|discover(y|ies))"
    r"|(surface|boundary|contour|mean|average|median|wasserstein|fr[eé]chet|kernel) distances?"
    r"|hausdorff\d*|\d*hd\d*|asd|msd|masd|assd"
    r"|fps?|fns?|fpr|fnr|fdr|eer|mae|mape|mse|rmse|nrmse|ece|ace|mce|nll|bce|vd|avd|rvd|ravd|voe|tre|aurc"
    r"|lpips|fid|kid)(mm|px|vox)?\b"
)
"""Whole words of names, in lower case, of which less is better."""
OPPOSITE = re.compile(r"\b(free|reductions?|improvements?|decreases?|without (an )?(errors?|miss(es)?|failures?))\b")
"""Words that turn it round: `error reduction`, `share of cases without error`."""
COUNTS = re.compile(
    r"(mean|average|median|total|sum|number|no\.|rate|share|percentage|fraction|count) of ", re.IGNORECASE
)
COMPLEMENT = re.compile(r"(neg|negated)\b|1 ?-|-", re.IGNORECASE)
"""How the name of a negated score, or of one minus a score, begins."""


@dataclass(frozen=True)
class Direction:
    """Which values of a score are better, and why: `own`, `stated`, `name` or `default`."""

    better: str
    source: str


def direction(score: str, lower: Collection[str] = (), higher: Collection[str] = ()) -> Direction:
    """Return which values of a score are better.

    Args:
        score: its name.
        lower: scores of which less is better, whatever their name says.
        higher: likewise, of which more is better.
    """
    if score in lower or score in higher:
        return Direction(LOWER if score in lower else HIGHER, "stated")
    head = subject(score)
    for name in (score, head):
        if name in OWN_SCORES:
            return Direction(OWN_SCORES[name], "own")
    measured = re.sub("[\u2010-\u2015\u2212]", "-", head).replace("_", " ")  # any dash
    negated = COMPLEMENT.match(measured)
    measured = measured[negated.end() :] if negated else measured
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", measured).strip().lower()
    is_lower = bool(LOWER_WORDS.search(words)) and not OPPOSITE.search(words)
    if negated and (is_lower or measured.strip().lower() in map(str.lower, OWN_SCORES)):
        is_lower = not is_lower
    return Direction(LOWER, "name") if is_lower else Direction(HIGHER, "default")


def subject(score: str) -> str:
    """Return the part of a score's name that says what is measured: `Dice` of `Dice of bone loss`."""
    counted = COUNTS.match(score)
    return re.split(r" of | at |, | \(", score[counted.end() :] if counted else score, maxsplit=1)[0]


def is_lower_better(score: str) -> bool:
    """Return whether a lower value of a score is better, as far as its name says."""
    return direction(score).better == LOWER
