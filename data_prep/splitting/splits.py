"""Splits groups into train, validation and test: stratified by class and reproducible."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maskloom.pipeline.config.data import Splits
from maskloom.pipeline.dataset.contract import SPLITS
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest


@dataclass(frozen=True)
class Group:
    """Rows that must stay together.

    Attributes:
        name: the group's id.
        rows: number of rows.
        label: its most frequent class, or None.
        split: the split published with the dataset, or None.
    """

    name: str
    rows: int
    label: str | None
    split: str | None


def split_of_groups(groups: Sequence[Group], shares: Splits, seed: int) -> dict[str, str]:
    """Return the split of each group by name.

    A split published with the dataset takes no further groups. The other groups are divided among
    the other splits, class by class, in proportion to the requested shares of rows.

    Args:
        groups: all groups.
        shares: requested shares of rows.
        seed: seed of the order of groups of equal size.

    Raises:
        MaskLoomError: there are fewer groups than requested splits, or none for train.
    """
    fixed = {group.name: group.split for group in groups if group.split is not None}
    free = [group for group in groups if group.split is None]
    wanted = {split: getattr(shares, split) for split in SPLITS if getattr(shares, split) > 0}
    open_shares = {split: share for split, share in wanted.items() if split not in fixed.values()}
    if not free:
        chosen = dict(fixed)
    elif len(free) < len(open_shares):
        raise MaskLoomError(
            f"{len(free)} group(s) cannot fill {len(open_shares)} splits ({', '.join(open_shares)});"
            " add data, or set the share of a split to 0 (data.splits.test=0 and so on)"
        )
    else:
        # If every split is published and some groups are free, they go to train.
        chosen = fixed | _divided(free, open_shares or {"train": 1.0}, seed)
    if "train" not in chosen.values():
        raise MaskLoomError("no group is left for the train split; add data or change data.splits")
    return chosen


def _divided(groups: Sequence[Group], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Assign groups class by class; rounding differences are carried over to the next class."""
    total = sum(shares.values())
    fractions = {split: share / total for split, share in shares.items()}
    strata: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        strata[group.label or ""].append(group)
    chosen: dict[str, str] = {}
    filled: Counter[str] = Counter()
    seen = 0
    for label in sorted(strata):
        seen += sum(group.rows for group in strata[label])
        targets = {split: fraction * seen - filled[split] for split, fraction in fractions.items()}
        # Large groups first; groups of equal size in an order keyed to the seed.
        ordered = sorted(strata[label], key=lambda group: (-group.rows, value_digest([seed, group.name])))
        for group, split in _fill(ordered, targets):
            chosen[group.name] = split
            filled[split] += group.rows
    _give_every_split_a_group(chosen, groups, fractions)
    return chosen


def _fill(groups: Sequence[Group], targets: Mapping[str, float]) -> list[tuple[Group, str]]:
    """Assign each group to the split that is then least full relative to its target.

    Graham's LPT rule for machines of different speed.
    """
    filled: Counter[str] = Counter()
    assigned = []
    for group in groups:

        def fullness(split: str, rows: int = group.rows) -> float:
            return (filled[split] + rows) / max(targets[split], 1e-9)

        split = min(targets, key=fullness)
        filled[split] += group.rows
        assigned.append((group, split))
    return assigned


def _give_every_split_a_group(chosen: dict[str, str], groups: Sequence[Group], fractions: Mapping[str, float]) -> None:
    """Move the smallest group of the split with most groups into each empty split."""
    for split in fractions:
        if split not in chosen.values():
            donor = Counter(chosen.values()).most_common(1)[0][0]
            smallest = min(
                (group for group in groups if chosen[group.name] == donor), key=lambda group: (group.rows, group.name)
            )
            chosen[smallest.name] = split
