"""The dataset card of a synthetic dataset."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.contract import Description


def dataset_card(
    description: Description, counts: Mapping[str, int], settings: Mapping[str, Any], rejected: int
) -> str:
    """Return a Hugging Face dataset card.

    Args:
        description: of the synthetic dataset.
        counts: rows by class name.
        settings: how the images were made.
        rejected: number of masks in `rejected.jsonl`.
    """
    lines = [
        *_front_matter(description),
        f"# {description.dataset}: synthetic images by `{settings['generator']}`",
        "",
        _summary(description, settings),
        "",
    ]
    lines += ["| class | images |", "|---|---|", *(f"| {name} | {count} |" for name, count in counts.items()), ""]
    lines += ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items()), ""]
    lines += [f"Masks given up while warping, listed in `rejected.jsonl` with the reason: {rejected}.", ""]
    lines += [
        "## The real dataset behind it",
        "",
        f"{description.citation}",
        "",
        f"{description.homepage}",
        "",
        f"Licence: {description.licence}",
        "",
    ]
    return "\n".join(lines)


def _front_matter(description: Description) -> Sequence[str]:
    return [
        "---",
        "license: other",
        f"license_name: {_licence_id(description.licence)}",
        "tags: [synthetic, medical, maskloom]",
        "---",
        "",
    ]


def _licence_id(licence: str) -> str:
    """Return a licence's name as the Hub takes it: an id in small letters."""
    return re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")


def _summary(description: Description, settings: Mapping[str, Any]) -> str:
    follows = (
        "follow their masks"
        if settings["uses_mask"]
        else "do not follow their masks: masks and prompts are those of the other generators, for comparison in pairs"
    )
    return (
        f"Synthetic {description.modality} images in MaskLoom's mask-and-prompt format. Masks come from the train split only (`parent_id` names each); "
        f"the images {follows}. Synthetic images are not patients: do not use them for diagnosis."
    )
