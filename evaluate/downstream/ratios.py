"""How many synthetic images per real one: the ratio that scores best on the real validation images.

It is chosen before any test image is scored, with the first seeds alone: to choose it on test images
would make the best of several comparisons look like a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskloom.evaluate.downstream.arms import ARMS, WITH_SYNTHETIC, ArmOptions, random_part
from maskloom.evaluate.downstream.phases import Pair, Phase
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import progress
from maskloom.pipeline.results import Table

VALIDATION = "real validation"


@dataclass(frozen=True)
class RatioChoice:
    """The ratios that were tried, and the best of them.

    Attributes:
        score: what they were compared by, higher is better.
        validation, seeds: number of validation images, and of models behind each score.
        real: number of real images.
        images: number of synthetic images by ratio, ascending; at most all there are.
        reached: mean score over the models, by number of synthetic images.
    """

    score: str
    validation: int
    seeds: int
    real: int
    images: Mapping[float, int]
    reached: Mapping[int, float]

    @property
    def chosen(self) -> float:
        """The ratio of the best score; of equal ones the smallest."""
        return max(self.images, key=lambda ratio: (self.reached[self.images[ratio]], -ratio))

    @property
    def count(self) -> int:
        """The number of synthetic images that the chosen ratio uses."""
        return self.images[self.chosen]

    @property
    def sentence(self) -> str:
        """What was chosen, and how, for readers."""
        tried = ", ".join(f"{ratio:g} ({self.reached[count]:.3f})" for ratio, count in self.images.items())
        return (
            f"Synthetic images per real one: {self.chosen:g} ({self.count} images), chosen by {self.score} on "
            f"{self.validation} real validation images, {self.seeds} seed(s), before any test image was scored. "
            f"Tried: {tried}. Arms with real and synthetic images in one batch use it, the others all images."
        )

    def table(self) -> Table:
        """Return a table of the ratios."""
        note = f"{self.score} on {self.validation} real validation images, mean over {self.seeds} seed(s)."
        if any(count < round(self.real * ratio) for ratio, count in self.images.items()):
            note += " Ratios that need more images than there are use all of them."
        rows: list[list[Any]] = [
            [f"{ratio:g}", count, self.reached[count], "chosen" if ratio == self.chosen else ""]
            for ratio, count in self.images.items()
        ]
        columns = ["synthetic images per real one", "synthetic images", f"{self.score} (validation)", ""]
        return Table(title="Choice of the number of synthetic images", note=note, columns=columns, rows=rows)

    def as_json(self) -> dict[str, Any]:
        """Return the choice for programs."""
        return {
            "chosen": self.chosen,
            "score": self.score,
            "validation_images": self.validation,
            "seeds": self.seeds,
            "tried": [
                {"ratio": ratio, "images": count, "value": self.reached[count]} for ratio, count in self.images.items()
            ],
        }


def choose_ratio(
    options: ArmOptions,
    real: Pair,
    synthetic: Pair,
    seed: int,
    steps: int,
    score: tuple[str, Callable[[Sequence[Phase], int], float]],
    validation: tuple[int, str],
) -> RatioChoice | None:
    """Return the choice among `options.synthetic_ratios`; None where there is none to make.

    Args:
        options: the ratios and the number of seeds.
        real: real images and targets.
        synthetic: those of the generator.
        seed: the first seed.
        steps: optimizer steps.
        score: name of the score, and what returns that of a model trained in phases with a seed on
            validation images.
        validation: number of these that can be scored, and what they have, such as `a mask`.

    Raises:
        MaskLoomError: there are no validation images.
    """
    if not options.synthetic_ratios:
        return None
    if not validation[0]:
        raise MaskLoomError(
            f"synthetic_ratios: no real validation image has {validation[1]} to choose the ratio by; "
            "give one ratio as synthetic_per_real, or give the dataset a validation split"
        )
    images = {
        ratio: min(len(synthetic[0]), max(1, round(len(real[0]) * ratio))) for ratio in sorted(options.synthetic_ratios)
    }
    reached: dict[int, float] = {}
    counts, seeds = dict.fromkeys(images.values()), range(seed, seed + options.ratio_seeds)
    with progress("choosing the ratio on validation images", len(counts) * len(seeds), "models") as advance:
        for count in counts:
            phases = ARMS[WITH_SYNTHETIC].phases(real, random_part(synthetic, count, seed), steps)
            found = []
            for one in seeds:
                advance(0, note=f"{count} synthetic images, seed {one}")
                found.append(score[1](phases, one))
                advance()
            reached[count] = float(np.mean(found))
    return RatioChoice(score[0], validation[0], options.ratio_seeds, len(real[0]), images, reached)
