"""Whether higher or lower values of a score are better.

MaskLoom's own scores stand in one table. Scores of other software are judged by the words of their
name. What follows ` of `, ` at `, `@`, ` without `, ` given `, a comma or a parenthesis names a class, an
operating point or a unit, such as `Dice of bone loss` or `TPR@FPR=0.05`: it says nothing of the direction.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from math import inf

from maskloom.evaluate.scores.classification import CALIBRATION_ERROR, CLASSIFICATION_SCORES
from maskloom.evaluate.scores.segmentation import DICE, FALSE_POSITIVES, HD95, IOU, SENSITIVITY, UNBOUNDED

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
"""By whole name, or by what stands before a class, a threshold or a unit. All are from 0 to 1 but for `UNBOUNDED`."""
TURNING = (
    r"errors?|err|(log|dice|focal|hinge|ce)?loss(es)?|diffs?|differences?|deviations?|divergences?"
    r"|failures?|drops?|uncertainty"
)
"""Words that turn the score before them: `Dice loss`, `volume similarity error`."""
LOWER_WORDS = re.compile(
    rf"\b\d*({TURNING}|brier|(cross)?entropy|bce|perplexity|miss(ed|es|rate)?|misclassifi\w+|undetected|unfound"
    r"|mistakes?|wrong|incorrect\w*|not (detected|found|correct)|ce|(negative|neg) log likelihood|nll|time|latency|runtime|ranks?"
    r"|false (positives?|negatives?|pos|neg|alarms?|discover(y|ies))|fall ?out|(?<!non )fail(ed|s)?|outliers?|hausdorff"
    r"|distances?|dist|dissimilarity|bias"
    r"|m?hd|h(?=95)|hd ?max|hter|acer|ber|dssim|xent|ahd|asd|absd|msd|masd|assd|mssd|rmssd|rmsd|rms|emd|mmd|kld?|jsd"
    r"|fps?|fns?|fpr|fnr|fdr|fppi|fnpi|eer|n?mae|med ?ae|s?mape|[nr]*mse|rmsle|ece|ace|mce"
    r"|vd|avd|rvd|ravd|voe|tre|aurc|lpips|fid|kid|l[12])\d*(mm|px|vox)?\b"
)
"""Whole words of names, in lower case, of which less is better; digits before and after are ignored."""
SHARE_WORDS = (
    r"(cl)?dice|dsc|(m ?)?io ?u|jaccard|b?acc|accuracy|precision|recall|sens|sensitivity|spec|specificity"
    r"|p?auc|auroc|auprc|roc|m?ap|f(?=\d)|tpr|tnr|ppv|npv|predictive value|nsd|overlap|correct|detected"
)
"""Words of names of shares, of which more is better; whatever their unit, none is below 0."""
SHARES = re.compile(rf"\b\d*({SHARE_WORDS})\d*\b")
DISTANCES = re.compile(r"\b\d*(m?hd|hausdorff|m?as?sd|absd|rmssd|surface distance)\d*\b")
"""Words of names of distances between surfaces, of which none is below 0 either."""
CHANGES = re.compile(
    rf"\b({TURNING}|changes?|gains?|reductions?|improvements?|increases?|decreases?|deltas?|minus|skill|log|logit|z|relative|adjusted)\b"
)
"""Words of names of what may be negative although a share, or a distance, is in the name."""
AT_MOST_ONE = re.compile(
    rf"\b\d*({SHARE_WORDS}|f ?(score|beta|measure)|s[oø]rensen|tversky|g?dsc|s?dice(\dd)?|(hit|detection|success) rate"
    r"|pq|top|ssim|c index|concordance|mcc|kappa|icc|agreement|similarity|voe)\d*\b"
)
"""Words of names of what is at most 1, or 100 %; some, such as kappa, may be below 0."""
COUNTED = re.compile(r"\b(n|num|numbers?|counts?|sum|total|detected|correct|mm|cm|ml)\b")
"""Words of names of what may be a number of things, or a size: above 1 without being percent."""
SIZED = re.compile(r"[(\[](mm|cm|ml|px|pixels?|vox(els?)?|n|count)\b")
"""A unit in brackets, likewise."""
HIGHER_WORDS = re.compile(
    rf"(?<!\bnot )(?<!\bnon )(?<!\bun )(?<!\bfalse )\b\d*({SHARE_WORDS}|au?froc|mfroc|cpm|kappa|mcc"
    r"|ssim|psnr|snr|correlation|pearson|spearman|icc|ccc|r(?=2)|youden|similarity|agreement|concordance)\d*\b"
)
"""Likewise, of which more is better."""
TURNED = re.compile(rf"\b({TURNING}|distances?|dissimilarity|complement|gap|std|sd|var(iance)?)\b")
OPPOSITE = re.compile(r"\b(free|skill|reductions?|improvements?|decreases?)\b")
"""Words that turn an error round: `error reduction`, `miss-free rate`."""
STATED = re.compile(r"\b(higher|lower) (?:is )?better\b")
"""What the name itself says of its direction."""
CONDITION = re.compile(r"(?<=\w)(\s*[@(\[]|[\s_](at|without|given|of|per|in|for|on|among)[\s_])", re.IGNORECASE)
"""What stands before an operating point, a denominator or a subset: `TPR@FPR=0.05`, `sensitivity_at_2_fp`."""
COUNTS = re.compile(
    r"(mean|average|median|total|sum|number|no\.|rate|share|percentage|fraction|count) of ", re.IGNORECASE
)
COMPLEMENT = re.compile(
    r"(negated|(negative|neg)(?! (log|predictive|likelihood))|inv(erse|erted)?|minus)\b|(1|one) minus\b|1 ?[-/]|-",
    re.IGNORECASE,
)
"""How the name of a negated score, or of one minus a score, begins."""
CAMEL_CASE = r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z]{2})|(?<=[A-Z]\d)(?=[A-Z][a-z])"
"""Where `meanError`, `MSELoss` and `F1Score` have two words."""
RUN_TOGETHER = re.compile(
    r"(?<=[a-z0-9])(?=(scores?|coeff?|coefficient|index|loss|distance|accuracy|entropy)\b)"
    r"|(?<=[a-z])(?=(mm|px)\b)|(?<=[a-z]{3})(?=(dice|iou|jaccard|auroc|entropy)\b)",
    re.IGNORECASE,
)
"""Where `f1score`, `softdice` and `hausdorffdistance` have two words."""
SPELLED_OUT = {
    r"\bnormali[sz]ed surface (distance|dice)\b": "nsd",
    r"\b(cmc )?rank ?\d+\b|\b(mean )?reciprocal rank\b": "accuracy",
    r"\b(true positive|tp) rate\b|\bltpr\b": "tpr",
    r"\b(true negative|tn) rate\b": "tnr",
    r"\b(in ?accuracy|im ?precision|dis ?agreement|nonoverlap|mismatch(es)?)\b": "error",
}
"""Names by their usual abbreviation, where their words would mislead."""


@dataclass(frozen=True)
class Direction:
    """Which values of a score are better, and how that was found.

    Attributes:
        better: `higher` or `lower`.
        source: `known` of MaskLoom's own scores, `stated` by the user, by its `name`, or `default` where
            the name has no known word, or words of both directions.
    """

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
    if (own := own_score(score)) is not None:
        return Direction(OWN_SCORES[own], "known")
    if told := STATED.search(re.sub(r"[\W_]+", " ", score).lower()):
        return Direction(told[1], "name")
    words, negated = _measured(score)
    better = _named_direction(words)
    if better is None:
        return Direction(HIGHER, "default")
    return Direction(better if not negated else HIGHER if better == LOWER else LOWER, "name")


def _measured(score: str) -> tuple[str, bool]:
    """Return the words that say what is measured, in lower case, and whether the score is its negative or one minus it."""
    head = re.sub("[\u2010-\u2015\u2212]", "-", subject(score)).replace("_", " ")  # any dash
    spaced = re.sub(CAMEL_CASE, " ", head)
    negated = COMPLEMENT.match(spaced)
    measured = CONDITION.split(spaced[negated.end() :] if negated else head, maxsplit=1)[0]
    words = re.sub(CAMEL_CASE, " ", RUN_TOGETHER.sub(" ", re.sub(r"[\W_]+", " ", measured))).strip().lower()
    for name, abbreviation in SPELLED_OUT.items():
        words = re.sub(name, abbreviation, words)
    return words, bool(negated)


def _named_direction(words: str) -> str | None:
    """Return what the words of a name say, or None where they say nothing or both."""
    higher, lower = list(HIGHER_WORDS.finditer(words)), LOWER_WORDS.search(words)
    if OPPOSITE.search(words):
        return HIGHER if lower and not higher else None
    if higher and TURNED.search(words, higher[-1].end()):
        return None if "minus" in words else LOWER
    return None if higher and lower else HIGHER if higher else LOWER if lower else None


def own_score(score: str) -> str | None:
    """Return the name under which `OWN_SCORES` has a score; None where it is not MaskLoom's own."""
    return next((name for name in (score, subject(score)) if name in OWN_SCORES), None)


