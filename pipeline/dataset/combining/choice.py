"""The choice of synthetic rows: by ratio, to balance the classes, or all."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence

from maskloom.pipeline.dataset.combining.sets import SyntheticRow
from maskloom.pipeline.errors import MaskLoomError


def chosen_rows(
    real_labels: Sequence[int | None],
    pool: Sequence[SyntheticRow],
    names: Sequence[str],
    ratio: float | None,
    balance: bool,
) -> dict[int | None, list[SyntheticRow]]:
    """Return the rows to add, in the keyed order: by class if balanced, else under None.

    Args:
        real_labels: label of every real train row.
        pool: every synthetic row, in the keyed order.
        names: of the labels.
        ratio: synthetic rows per real train row; None takes all, or as many as the balance needs.
        balance: every class gets the same number of train rows.

    Raises:
        MaskLoomError: there are not enough synthetic rows, or the ratio is too small for the
            classes to become equal.
    """
    if balance:
        return _balanced_rows(real_labels, pool, names, ratio)
    if ratio is None:
        return {None: list(pool)}
    wanted = round(ratio * len(real_labels))
    if wanted > len(pool):
        most = math.floor(len(pool) / len(real_labels) * 100) / 100
        raise MaskLoomError(
            f"--ratio {ratio:g} takes {wanted} synthetic rows for {len(real_labels)} real ones, and there are "
            f"{len(pool)}; generate more (generate.num_images={wanted}), or give --ratio {most:g} or less"
        )
    return {None: list(pool[:wanted])}


def _balanced_rows(
    real_labels: Sequence[int | None], pool: Sequence[SyntheticRow], names: Sequence[str], ratio: float | None
) -> dict[int | None, list[SyntheticRow]]:
    target = _rows_per_class(real_labels, names, ratio)
    counts = Counter(label for label in real_labels if label is not None)
    needed = {label: target - counts[label] for label in sorted(counts)}
    rows = {label: [row for row in pool if row.label == label] for label in needed}
    short = [
        f"{names[label]}: {count} needed, {len(rows[label])} there"
        for label, count in needed.items()
        if len(rows[label]) < count
    ]
    if short:
        wanted = json.dumps({names[label]: count for label, count in needed.items() if count}, ensure_ascii=False)
        raise MaskLoomError(
            f"--balance: not enough synthetic rows for {target} train rows a class ({'; '.join(short)}); generate with "
            f"{shlex.quote(f'generate.images_per_class={wanted}')}"
        )
    return {label: rows[label][:count] for label, count in needed.items()}


def _rows_per_class(real_labels: Sequence[int | None], names: Sequence[str], ratio: float | None) -> int:
    """Return the number of train rows, real and synthetic, that each class gets."""
    if not names or None in real_labels:
        lacking = (
            f"{list(real_labels).count(None)} of the real train rows have none" if names else "the dataset has none"
        )
        raise MaskLoomError(f"--balance needs a class on every train row, and {lacking}; leave --balance out")
    counts = Counter(real_labels)
    largest = max(counts.values())
    if ratio is None:
        return largest
    target = (len(real_labels) + round(ratio * len(real_labels))) // len(counts)
    if target < largest:
        name = next(names[label] for label in counts if label is not None and counts[label] == largest)
        least = math.ceil((largest * len(counts) - len(real_labels)) / len(real_labels) * 100) / 100
        raise MaskLoomError(
            f"--ratio {ratio:g} is too small for --balance: {name} alone has {largest} of "
            f"{len(real_labels)} real train rows; give --ratio {least:g} or more, or leave it out"
        )
    return target
