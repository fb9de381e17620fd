"""Turns a planned row into what the generator sees: mask, conditioning image, prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from maskloom.generate.generator import Condition
from maskloom.generate.planning import PlannedRow, TrainRow, group_by_label, replacement_parents
from maskloom.generate.warping import valid_warp
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.prompts import mask_attributes, render_prompt, template_keys
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

Picture = NDArray[np.uint8]

# By `data.conditioning`: the column that a conditioning image is drawn from besides the mask. A train row's stored conditioning image
# is the paired picture itself where that is what ControlNet sees.
PICTURE_COLUMN: Mapping[str, str | None] = {
    "mask": None,
    "edges": "image",
    "both": "image",
    "foreground": "image",
    "image": "conditioning_image",
}


@dataclass(frozen=True)
class ResolvedRow:
    """A planned row with everything that is made before its image.

    Attributes:
        parent: the train row whose mask it is; another than planned where that one could not be warped, None where it was drawn.
        condition: what the generator sees, or what was made from the drawn mask.
        attributes: the values behind the prompt.
        rejected: masks that were tried and given up, as ledger rows.
    """

    planned: PlannedRow
    parent: TrainRow | None
    condition: Condition
    attributes: Mapping[str, str]
    rejected: Sequence[Mapping[str, str]]


class ConditionReader:
    """Reads masks of the train split, and the pictures that conditioning images are drawn from, one row at a time."""

    def __init__(self, dataset: MaskPromptDataset, config: ExperimentConfig, parents: Sequence[TrainRow]) -> None:
        """Open the train split; only the columns that are needed are ever decoded.

        Args:
            dataset: the real dataset.
            config: warping limits and the seed.
            parents: the rows of the train split.
        """
        self.description, self.config = dataset.description, config
        self.by_label = group_by_label(parents)
        self.drawn_from = PICTURE_COLUMN[self.description.conditioning]
        self.table = dataset.split("train").select_columns(["mask", *([self.drawn_from] if self.drawn_from else [])])
        self._may_be_empty: dict[int | None, bool] = {}

    @cached_property
    def labels_with_masks(self) -> set[int | None]:
        """The labels of rows that have a mask."""
        has_mask = self.table.with_format("arrow")[:]["mask"].is_valid().to_pylist()
        return {label for label, rows in self.by_label.items() if any(has_mask[row.position] for row in rows)}

    def may_be_empty(self, label: int | None) -> bool:
        """Return whether some mask of a label's rows has no foreground; read when first asked for."""
        if label not in self._may_be_empty:
            masks = (self.table[row.position]["mask"] for row in self.by_label[label])
            self._may_be_empty[label] = any(mask is not None and not np.asarray(mask).any() for mask in masks)
        return self._may_be_empty[label]

    def resolve(self, row: PlannedRow) -> ResolvedRow:
        """Return the row's condition; the same row always gives the same condition.

        Raises:
            MaskLoomError: no mask of the row's class can be warped within the limits.
        """
        rejected: list[Mapping[str, str]] = []
        for tried, parent in enumerate(replacement_parents(row, self.by_label, self.config.seed)):
            try:
                mask, picture = self._pictures(row, parent, tried)
            except RejectedSample as problem:
                rejected.append({"path": parent.sample_id, "reason": f"row {row.index}: {problem}"})
                continue
            return self._resolved(row, parent, mask, picture, rejected)
        raise MaskLoomError(
            f"no mask like {row.parent.sample_id!r} can be warped: {rejected[-1]['reason']}; "
            "loosen generate.warp or set generate.mask_source=[train]"
        )

    def prompts(self, rows: Sequence[PlannedRow]) -> list[str]:
        """Return the prompts of planned rows with the words of the masks as they are in the train split; decodes no mask."""
        about = self.description
        attributes = [{**self._known(row.parent), **row.parent.attributes} for row in rows]
        usable = [
            (row, values)
            for row, values in zip(rows, attributes, strict=True)
            if any(template_keys(template) <= values.keys() for template in about.prompt_templates)
        ]
        return [render_prompt(about.prompt_templates, f"row-{row.index}", values) for row, values in usable]

    def _known(self, parent: TrainRow) -> dict[str, str]:
        """Return the values of a prompt that no mask is needed for."""
        about = self.description
        label = {} if parent.label is None or not about.labels else {"label": about.labels[parent.label]}
        return {"modality": about.modality, **label}

    def _pictures(self, row: PlannedRow, parent: TrainRow, tried: int) -> tuple[Picture | None, Picture | None]:
        """Return the mask and the picture that the conditioning image is drawn from, warped alike where the row says so.

        Each is None where there is none or it is not needed. The picture is the train image, or its paired picture.
        """
        cells = self.table[parent.position]
        mask = None if cells["mask"] is None else np.asarray(cells["mask"], dtype=np.uint8)
        picture = np.asarray(cells[self.drawn_from], dtype=np.uint8) if self.drawn_from else None
        if row.source == "train" or (mask is None and picture is None):
            return mask, picture
        return valid_warp(mask, picture, self.config.generate.warp, (self.config.seed, row.index, tried))

    def _resolved(
        self,
        row: PlannedRow,
        parent: TrainRow,
        mask: Picture | None,
        picture: Picture | None,
        rejected: Sequence[Mapping[str, str]],
    ) -> ResolvedRow:
        about = self.description
        of_mask = mask_attributes(mask, about.mask_classes)
        attributes = {**self._known(parent), **parent.attributes, **of_mask}
        paired = picture if about.conditioning == "image" else None
        image = np.zeros(about.image_size, np.uint8) if picture is None else picture
        seen = conditioning_image(mask, image, about.conditioning, about.palette, paired)
        # The template is chosen by the row, not by the parent: a mask that is used again gets other words as well.
        text = render_prompt(about.prompt_templates, f"row-{row.index}", attributes)
        return ResolvedRow(row, parent, Condition(text, mask, seen, parent.label, row.seed), attributes, rejected)
