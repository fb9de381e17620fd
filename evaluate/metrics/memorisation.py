"""Does the generator repeat its training images?

The distance of each synthetic image to its nearest training image is measured in a network's
feature space and pixel by pixel. It is compared with the distances of real images that the
generator has not seen (validation and test). An image is flagged if it is closer to a training
image than nearly all of those. Apart from that, every image that is a copy of a training image,
whole or in part, is named with its original (`evaluate.copies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.copies import CopyJudgement, judged_copies
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet, grey_images
from maskloom.evaluate.scores.calibration import (
    chance_share,
    effective_count,
    held_out_share,
    joint_thresholds,
    too_few_held_out,
)
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, load_extractor, set_features
from maskloom.evaluate.scores.nearest import CROP, SIDE, Nearest, nearest_features, nearest_pixels
from maskloom.evaluate.scores.statistics import share_interval
from maskloom.evaluate.thumbnails import coloured_mask, image_grid
from maskloom.pipeline.config.bounds import Shown, Side
from maskloom.pipeline.results import (
    REAL,
    Cell,
    CopyRow,
    Curve,
    Figure,
    MetricResult,
    Picture,
    Table,
    named_copies,
    skipped_result,
)

VERSION = 13
QUESTION = "Does the generator repeat its training images?"
FEATURES, PIXELS = "features", "pixels"
FEW_HELD_OUT = 100


class Options(ExtractorOptions):
    """The feature extractor, the threshold, and the images shown."""

    percentile: float = Field(
        5.0,
        gt=0,
        lt=50,
        description="percentage of held-out real images that lie below a threshold; synthetic images below it are flagged",
    )
    shown_pairs: Shown = Field(6, ge=0, description="nearest pairs, and copies, shown for each generator")
    picture_side: Side = Field(128, ge=16, description="side of each shown image")


@dataclass(frozen=True)
class Audit:
    """The result for one generator.

    Attributes:
        image_set: the generator's images.
        nearest: by space, the nearest training image of each image.
        flagged: by space, (N,) whether the image lies below the threshold.
        parent_is_nearest: by space, (N,) whether the nearest training image is the one whose mask
            was used.
        chance: share flagged that chance reaches in images as far away as real ones, 0..1; None if
            there are too few held-out images to tell.
        copies: the images that are copies of training images.
    """

    image_set: ImageSet
    nearest: dict[str, Nearest]
    flagged: dict[str, NDArray[np.bool_]]
    parent_is_nearest: dict[str, NDArray[np.bool_]]
    chance: float | None
    copies: list[CopyRow] = field(default_factory=list)

    @property
    def flagged_in_both(self) -> NDArray[np.bool_]:
        """(N,) whether both spaces flag the image."""
        return self.flagged[FEATURES] & self.flagged[PIXELS]

    @property
    def flagged_in_either(self) -> NDArray[np.bool_]:
        """(N,) whether any space flags the image."""
        return self.flagged[FEATURES] | self.flagged[PIXELS]

    @property
    def parent_is_nearest_where_flagged(self) -> NDArray[np.bool_]:
        """(N,) whether the parent is the nearest training image in a space that flags the image."""
        return np.any([flagged & self.parent_is_nearest[space] for space, flagged in self.flagged.items()], axis=0)

    @property
    def flagged_copies(self) -> int:
        """Number of copies that are flagged too."""
        flagged = np.asarray(self.image_set.columns["sample_id"], dtype=object)[self.flagged_in_either]
        return len({row.sample_id for row in self.copies} & set(flagged))

    @property
    def is_near(self) -> bool:
        """Whether more images are flagged than chance explains."""
        return self.chance is not None and float(self.flagged_in_either.mean()) > self.chance


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Audit every generator.

    Raises:
        MaskLoomError: the extractor is unknown or cannot be loaded.
    """
    held_out = [one for one in (inputs.validation, inputs.test) if len(one)]
    generators = [one for one in inputs.synthetic.values() if len(one)]
    if not held_out or not generators:
        return skipped_result(
            QUESTION,
            "there is no synthetic image" if held_out else "there is no validation or test image to calibrate with",
        )
    judgement = judged_copies(inputs)
    inputs.release()  # the descriptors of that search need not lie in memory beside features
    extractor = load_extractor(inputs, options)
    nearest = nearest_by_space(inputs, extractor, [*held_out, *generators])
    distances = {
        space: np.concatenate([one.distance for one in found[: len(held_out)]]) for space, found in nearest.items()
    }
    groups = [group for one in held_out for group in one.groups]
    calibration = Calibration.of(distances, groups, options.percentile)
    audits = [
        _audit(
            inputs,
            one,
            {space: found[number] for space, found in nearest.items()},
            calibration,
            judgement.synthetic[one.name],
        )
        for number, one in enumerate(generators, len(held_out))
    ]
    return _result(inputs, options, extractor, calibration, judgement, audits)


