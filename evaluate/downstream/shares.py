"""Parts of the training images: a share of all groups, or of the groups of the rarest class.

Which groups are kept follows from the seed of a training, so that the interval over seeds covers the
luck of the draw. The shares of one seed are nested: a smaller one keeps some groups of a larger one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from maskloom.evaluate.downstream.phases import Pair
from maskloom.pipeline.config.base import DigestedSection

GROUPS_KEY = 15
"""Of the random numbers that order the groups, so that no other draw of a seed is the same."""


def _distinct_shares(shares: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(shares)) < len(shares):
        raise ValueError("each share stands there once")
    return tuple(sorted(shares))


Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, ...], AfterValidator(_distinct_shares)]


class ShareOptions(DigestedSection):
    """The shares of the real train images that the arms are trained on besides all of them."""

    train_shares: Shares = Field(
        (), description="learning curve: also train every arm on these shares of the real train groups, such as 0.25"
    )
    rare_class_shares: Shares = Field(
        (), description="imbalance: also train every arm with these shares of the rarest class's real train groups"
    )

    def unused_keys(self) -> set[str]:
        """Return the kinds of shares of which there are none."""
        kinds = ("train_shares", "rare_class_shares")
        return super().unused_keys() | {key for key in kinds if not getattr(self, key)}


@dataclass(frozen=True)
class TrainSet:
    """The images that the arms are trained on, as far as parts of them are taken.

    Attributes:
        real: images and targets.
        samples, groups: of each real image.
        kinds: (N,) the class of each real image.
        generated: images and targets by generator.
        parents: sample id of the real image behind each synthetic one, by generator.
    """

    real: Pair
    samples: Sequence[str]
    groups: Sequence[str]
    kinds: NDArray[np.int64]
    generated: dict[str, Pair]
    parents: dict[str, Sequence[str | None]]

    def reduced(self, rows: NDArray[np.int64]) -> TrainSet:
        """Return some real images, and the synthetic ones whose parents are among them."""
        samples = [self.samples[i] for i in rows.tolist()]
        known = set(samples)
        kept = {name: np.flatnonzero([parent in known for parent in parents]) for name, parents in self.parents.items()}
        return TrainSet(
            real=_rows(self.real, rows),
            samples=samples,
            groups=[self.groups[i] for i in rows.tolist()],
            kinds=self.kinds[rows],
            generated={name: _rows(pair, kept[name]) for name, pair in self.generated.items()},
            parents={name: [parents[i] for i in kept[name].tolist()] for name, parents in self.parents.items()},
        )


def _rows(pair: Pair, rows: NDArray[np.int64]) -> Pair:
    images, targets = pair
    return images[rows], targets[rows]


def kept_groups(groups: Sequence[str], share: float, seed: int) -> set[str]:
    """Return a share of the groups, one or more; smaller shares of a seed are parts of larger ones."""
    names = np.unique(np.asarray(groups, dtype=str))
    order = np.random.default_rng([seed, GROUPS_KEY]).permutation(len(names))
    return set(names[order[: max(1, round(share * len(names)))]].tolist())


def share_of_groups(groups: Sequence[str], share: float, seed: int) -> NDArray[np.int64]:
    """Return the rows of a share of the groups; see `kept_groups`."""
    kept = kept_groups(groups, share, seed)
    return np.flatnonzero([group in kept for group in groups])


def share_of_class(
    groups: Sequence[str], kinds: NDArray[np.int64], rarest: int, share: float, seed: int
) -> NDArray[np.int64]:
    """Return the rows of all other classes, and of a share of the groups that have images of one class.

    Args:
        groups: of each image.
        kinds: (N,) the class of each image.
        rarest: the class that is cut.
        share: of its groups.
        seed: see `kept_groups`.
    """
    kept = kept_groups([groups[i] for i in np.flatnonzero(kinds == rarest).tolist()], share, seed)
    return np.flatnonzero([kind != rarest or group in kept for kind, group in zip(kinds, groups, strict=True)])


def rarest_class(groups: Sequence[str], kinds: NDArray[np.int64]) -> int:
    """Return the class with images of the fewest groups; of several, that with the fewest images, then the first."""
    names = np.asarray(groups, dtype=str)
    counts = {int(k): (len(np.unique(names[kinds == k])), int((kinds == k).sum())) for k in np.unique(kinds) if k >= 0}
    return min(counts, key=lambda k: (*counts[k], k))
