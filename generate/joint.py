"""Rows of a generator that produces image and mask together.

The plan gives each row a class and a seed. Mask, conditioning image and prompt come from the
generated pair. Masks are cleaned. A mask without foreground is generated again with another seed,
unless train masks of its class may be empty as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from maskloom.generate.cleaning import cleaned
from maskloom.generate.conditions import ConditionReader, ResolvedRow
from maskloom.generate.generator import Condition, JointGenerator
from maskloom.generate.pixels import checked_pixels
from maskloom.generate.planning import PlannedRow
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.prompts import MASK_WORDS, mask_attributes, render_prompt, template_keys
from maskloom.pipeline.errors import MaskLoomError

REDRAW_STREAM = 5  # name of this file's random stream under the experiment's seed
GeneratedRow = tuple[ResolvedRow, NDArray[np.float32]]
"""A planned row with its condition, and its image in 0..1."""


@dataclass
class MaskFigures:
    """Statistics of the first mask generated for every row.

    Later attempts replace empty masks, so counting them would overstate the quality of the
    generator.

    Attributes:
        rows: number of rows.
        empty: number of masks without foreground after cleaning.
        removed_components, removed_pixels, filled_pixels: sums of the fields of
            `generate.cleaning.CleanedMask`.
    """

    rows: int = 0
    empty: int = 0
    removed_components: int = 0
    removed_pixels: int = 0
    filled_pixels: int = 0

    def add(self, other: MaskFigures) -> None:
        """Add the statistics of other rows."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def per_mask(self) -> dict[str, float]:
        """Return the rate of empty masks, and the other statistics per mask."""
        names = ("removed_components", "removed_pixels", "filled_pixels")
        means = {f"{name}_per_mask": round(getattr(self, name) / self.rows, 3) for name in names}
        return {"empty_mask_rate": round(self.empty / self.rows, 4), **means}

    def sentence(self) -> str:
        """Return the statistics as a sentence of the dataset card."""
        per_mask = self.per_mask()
        return (
            f"{self.empty} of {self.rows} masks ({per_mask['empty_mask_rate']:.1%}) had no foreground when they were first drawn and cleaned; "
            f"cleaning removed {per_mask['removed_components_per_mask']:.2f} pieces ({per_mask['removed_pixels_per_mask']:.1f} pixels) a mask "
            f"and filled holes of {per_mask['filled_pixels_per_mask']:.1f} pixels"
        )


def check_joint(name: str, description: Description, rows: Sequence[PlannedRow], reader: ConditionReader) -> None:
    """Check, before anything is generated, that a joint generator supports the planned rows.

    Raises:
        MaskLoomError: the conditioning image is a paired image, or no train row of a planned class
            has a mask to learn from.
    """
    if description.conditioning == "image":
        raise MaskLoomError(
            f"generate.generators.{name}: it generates image and mask, but no paired image, which data.conditioning=image needs; "
            "set data.conditioning=mask and prepare again, or leave this generator out"
        )
    with_masks = reader.labels_with_masks
    for label in dict.fromkeys(row.parent.label for row in rows):
        if label not in with_masks:
            raise MaskLoomError(
                f"generate.generators.{name}: it learns from rows with a mask, and no train row of {_class_words(label, description)} has one; "
                "set that class to 0 in generate.images_per_class, or leave this generator out"
            )


