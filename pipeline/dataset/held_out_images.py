"""No held-out image, plain or altered, among the synthetic images that leave a run."""

from __future__ import annotations

from collections.abc import Sequence

from maskloom.pipeline.dataset.audit.limits import NEAR_LIMIT
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.listed_leaks import SHOWN, require_no_listed_leak
from maskloom.pipeline.errors import LeakedImages
from maskloom.pipeline.progress import say


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
        require_no_listed_leak(dataset, [dataset.folder, real.folder])
    if (rows := sum(dataset.num_rows for dataset in (real, *synthetic))) > NEAR_LIMIT:
        say(f"{rows} images are more than {NEAR_LIMIT}: copies of held-out images were not looked for")
        return
    found = [one for one in find_held_out_copies(real, synthetic) if one.copy.dataset != str(real.folder)]
    if found:
        named = [f"{one.copy.sample_id} of {one.copy.dataset} shows {one.original.sample_id}" for one in found[:SHOWN]]
        more = [f"and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
        raise LeakedImages(
            f"{real.folder}: {len(found)} synthetic image(s) are copies of its held-out images: {', '.join(named + more)}",
            "leave these images out where the set was made, and make it again",
        )


def require_none_of_its_parent(dataset: MaskPromptDataset) -> None:
    """Check the same of one synthetic dataset and the real one that it was made from; real ones pass.

    Of a combined one, only what stopped an evaluation is looked up, as `combine` compared its images.

    Raises:
        MaskLoomError: the real dataset is not there; or as for `require_no_held_out_images`.
    """
    parent = dataset.contract.parent
    if dataset.description.origin == "real" or parent is None:
        return
    real = (dataset.folder.resolve() / parent.path).resolve()
    if dataset.description.origin == "combined":
        require_no_listed_leak(dataset, [dataset.folder, real])
    else:
        require_no_held_out_images(MaskPromptDataset.open(real), [dataset])
