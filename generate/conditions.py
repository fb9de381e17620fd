"""Builds the condition of a planned row: mask, conditioning image and prompt."""

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

Pixels = NDArray[np.uint8]

# For each `data.conditioning`, the column that the conditioning image is derived from besides the
# mask. With `image`, the stored conditioning image of a train row is the paired image itself.
IMAGE_COLUMN: Mapping[str, str | None] = {
    "mask": None,
    "edges": "image",
    "both": "image",
    "foreground": "image",
    "image": "conditioning_image",
}


@dataclass(frozen=True)
class ResolvedRow:
    """A planned row with its condition.

    Attributes:
        parent: the train row of the mask: the planned one, or its replacement if that could not be
            warped; None for a generated mask.
        condition: the condition, from the train mask or from the generated one.
        attributes: the values that the prompt was rendered from.
        rejected: masks that were tried and discarded, as ledger rows.
    """

    planned: PlannedRow
    parent: TrainRow | None
    condition: Condition
    attributes: Mapping[str, str]
    rejected: Sequence[Mapping[str, str]]


class ConditionReader:
    """Reads masks, and the images that conditioning images are derived from, row by row."""

    def __init__(self, dataset: MaskPromptDataset, config: ExperimentConfig, parents: Sequence[TrainRow]) -> None:
        """Open the train split; only the required columns are decoded.

        Args:
            dataset: the real dataset.
            config: provides the warping limits and the seed.
            parents: the rows of the train split.
        """
        self.description, self.config = dataset.description, config
        self.by_label = group_by_label(parents)
        self.image_column = IMAGE_COLUMN[self.description.conditioning]
        self.table = dataset.split("train").select_columns(
            ["mask", *([self.image_column] if self.image_column else [])]
        )
        self._may_be_empty: dict[int | None, bool] = {}

    @cached_property
    def labels_with_masks(self) -> set[int | None]:
        """The labels for which at least one row has a mask."""
        has_mask = self.table.with_format("arrow")[:]["mask"].is_valid().to_pylist()
        return {label for label, rows in self.by_label.items() if any(has_mask[row.position] for row in rows)}

    def may_be_empty(self, label: int | None) -> bool:
        """Return whether any train mask of a label has no foreground; computed on first use."""
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
                mask, image = self._mask_and_image(row, parent, tried)
            except RejectedSample as problem:
                rejected.append({"path": parent.sample_id, "reason": f"row {row.index}: {problem}"})
                continue
            return self._resolved(row, parent, mask, image, rejected)
        raise MaskLoomError(
            f"no mask like {row.parent.sample_id!r} can be warped: {rejected[-1]['reason']}; "
            "loosen generate.warp or set generate.mask_source=[train]"
        )

    def prompts(self, rows: Sequence[PlannedRow]) -> list[str]:
        """Return the prompts of planned rows from the stored attributes; decodes no masks."""
        about = self.description
        attributes = [{**self._known(row.parent), **row.parent.attributes} for row in rows]
        usable = [
            (row, values)
            for row, values in zip(rows, attributes, strict=True)
            if any(template_keys(template) <= values.keys() for template in about.prompt_templates)
        ]
        return [render_prompt(about.prompt_templates, f"row-{row.index}", values) for row, values in usable]

    def _known(self, parent: TrainRow) -> dict[str, str]:
        """Return the prompt values that need no mask: modality and label."""
        about = self.description
        label = {} if parent.label is None or not about.labels else {"label": about.labels[parent.label]}
        return {"modality": about.modality, **label}

    def _mask_and_image(self, row: PlannedRow, parent: TrainRow, tried: int) -> tuple[Pixels | None, Pixels | None]:
        """Return the mask and the image that the conditioning image is derived from.

        Both are warped together if the row asks for it; each is None where absent or not needed.
        The image is the train image or its paired image.
        """
        cells = self.table[parent.position]
        mask = None if cells["mask"] is None else np.asarray(cells["mask"], dtype=np.uint8)
        image = np.asarray(cells[self.image_column], dtype=np.uint8) if self.image_column else None
        if row.source == "train" or (mask is None and image is None):
            return mask, image
        return valid_warp(mask, image, self.config.generate.warp, (self.config.seed, row.index, tried))

    def _resolved(
        self,
        row: PlannedRow,
        parent: TrainRow,
        mask: Pixels | None,
        image: Pixels | None,
        rejected: Sequence[Mapping[str, str]],
    ) -> ResolvedRow:
        about = self.description
        of_mask = mask_attributes(mask, about.mask_classes)
        attributes = {**self._known(parent), **parent.attributes, **of_mask}
        paired = image if about.conditioning == "image" else None
        image = np.zeros(about.image_size, np.uint8) if image is None else image
        seen = conditioning_image(mask, image, about.conditioning, about.palette, paired)
        # The template depends on the row, not on the parent: a reused mask gets other prompts.
        text = render_prompt(about.prompt_templates, f"row-{row.index}", attributes)
        return ResolvedRow(row, parent, Condition(text, mask, seen, parent.label, row.seed), attributes, rejected)