@dataclass
class JointRows:
    """Generates the rows of one shard, batch by batch."""

    name: str
    generator: JointGenerator
    reader: ConditionReader
    seed: int
    figures: MaskFigures = field(default_factory=MaskFigures)

    def generate(self, planned: Sequence[PlannedRow]) -> list[GeneratedRow]:
        """Return every planned row with its image; the same rows give the same values.

        Raises:
            MaskLoomError: all attempts for a row give empty masks, or an image is constant or not
                finite.
        """
        blank = np.zeros((*self.reader.description.image_size, 3), np.uint8)
        rejected: dict[int, list[Mapping[str, str]]] = {row.index: [] for row in planned}
        done: dict[int, GeneratedRow] = {}
        for attempt in range(self.generator.options.attempts):
            waiting = [row for row in planned if row.index not in done]
            if not waiting:
                break
            seeds = [redraw_seed(self.seed, row.index, attempt) if attempt else row.seed for row in waiting]
            conditions = [
                Condition("", None, blank, row.parent.label, seed) for row, seed in zip(waiting, seeds, strict=True)
            ]
            for row, condition, image, mask in zip(waiting, conditions, *self.generator.pairs(conditions), strict=True):
                clean = self._clean(mask, first=attempt == 0)
                if clean.any() or self.reader.may_be_empty(row.parent.label):
                    done[row.index] = self._resolved(row, condition, image, clean, rejected[row.index]), image
                else:
                    reason = f"draw {attempt + 1} (seed {condition.seed}): its mask has no foreground after cleaning"
                    rejected[row.index].append({"path": self._sample_id(row), "reason": reason})
        for row in planned:
            if row.index not in done:
                raise MaskLoomError(self._no_foreground_error(row))
        return [done[row.index] for row in planned]

    def _clean(self, mask: NDArray[np.uint8], first: bool) -> NDArray[np.uint8]:
        """Return the cleaned mask; count it in `figures` if it is the first one of its row."""
        clean, components, pixels, filled = cleaned(
            mask, len(self.reader.description.mask_classes), self.generator.options
        )
        if first:
            self.figures.add(MaskFigures(1, int(not clean.any()), components, pixels, filled))
        return clean

    def _resolved(
        self,
        row: PlannedRow,
        condition: Condition,
        image: NDArray[np.float32],
        mask: NDArray[np.uint8],
        rejected: Sequence[Mapping[str, str]],
    ) -> ResolvedRow:
        about = self.reader.description
        pixels = checked_pixels(image, self._sample_id(row), condition.seed)
        seen = conditioning_image(mask, pixels, about.conditioning, about.palette)
        attributes = drawn_attributes(row, mask, about)
        text = render_prompt(about.prompt_templates, f"row-{row.index}", attributes)
        return ResolvedRow(
            row, None, Condition(text, mask, seen, condition.label, condition.seed), attributes, rejected
        )

    def _sample_id(self, row: PlannedRow) -> str:
        return f"{self.name}-{row.index:06d}"

    def _no_foreground_error(self, row: PlannedRow) -> str:
        attempts, key = self.generator.options.attempts, f"generate.generators.{self.name}"
        return (
            f"{self._sample_id(row)}: {attempts} masks of {_class_words(row.parent.label, self.reader.description)} in a row have no foreground "
            f"after cleaning, and {self.figures.empty} of {self.figures.rows} first draws of this shard ({self.figures.empty / self.figures.rows:.0%}); "
            f"train longer, raise {key}.attempts, or set {key}.min_area=0; to continue with the other generators, set {key}=false"
        )


def redraw_seed(seed: int, index: int, attempt: int) -> int:
    """Return the seed of a row's attempt after the first, 0 .. 2**32 - 1."""
    return int(np.random.SeedSequence([seed, REDRAW_STREAM, index, attempt]).generate_state(1, np.uint32)[0])


def drawn_attributes(row: PlannedRow, mask: NDArray[np.uint8], about: Description) -> Mapping[str, str]:
    """Return the prompt values of a generated row: modality, class and mask attributes.

    Nothing else is known about it. If every template needs a further value (a scanner, a level),
    the remaining values are taken from the planned train row of the same class.
    """
    label = {} if row.parent.label is None or not about.labels else {"label": about.labels[row.parent.label]}
    known = {"modality": about.modality, **label, **mask_attributes(mask, about.mask_classes)}
    if any(template_keys(template) <= known.keys() for template in about.prompt_templates):
        return known
    further = {name: word for name, word in row.parent.attributes.items() if name not in MASK_WORDS}
    return {**further, **known}


def _class_words(label: int | None, about: Description) -> str:
    return "the dataset" if label is None or not about.labels else f"the class {about.labels[label]}"
