"""The dataset card of a synthetic dataset."""

from collections.abc import Mapping
from typing import Any

from maskloom.generate.joint import MaskFigures
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.licence import hub_identifier
from maskloom.pipeline.files.formatting import markdown_cell


def dataset_card(
    description: Description,
    counts: Mapping[str, int],
    settings: Mapping[str, Any],
    rejected: int,
    figures: MaskFigures,
) -> str:
    """Return a Hugging Face dataset card.

    Args:
        description: description of the synthetic dataset.
        counts: number of rows per class.
        settings: the generation settings.
        rejected: number of masks in `rejected.jsonl`.
        figures: statistics of generated masks; zero rows if masks were not generated.
    """
    lines = [
        "---",
        "license: other",
        f"license_name: {hub_identifier(description.licence)}",
        "tags: [synthetic, medical, maskloom]",
        "---",
        "",
        f"# {description.dataset}: synthetic images by `{settings['generator']}`",
        "",
        _summary(description, settings, drawn=figures.rows > 0),
        "",
    ]
    lines += [
        "| class | images |",
        "|---|---|",
        *(f"| {markdown_cell(name)} | {count} |" for name, count in counts.items()),
        "",
    ]
    lines += [
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {markdown_cell(value)} |" for key, value in settings.items()),
        "",
    ]
    given_up = "because they were empty" if figures.rows else "while warping"
    lines += [f"Masks given up {given_up}, listed in `rejected.jsonl` with the reason: {rejected}.", ""]
    lines += [f"The masks are drawn, not annotated: {figures.sentence()}.", ""] if figures.rows else []
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


def _summary(description: Description, settings: Mapping[str, Any], drawn: bool) -> str:
    return (
        f"Synthetic {description.modality} images in MaskLoom's mask-and-prompt format. {_masks_and_images(settings, drawn)}. "
        "Synthetic images are not patients: do not use them for diagnosis."
    )


def _masks_and_images(settings: Mapping[str, Any], drawn: bool) -> str:
    if drawn:
        return "Images and masks are drawn together, by a network that was trained on the train split only; no row has a parent"
    follows = (
        "follow their masks"
        if settings["uses_mask"]
        else "do not follow their masks: masks and prompts are those of the other generators, for comparison in pairs"
    )
    return f"Masks come from the train split only (`parent_id` names each); the images {follows}"
