"""What would mislead in the images to judge: few test groups, classes of one side, inverted masks, transparency."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.compare import FEW_GROUPS
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run

OUTLINE = 0.9  # of a bounding box: fraction of its border that is foreground if the mask is a frame
MOST, FEW = 0.5, 0.1  # fractions of the masks
UNLIKE = 5.0  # ratio of the marked areas
TOO_DARK = 0.25  # fraction of all pixels
BLANK = 0.001, 0.999  # quantiles of the pixels that are equal where an image shows nothing


@dataclass(frozen=True)
class MaskShares:
    """What the masks of a dataset mark.

    Attributes:
        masks: how many are not empty.
        marked: mean fraction of the image that is foreground.
        frames: fraction of the masks whose foreground lies around the rest, from border to border.
    """

    masks: int
    marked: float
    frames: float


def few_groups_remark(real: MaskPromptDataset) -> str:
    """Return that the test split has too few groups for a finding on downstream models, or an empty text."""
    groups = {row["group_id"] for row in real.rows(None, ["group_id"])}
    test = {row["group_id"] for row in real.rows("test", ["group_id"])} if "test" in real.contract.splits else set()
    if len(test) >= FEW_GROUPS:
        return ""
    needed = "add real images that have as many"
    if test:
        enough = -(-len(groups) * FEW_GROUPS // len(test))
        needed = (
            f"give about {enough} real groups (patients, or images without near-duplicates) instead of {len(groups)}"
        )
    return (
        f"{real.folder}: the test split has {len(test)} group(s); whether the synthetic images help a model cannot be told "
        f"from fewer than {FEW_GROUPS}: {needed}"
    )


def classes_remark(real: Collection[str], given: Collection[str]) -> str:
    """Return that the images to judge have classes and the real ones have none; empty otherwise.

    Args:
        real: the classes of the real images.
        given: those of the images to judge.
    """
    if real or not given:
        return ""
    return (
        f"The classes of the synthetic images ({', '.join(given)}) are left out, because the real images have none; if they have "
        "some, say where these are read from: data.options.label_from, label_pattern or label_column."
    )


def mask_shares(dataset: MaskPromptDataset) -> MaskShares:
    """Return what the masks of a dataset mark; empty masks do not count."""
    stored = (row["mask"] for row in dataset.rows(None, ["mask"]) if row["mask"] is not None)
    masks = [mask > 0 for one in stored if (mask := png_array(one["bytes"])).any()]
    if not masks:
        return MaskShares(0, 0.0, 0.0)
    marked, frames = (float(np.mean(values)) for values in ([m.mean() for m in masks], [is_frame(m) for m in masks]))
    return MaskShares(len(masks), marked, frames)


def is_frame(mask: NDArray[np.bool_]) -> bool:
    """Whether the foreground, (H, W), encloses background and reaches from one border to the opposite one.

    The bounding box counts, because images are padded to their size.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    outline = np.concatenate([box[0], box[-1], box[:, 0], box[:, -1]])
    spans = box.shape[0] == mask.shape[0] or box.shape[1] == mask.shape[1]
    return bool(spans and not box.all() and outline.mean() >= OUTLINE)


def mask_remark(real: MaskPromptDataset, given: MaskPromptDataset, where: Path, stated: bool) -> str:
    """Return a sentence about masks that mark something else than the real ones; empty if they do not.

    Args:
        real: the real dataset.
        given: the images to judge.
        where: the folder that the user gave, for errors.
        stated: whether the user has said what the mask values mean, or has no way to say it.

    Raises:
        MaskLoomError: the masks are plainly inverted, and the user has not said that this is right.
    """
    ours, theirs = mask_shares(real), mask_shares(given)
    if not ours.masks or not theirs.masks:
        return ""
    inverted = theirs.frames > MOST and ours.frames < FEW and theirs.marked > ours.marked
    if not inverted and max(ours.marked, theirs.marked) < UNLIKE * min(ours.marked, theirs.marked):
        return ""
    shares = (
        f"the masks mark {theirs.marked:.1%} of a synthetic image and {ours.marked:.1%} of a real one, and in {theirs.frames:.0%}"
        f" of the synthetic and {ours.frames:.0%} of the real masks the marked area runs around the border"
    )
    if inverted and not stated:
        name, key = real.description.mask_classes[1], "synthetic.options.mask_values"
        raise MaskLoomError(
            f"--synthetic {where}: foreground and background look exchanged in its masks: {shares}; exchange them: "
            f"{key}={{0: {name}, 255: background}}; or, if they are right, say so: {key}={{0: background, 255: {name}}} "
            "(with the values that the files hold)"
        )
    return f"Do the masks mean the same? {shares[0].upper()}{shares[1:]}."


def transparency_remark(real: MaskPromptDataset, given: MaskPromptDataset, where: Path) -> str:
    """Return a sentence about transparent pixels of the synthetic images, which have become black; empty without any.

    Raises:
        MaskLoomError: much of the synthetic images is transparent, and not of the real ones.
    """
    found = transparent_images(given)
    if not found:
        return ""
    dark, real_dark = (
        one.get("images", 0) * one.get("darkened", 0.0) / of.num_rows
        for one, of in ((found, given), (transparent_images(real), real))
    )
    told = f"{found['images']} of {given.num_rows} synthetic images have transparent pixels (such as {found['first']})"
    if dark >= TOO_DARK > real_dark:
        raise MaskLoomError(
            f"--synthetic {where}: {told}; on black, {dark:.0%} of all pixels would lose what they show; save the images without "
            "transparency, on the background that they should have"
        )
    return f"{told}, which became black: {found['darkened']:.0%} of their pixels are darker."


def blank_remark(given: MaskPromptDataset) -> str:
    """Return a sentence about synthetic images that show next to nothing, as after a conversion; empty without any."""
    pictures = (
        (row["sample_id"], png_array(row["image"]["bytes"])) for row in given.rows(None, ["sample_id", "image"])
    )
    blank = [name for name, picture in pictures if np.ptp(np.quantile(picture, BLANK)) <= 1]
    if not blank:
        return ""
    return (
        f"{len(blank)} of {given.num_rows} synthetic images are of one grey level all over (such as {blank[0]}): were they "
        "converted correctly? They are judged as they are."
    )


def transparent_images(dataset: MaskPromptDataset) -> dict[str, Any]:
    """Return what `prepare` has recorded of transparent images; empty for a dataset without a run."""
    try:
        record = read_record(Run(dataset.folder.parent), "prepare")
    except MaskLoomError:  # of a prepared dataset, whose run may be damaged
        return {}
    return {} if record is None else dict(record.results.get("transparent", {}))
