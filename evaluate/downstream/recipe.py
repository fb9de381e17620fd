"""How downstream models are trained and applied: which weights are scored, how batches are drawn.

The defaults are the plainest recipe: uniform batches, the weights of the last step, no flips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.downstream.phases import Phase
from maskloom.pipeline.config.base import DigestedSection
from maskloom.pipeline.config.bounds import Steps
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.fixed_steps import Draw, Recipe, Selection, uniform_draw

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class RecipeOptions(DigestedSection):
    """How downstream models are trained and applied."""

    selection: Literal["last", "best"] = Field(
        "last", description="weights that are scored: of the last step, or of the best validation score"
    )
    validate_every: Steps = Field(100, ge=1, description="with selection: best, steps from one validation to the next")
    test_time_flips: bool = Field(
        False, description="average the probabilities of each test image and of its mirror image"
    )

    def unused_keys(self) -> set[str]:
        """Return the keys that leave the plain recipe as it is."""
        unused = super().unused_keys() | (set() if self.test_time_flips else {"test_time_flips"})
        return unused | ({"selection", "validate_every"} if self.selection == "last" else set())

    @property
    def sentence(self) -> str:
        """Which weights are scored, for readers."""
        if self.selection == "last":
            return "The weights of the last step are scored."
        return f"The weights of the best validation score, taken every {self.validate_every} steps, are scored."


def training_recipe(
    options: RecipeOptions,
    draw: Draw | None,
    validation: int,
    score: Callable[[nn.Module], float],
    what: str,
    last: bool = True,
) -> Recipe | None:
    """Return the recipe of a training; None where it is the plain one.

    Args:
        options: the options.
        draw: draws the numbers of a batch; None: uniformly.
        validation: number of validation images that can be scored.
        score: a network's score on them, higher is better.
        what: what such an image has, such as `a mask`.
        last: whether the training ends with this phase; the weights of an earlier one are not chosen.

    Raises:
        MaskLoomError: weights are to be chosen on validation images, and there are none.
    """
    if options.selection == "last":
        return None if draw is None else Recipe(draw)
    if not validation:
        raise MaskLoomError(
            f"selection=best: no real validation image has {what}; set selection=last, or give the dataset a validation split"
        )
    return Recipe(draw, Selection(options.validate_every, score) if last else None)


def phase_draw(phase: Phase, draw_from: Callable[[NDArray[np.generic]], Draw | None], batch_size: int) -> Draw | None:
    """Return a function that draws the batches of a phase, once; None: uniformly.

    Args:
        phase: the phase.
        draw_from: returns what draws the numbers of images by their targets; None: uniformly.
        batch_size: images per batch.
    """
    targets = phase.data[1]
    if phase.exposure is None:
        return draw_from(targets)
    parts = targets[: phase.exposure.images], targets[phase.exposure.images :]
    real, synthetic = (draw_from(part) or uniform_draw(len(part), batch_size) for part in parts)
    return exposed_draw(real, synthetic, phase, batch_size)


def exposed_draw(real: Draw, synthetic: Draw, phase: Phase, batch_size: int) -> Draw:
    """Return a function that draws real images exactly as often as without synthetic ones, for one training.

    Where they stand among the batches is random.

    Args:
        real: draws batches of real images.
        synthetic: draws batches of synthetic ones, numbered from 0.
        phase: a phase with an exposure.
        batch_size: images per batch.
    """
    import torch

    exposure = phase.exposure
    assert exposure is not None
    take_real, take_synthetic = stream(real), stream(synthetic)
    turns: list[Tensor] = []  # whether each image is a real one, by batch, last batch first

    def draw(random: torch.Generator) -> Tensor:
        if not turns:
            places = torch.randperm(phase.steps * batch_size, generator=random)
            turns.extend((places < exposure.steps * batch_size).split(batch_size)[::-1])
        is_real = turns.pop()
        rows = torch.empty(batch_size, dtype=torch.long)
        rows[is_real] = take_real(int(is_real.sum()), random)
        rows[~is_real] = exposure.images + take_synthetic(int((~is_real).sum()), random)
        return rows

    return draw


def stream(draw: Draw) -> Callable[[int, torch.Generator], Tensor]:
    """Return a function (count, generator) that returns the next numbers of the batches of `draw`."""
    import torch

    left = torch.empty(0, dtype=torch.long)

    def take(count: int, random: torch.Generator) -> Tensor:
        nonlocal left
        while len(left) < count:
            left = torch.cat([left, draw(random)])
        taken, left = left[:count], left[count:]
        return taken

    return take


def balanced_draw(kinds: NDArray[np.int64], batch_size: int) -> Draw:
    """Return a function that draws every kind of image equally often.

    Args:
        kinds: (N,) the kind of each image, such as its class.
        batch_size: images per batch.
    """
    import torch

    _, kind, counts = np.unique(kinds, return_inverse=True, return_counts=True)
    weights = torch.from_numpy(1 / counts[kind])

    def draw(random: torch.Generator) -> Tensor:
        return torch.multinomial(weights, batch_size, replacement=True, generator=random)

    return draw


def lesion_draw(masks: NDArray[np.uint8], batch_size: int) -> Draw | None:
    """Return a function that draws images with a foreground into at least half of each batch.

    Args:
        masks: (N, H, W) class indices, 0 = background.
        batch_size: images per batch.

    Returns:
        None where no mask has a foreground, or all have: batches are then drawn uniformly.
    """
    import torch

    with_lesion = torch.from_numpy(np.flatnonzero((masks > 0).any(axis=(1, 2))))
    if len(with_lesion) in (0, len(masks)):
        return None
    half = -(-batch_size // 2)

    def draw(random: torch.Generator) -> Tensor:
        lesions = with_lesion[torch.randint(len(with_lesion), (half,), generator=random)]
        return torch.cat([lesions, torch.randint(len(masks), (batch_size - half,), generator=random)])

    return draw


def rarest_classes(masks: NDArray[np.uint8], classes: int) -> NDArray[np.int64]:
    """Return the class in each mask that the fewest masks have, (N,); 0 without foreground.

    Args:
        masks: (N, H, W) class indices, 0 = background.
        classes: number of classes, background included.
    """
    present = np.stack([(masks == k).any(axis=(1, 2)) for k in range(1, classes)], axis=1)
    rarity = np.where(present, present.sum(axis=0), len(masks) + 1)
    return np.where(present.any(axis=1), rarity.argmin(axis=1) + 1, 0)
