"""No held-out image, plain or altered, among the synthetic images that leave a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.audit.limits import NEAR_LIMIT
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import LeakedImages, MaskLoomError, one_line
from maskloom.pipeline.progress import say

SHOWN = 3  # images that the error names
LISTS = "logs/audit/*-leaked.jsonl"  # of a run: what stopped its training or evaluation


def require_no_held_out_images(real: MaskPromptDataset, synthetic: Sequence[MaskPromptDataset]) -> None:
    """Check that no synthetic image is a copy of a validation, test or external image.

    What stopped an evaluation counts, as it looks closer than this check does. More than `NEAR_LIMIT` images are
    not compared, which is reported.

    Raises:
        LeakedImages: some are; names the first ones.
        MaskLoomError: a list of what stopped an evaluation is damaged.
    """
    from maskloom.pipeline.dataset.audit.held_out import find_held_out_copies

    for dataset in synthetic:
        _require_no_listed_leak(real, dataset)
    if (rows := sum(dataset.num_rows for dataset in (real, *synthetic))) > NEAR_LIMIT:
        say(f"{rows} images are more than {NEAR_LIMIT}: copies of held-out images were not looked for")
        return
    found = [one for one in find_held_out_copies(real, synthetic) if one.copy.dataset != str(real.folder)]
    if found:
        raise _leaked(
            real, [f"{one.copy.sample_id} of {one.copy.dataset} shows {one.original.sample_id}" for one in found]
        )


def _require_no_listed_leak(real: MaskPromptDataset, synthetic: MaskPromptDataset) -> None:
    """Check that no list of leaks, of the run of either dataset, names an image of a synthetic one."""
    runs = dict.fromkeys([real.folder.parent, synthetic.folder.parent.parent])
    rows = [row for run in runs for path in sorted(run.glob(LISTS)) for row in _listed(path)]
    digests = synthetic.digest, real.digest
    found = [row for row in rows if (row.get("image_digest"), row.get("shows_digest")) == digests]
    if found:
        raise _leaked(real, [f"{row['image']} of {synthetic.folder} shows {row['shows']}" for row in found])


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{"image": row["image"], "shows": row["shows"], **row} for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise MaskLoomError(
            f"{path}: damaged ({one_line(error)}), so nothing says whether held-out images are among the synthetic ones; "
            "delete it, and evaluate again"
        ) from error


def _leaked(real: MaskPromptDataset, texts: list[str]) -> LeakedImages:
    more = [f"and {len(texts) - SHOWN} more"] * (len(texts) > SHOWN)
    return LeakedImages(
        f"{real.folder}: {len(texts)} synthetic image(s) are copies of its held-out images: "
        f"{', '.join(texts[:SHOWN] + more)}",
        "leave these images out where the set was made, and make it again",
    )


def require_none_of_its_parent(dataset: MaskPromptDataset) -> None:
    """Check the same of one synthetic dataset and the real one that it was made from; others pass.

    Raises:
        MaskLoomError: the real dataset is not there; or as for `require_no_held_out_images`.
    """
    parent = dataset.contract.parent
    if dataset.description.origin == "synthetic" and parent is not None:
        real = MaskPromptDataset.open((dataset.folder / parent.path).resolve())
        require_no_held_out_images(real, [dataset])
