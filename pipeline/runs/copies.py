"""Check before evaluation that no train or synthetic image is a copy of a held-out one.

`pipeline.runs.leaks` compares pixels; a copy with one changed grey level, cropped or mirrored passes
it. The result is kept in `logs/audit/DIGEST-copies.json` of the run, so that the check runs once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from maskloom.pipeline.dataset.audit.limits import NEAR_LIMIT
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import LeakedImages
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.audit_record import is_recorded, record_path, write_audit_record
from maskloom.pipeline.runs.leak_list import files_of_leaks, leaks_in_words
from maskloom.pipeline.runs.leaks import SYNTHETIC_FIX
from maskloom.pipeline.runs.run import Run

if TYPE_CHECKING:
    from maskloom.pipeline.dataset.audit.held_out import HeldOutCopy

VERSION = 1  # of this check; a new version makes every record stale
REAL_FIX = (
    "images of one patient must lie in one split: remove one of each pair from the raw folder, or give the patient of "
    "each image as its group (data.duplicates=near puts near-duplicates into one group, but finds fewer pairs than "
    "this search), and prepare the dataset again"
)


def require_no_held_out_copies(run: Run, real: MaskPromptDataset, synthetic: Sequence[MaskPromptDataset]) -> None:
    """Check that no train or synthetic image is a copy of a validation, test or external image.

    Call it with verified datasets that passed `require_no_leaks`, before anything is computed or
    deleted. More than `NEAR_LIMIT` images are not compared, which is reported.

    Args:
        run: the run that keeps the record.
        real: the real dataset.
        synthetic: the synthetic datasets made from it.

    Raises:
        LeakedImages: an image is such a copy; the error names the samples.
    """
    datasets = [real, *synthetic]
    record = record_path(run, datasets, "-copies")
    if is_recorded(record, VERSION, datasets):
        return
    rows = sum(dataset.num_rows for dataset in datasets)
    if rows > NEAR_LIMIT:
        say(f"{rows} images are more than {NEAR_LIMIT}: only identical images were looked for, not altered copies")
        return
    from maskloom.pipeline.dataset.audit.held_out import find_held_out_copies

    start = time.monotonic()
    found = find_held_out_copies(real, synthetic)
    if found:
        leaks = list(map(_as_row, found))
        shown = leaks_in_words(record, list(map(_in_words, found)), leaks)
        of_real = [one.copy.dataset == str(real.folder) for one in found]
        fix = leak_fix(any(of_real), not all(of_real))
        copies = f"{real.folder}: {len(found)} image(s) are copies of held-out images: {shown}"
        raise LeakedImages(copies, fix, files_of_leaks(leaks))
    write_audit_record(record, VERSION, datasets, rows, True)
    say(f"no copies of held-out images among {rows} images ({time.monotonic() - start:.1f} s)")


def leak_fix(real: bool, synthetic: bool) -> str:
    """Return what to do about leaks.

    Args:
        real: whether real images are among them.
        synthetic: whether synthetic images are.
    """
    return "; ".join([REAL_FIX] * real + [SYNTHETIC_FIX] * synthetic)


def _in_words(one: HeldOutCopy) -> str:
    turned = ", mirrored or turned" if one.turned else ""
    return (
        f"{one.copy.sample_id} ({one.copy.split} of {one.copy.dataset}) shows {one.original.sample_id} "
        f"({one.original.split}{turned}, correlation {one.likeness:.2f})"
    )


def _as_row(one: HeldOutCopy) -> dict[str, object]:
    return {
        "image": one.copy.sample_id,
        "image_split": one.copy.split,
        "image_dataset": one.copy.dataset,
        "shows": one.original.sample_id,
        "shows_split": one.original.split,
        "shows_dataset": one.original.dataset,
        "problem": "mirrored or turned" if one.turned else "",
        "similarity": round(one.likeness, 4),
    }
