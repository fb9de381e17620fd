"""Splits groups into train, validation and test: stratified by class, repeatable, every group whole."""

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
        rows: how many rows it has.
        label: its most frequent class, or None.
        split: where the dataset itself puts it, or None.
    """

    name: str
    rows: int
    label: str | None
    split: str | None


def split_of_groups(groups: Sequence[Group], shares: Splits, seed: int) -> dict[str, str]:
    """Return the split of each group by name.

    A split that the dataset itself fills takes no further groups; the remaining groups are divided among the remaining splits, class
    by class, in the ratio of their shares of rows.

    Args:
        groups: all groups.
        shares: asked shares of rows.
        seed: another seed gives another, equally good division.

    Raises:
        MaskLoomError: fewer groups than splits that are asked for, or none in train.
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
        # Every split is fixed and yet some groups are free: they can only be used for training.
        chosen = fixed | _divided(free, open_shares or {"train": 1.0}, seed)
    if "train" not in chosen.values():
        raise MaskLoomError("no group is left for the train split; add data or change data.splits")
    return chosen


def _divided(groups: Sequence[Group], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Assign class by class; what one class leaves over or short by rounding is carried to the next."""
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
        for group, split in _fill(_ordered(strata[label], seed), targets):
            chosen[group.name] = split
            filled[split] += group.rows
    _give_every_split_a_group(chosen, groups, fractions)
    return chosen


def _ordered(groups: Sequence[Group], seed: int) -> list[Group]:
    """Return large groups first, so that small ones level the splits out; equal ones in a random order keyed to the seed."""
    return sorted(groups, key=lambda group: (-group.rows, value_digest([seed, group.name])))


def _fill(groups: Sequence[Group], targets: Mapping[str, float]) -> list[tuple[Group, str]]:
    """Put each group where the split is then least full, relative to its target (Graham's LPT rule for machines of unlike speed)."""
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
    """Move the smallest groups of the splits with most groups into those that got none (few, large groups)."""
    for split in fractions:
        if split not in chosen.values():
            donor = Counter(chosen.values()).most_common(1)[0][0]
            smallest = min(
                (group for group in groups if chosen[group.name] == donor), key=lambda group: (group.rows, group.name)
            )
            chosen[smallest.name] = split