def nearest_by_space(inputs: EvaluationInputs, extractor: Extractor, sets: list[ImageSet]) -> dict[str, list[Nearest]]:
    """Return, by space, the nearest training image of every image of each set."""
    train_features = set_features(inputs, extractor, inputs.train)
    by_features = [nearest_features(set_features(inputs, extractor, one), train_features) for one in sets]
    del train_features
    inputs.release()  # features need not lie in memory beside pixels
    train_pixels = grey_images(inputs.train, SIDE)
    by_pixels = [nearest_pixels(grey_images(one, SIDE), train_pixels) for one in sets]
    return {FEATURES: by_features, PIXELS: by_pixels}


def _audit(
    inputs: EvaluationInputs,
    image_set: ImageSet,
    nearest: dict[str, Nearest],
    calibration: Calibration,
    copies: list[CopyRow],
) -> Audit:
    train_ids = np.asarray(inputs.train.columns["sample_id"], dtype=object)
    parents = np.asarray(image_set.parents, dtype=object)
    return Audit(
        image_set,
        nearest,
        {space: found.distance < calibration.thresholds[space] for space, found in nearest.items()},
        {space: train_ids[found.index] == parents for space, found in nearest.items()},
        calibration.chance({space: found.distance for space, found in nearest.items()}, image_set.groups),
        copies,
    )


@dataclass(frozen=True)
class Calibration:
    """What held-out real images say of closeness.

    Attributes:
        distances: by space, (N,) of each held-out image to its nearest training image.
        thresholds: by space; a synthetic image below it is flagged.
        share: of the held-out images that are flagged, by cross-validation.
        expected: share of unseen real images that is flagged: the one asked for, or `share` if that
            is higher.
        effective: number of independent images that would tell as much as the held-out ones.
        too_few: why no set can be called nearer than they are; empty if they suffice.
    """

    distances: dict[str, NDArray[np.float64]]
    thresholds: dict[str, float]
    share: float
    expected: float
    effective: float
    too_few: str

    @classmethod
    def of(cls, distances: dict[str, NDArray[np.float64]], groups: Sequence[str], percentile: float) -> Calibration:
        """Return the calibration by held-out images with these distances and groups."""
        share = held_out_share(distances, groups, percentile)
        return cls(
            distances,
            joint_thresholds(distances, percentile),
            share,
            float(np.fmax(share, percentile / 100)),
            effective_count(distances, groups),
            too_few_held_out(groups, percentile),
        )

    def chance(self, distances: dict[str, NDArray[np.float64]], groups: Sequence[str]) -> float | None:
        """Return the share that chance flags in images with these distances and groups; see `Audit`."""
        if self.too_few:
            return None
        return chance_share(self.expected, self.effective, effective_count(distances, groups))

    def __len__(self) -> int:
        """Return the number of held-out images."""
        return len(self.distances[FEATURES])