def known_bounds(score: str) -> tuple[float, float]:
    """Return the lowest and the highest value that a score can have; infinite where that is not known.

    Other software writes shares, such as `dsc`, from 0 to 1 or in percent, and distances in any unit.
    """
    own = own_score(score)
    if own is None:
        words, negated = _measured(score)
        is_known = not negated and (SHARES.search(words) or DISTANCES.search(words)) and not CHANGES.search(words)
        return 0.0 if is_known else -inf, inf
    return 0.0, inf if own in UNBOUNDED else 1.0


def is_share(score: str) -> bool:
    """Return whether a score is known to be at most 1, or 100 in percent."""
    own = own_score(score)
    if own is not None:
        return own not in UNBOUNDED
    words, negated = _measured(score)
    return (
        not negated
        and bool(AT_MOST_ONE.search(words))
        and not (CHANGES.search(words) or COUNTED.search(words) or SIZED.search(score.lower()))
    )


def is_distance(score: str) -> bool:
    """Return whether a score is known to be a distance, in any unit, or another of MaskLoom's own without a bound."""
    return own_score(score) in UNBOUNDED or bool(DISTANCES.search(_measured(score)[0]))


def worst_value(score: str, lower: bool) -> float:
    """Return the worst value that a score can have; infinite where there is none, or it is not known.

    Args:
        score: its name; other software's names of shares, such as `dsc` or `NSD`, are known, too.
        lower: whether lower values of it are better.
    """
    if own_score(score) is not None:
        return known_bounds(score)[lower]
    words, negated = _measured(score)
    is_share = not (lower or negated) and _named_direction(words) == HIGHER and SHARES.search(words)
    return 0.0 if is_share else inf if lower else -inf


def subject(score: str) -> str:
    """Return the part of a score's name that says what is measured: `Dice` of `Dice of bone loss`."""
    counted = COUNTS.match(score)
    return re.split(r" of | at |, | \(", score[counted.end() :] if counted else score, maxsplit=1)[0]


def is_lower_better(score: str) -> bool:
    """Return whether a lower value of a score is better, as far as its name says."""
    return direction(score).better == LOWER