def _result(
    inputs: EvaluationInputs,
    options: Options,
    extractor: Extractor,
    calibration: Calibration,
    judgement: CopyJudgement,
    audits: list[Audit],
) -> MetricResult:
    table, values = audit_table(options, audits)
    copied = [audit for audit in audits if audit.copies]
    pictures = [
        *(_copies_picture(inputs, options, audit) for audit in copied if options.shown_pairs),
        *(_picture(inputs, options, audit) for audit in audits if options.shown_pairs),
    ]
    return MetricResult(
        question=QUESTION,
        verdict=audit_verdict(audits, options, calibration.too_few),
        tables=[table, *(copies_table(audit) for audit in copied)],
        curves=[_curve(space, calibration.distances[space], audits) for space in (FEATURES, PIXELS)],
        pictures=pictures,
        warnings=_warnings(inputs, len(calibration), judgement, copied),
        limits=_limits(extractor, judgement),
        figures=_figures(options, judgement, audits),
        values={"held_out": _held_out_values(options, calibration, judgement), **values},
        n=inputs.counts(),
        copies={audit.image_set.name: audit.copies for audit in audits},
    )


def _warnings(inputs: EvaluationInputs, held_out: int, judgement: CopyJudgement, copied: list[Audit]) -> list[str]:
    """Return warnings of few held-out images, of copies among them, and of copies that are kept."""
    found = []
    if held_out < FEW_HELD_OUT:
        found.append(f"calibrated on only {held_out} held-out real images: the threshold is imprecise")
    if judgement.held_out:
        found.append(
            f"copies of training images among the {held_out} held-out real images: {len(judgement.held_out)} "
            f"({named_copies(judgement.held_out)}). Scores on them are too good for every arm; if two images show one "
            "patient, give the patient of each image as its group and prepare the dataset again"
        )
    if inputs.on_copies == "keep":
        found += [
            f"{audit.image_set.name}: its {len(audit.copies)} copies are kept (evaluate.on_copies=keep): models train on "
            "them, and export, combine and push pass them on"
            for audit in copied
        ]
    return found


def _limits(extractor: Extractor, judgement: CopyJudgement) -> list[str]:
    return [
        "Passing this audit does not guarantee privacy: it detects copies of whole images and of large parts, not of "
        "small parts or rare attributes.",
        "Before an evaluation, held-out images are searched for among the synthetic ones in the same way, and stop it. "
        "Copies and held-out images that are turned by other angles than 90 degrees, squeezed, strongly blurred, covered in "
        "part or beside another image may pass both searches.",
        f"Features: Euclidean distance, {extractor.title}. Pixels: 1 - correlation at {SIDE} x {SIDE}, best over flips "
        f"and {CROP:.0%} crops of the synthetic image.",
        average_sentence(judgement),
        "An image made from a training mask shares its anatomy with the image of that mask: such a pair is expected to "
        "be close, but still counts.",
    ]


def _held_out_values(options: Options, calibration: Calibration, judgement: CopyJudgement) -> dict[str, Any]:
    return {
        "n": len(calibration),
        "thresholds": calibration.thresholds,
        "percentile": options.percentile,
        "flagged_share": calibration.share,
        "effective": calibration.effective,
        "copy_thresholds": judgement.thresholds,
        "copies": [row.model_dump() for row in judgement.held_out],
        "average_image": judgement.average,
    }


def average_sentence(judgement: CopyJudgement) -> str:
    """Return what an image reaches that shows nothing but the anatomy which all images share."""
    reached = ", ".join(
        f"{name} {value:.2f} (copy from {judgement.thresholds[name]:.2f})" for name, value in judgement.average.items()
    )
    return f"For reference, the average training image of a class, which shows only what all images share, reaches these similarities to a training image: {reached}."


def audit_table(options: Options, audits: list[Audit]) -> tuple[Table, dict[str, Any]]:
    """Return one row per generator and space, and the same figures as values."""
    rows: list[list[Cell]] = []
    values: dict[str, Any] = {}
    for audit in audits:
        total, name = len(audit.image_set), audit.image_set.name
        values[name] = {"n": total, "chance": audit.chance, "copies": [row.model_dump() for row in audit.copies]}
        nearest = audit.parent_is_nearest
        spaces = (
            *((space, flagged, nearest[space]) for space, flagged in audit.flagged.items()),
            ("both", audit.flagged_in_both, nearest[FEATURES] & nearest[PIXELS]),
            ("either", audit.flagged_in_either, audit.parent_is_nearest_where_flagged),
        )
        for space, flagged, parent in spaces:
            share = share_interval(int(flagged.sum()), total)
            of_parent = share_interval(int((flagged & parent).sum()), int(flagged.sum()))
            has_parents = any(audit.image_set.parents)  # images made elsewhere have none
            rows.append([name, space, total, int(flagged.sum()), share, of_parent if has_parents else None])
            values[name][space] = {
                "flagged": int(flagged.sum()),
                "share": share.model_dump(),
                "parent_is_nearest": of_parent.model_dump(),
            }
    note = (
        f"Flagged: closer to a training image, in either space, than {100 - options.percentile:g} % of the held-out real images, so about {options.percentile:g} % "
        "would be flagged in either space if synthetic images were as far away as real ones, and fewer in each. 95 % Wilson intervals; they leave out "
        "how precisely the held-out images set the thresholds, which the share that chance reaches, in the verdict, counts. Last column: share of the flagged images "
        "whose nearest training image is the one whose mask they were made from: in that space, in both, or (either) in a space that flags them. "
        "Copies are found by another rule, after alignment and also in part: not every copy is close as a whole image."
    )
    columns = ["set", "space", "N", "flagged", "share flagged", "nearest is the mask's own image"]
    return Table(
        title="Synthetic images suspiciously close to a training image", note=note, columns=columns, rows=rows
    ), values


def copies_table(audit: Audit) -> Table:
    """Return one row per copy, with its original."""
    return Table(
        title=f"{audit.image_set.name}: copies of training images",
        note="Similarity is 0 to 1; no held-out real image that is not a copy itself reaches the threshold.",
        columns=["image", "original", "how it was changed", "measure", "similarity", "threshold"],
        rows=[
            [row.sample_id, row.original, row.transformation, row.measure, row.similarity, row.threshold]
            for row in audit.copies
        ],
    )


def _figures(options: Options, judgement: CopyJudgement, audits: list[Audit]) -> list[Figure]:
    """Return the number of copies, the share flagged, and what is expected of real images."""
    copies, near = "copies of training images", "suspiciously close to a training image"
    found = [Figure(of=REAL, name=copies, better="lower", value=len(judgement.held_out))]
    found += [Figure(of=one.image_set.name, name=copies, better="lower", value=len(one.copies)) for one in audits]
    found.append(Figure(of=REAL, name=near, better="lower", value=options.percentile / 100))
    for audit in audits:
        share = share_interval(int(audit.flagged_in_either.sum()), len(audit.image_set))
        found.append(Figure(of=audit.image_set.name, name=near, better="lower", **share.model_dump()))
    return found


def _curve(space: str, calibration: NDArray[np.float64], audits: list[Audit]) -> Curve:
    """Return, for each set, the share of images whose nearest training image is closer than x."""
    sets = {"held-out real": calibration, **{audit.image_set.name: audit.nearest[space].distance for audit in audits}}
    shares = np.linspace(0, 1, 51)
    series = {
        name: [(float(x), float(y)) for x, y in zip(np.quantile(distances, shares), shares, strict=True)]
        for name, distances in sets.items()
    }
    return Curve(
        title=f"Distance to the nearest training image ({space})",
        x_label="distance",
        y_label="share of images below",
        series=series,
    )


def _picture(inputs: EvaluationInputs, options: Options, audit: Audit) -> Picture:
    """Show the synthetic images closest to training images.

    One row each: the image, its nearest training image by features and by pixels, and its mask.
    """
    rank = sum(
        np.argsort(np.argsort(audit.nearest[space].distance, kind="stable"), kind="stable")
        for space in (FEATURES, PIXELS)
    )
    worst = np.argsort(rank, kind="stable")[: options.shown_pairs].tolist()
    size = (options.picture_side, options.picture_side)
    synthetic, masks = audit.image_set.images(size, worst), audit.image_set.masks(size, worst)[0]
    near = [inputs.train.images(size, audit.nearest[space].index[worst].tolist()) for space in (FEATURES, PIXELS)]
    coloured = [coloured_mask(mask, inputs.real.description.palette) for mask in masks]
    rows = [list(row) for row in zip(synthetic, *near, coloured, strict=True)]
    return Picture(
        title=f"{audit.image_set.name}: the images closest to training images",
        caption="From left to right: synthetic image, nearest training image by features, nearest by pixels, the mask it was made from. Nearest pairs first.",
        pixels=image_grid(rows, options.picture_side),
    )


def _copies_picture(inputs: EvaluationInputs, options: Options, audit: Audit) -> Picture:
    """Show the first copies, each beside its original."""
    size = (options.picture_side, options.picture_side)
    shown = audit.copies[: options.shown_pairs]
    copies = audit.image_set.images(size, [audit.image_set.columns["sample_id"].index(row.sample_id) for row in shown])
    originals = inputs.train.images(size, [inputs.train.columns["sample_id"].index(row.original) for row in shown])
    return Picture(
        title=f"{audit.image_set.name}: copies beside their originals",
        caption="Left: synthetic image. Right: the training image that it is a copy of. "
        + "; ".join(map(str, shown))
        + ".",
        pixels=image_grid([list(pair) for pair in zip(copies, originals, strict=True)], options.picture_side),
    )


def audit_verdict(audits: list[Audit], options: Options, too_few: str = "") -> str:
    """Return the copies with their originals, the share that is suspiciously close, and the finding.

    Args:
        audits: one per generator.
        options: options of the metric.
        too_few: why it cannot be told whether a set is nearer than held-out images; empty if it can.
    """
    copies = [
        f"{one.image_set.name}: {len(one.copies)} of {len(one.image_set)} images are copies of training images: "
        f"{named_copies(one.copies)}. "
        for one in audits
        if one.copies
    ]
    if not copies:
        copies = [f"{sum(len(one.image_set) for one in audits)} images, no copy of a training image. "]
    near = [_nearness(one) for one in audits if one.is_near]
    expected = f"{options.percentile:g} % of unseen real images would be; 95 % Wilson intervals"
    shares = f"Images suspiciously close to a training image ({expected}): {'; '.join(map(_share_text, audits))}."
    if any(one.copies for one in audits):
        shares += f" {_rules_text(audits)}"
    if near:
        finding = f" Finding: {'; '.join(near)}: inspect the pairs."
    elif too_few:
        finding = (
            f" Finding: cannot tell whether images are closer to training images than unseen real ones are: {too_few}."
        )
    else:
        finding = "" if any(one.copies for one in audits) else " Finding: no sign of copying."
    return "".join(copies) + shares + finding


def _share_text(audit: Audit) -> str:
    share = share_interval(int(audit.flagged_in_either.sum()), len(audit.image_set))
    reached = "" if audit.chance is None else f", chance reaches {audit.chance:.1%}"
    return f"{audit.image_set.name} {share.value:.1%} [{share.low:.1%}, {share.high:.1%}]{reached}"


def _rules_text(audits: list[Audit]) -> str:
    """Say why the number of copies and the share of close images are not the same."""
    numbers = [f"{one.image_set.name} {one.flagged_copies} of {len(one.copies)} copies" for one in audits if one.copies]
    return (
        "The two rules differ: an image is a copy if it shows a training image after alignment, or a part of one, and close if "
        "the whole image lies nearer than unseen real images do. A copy counts, close or not; close as well are: "
        f"{'; '.join(numbers)}."
    )


def _nearness(audit: Audit) -> str:
    """Name a set that is too near; both a copy and the shared mask can explain a parent's being nearest."""
    of_parent = audit.parent_is_nearest_where_flagged.sum() / audit.flagged_in_either.sum()
    return (
        f"{audit.image_set.name} is closer to training images than unseen real images are "
        f"(for {of_parent:.0%} of the flagged images, the nearest training image is the one whose mask was used)"
    )
