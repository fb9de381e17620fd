"""The dataset card of a filtered dataset."""

from __future__ import annotations

from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.licence import hub_identifier
from maskloom.pipeline.files.formatting import markdown_cell
from maskloom.pipeline.filter_summary import FilterSummary


def dataset_card(description: Description, summary: FilterSummary) -> str:
    """Return a Hugging Face dataset card.

    Args:
        description: of the filtered dataset.
        summary: what the filter did.
    """
    criteria = list(summary.thresholds)
    return "\n".join(
        [
            "---",
            "license: other",
            f"license_name: {hub_identifier(description.licence)}",
            "tags: [synthetic, medical, maskloom]",
            "---",
            "",
            f"# {description.dataset}: synthetic images by `{summary.generator}`, filtered",
            "",
            f"Synthetic {description.modality} images in MaskLoom's mask-and-prompt format: the rows of the set `{summary.generator}` that "
            f"all criteria accept. {summary.sentence()}. Thresholds were chosen on {summary.validation_images} real validation images, "
            f"of which {summary.accepted:.1%} are accepted. A filter drops what is hard: compare the counts of the classes. "
            "Synthetic images are not patients: do not use them for diagnosis.",
            "",
            "| class | images | rejected at first | could not be replaced | " + " | ".join(criteria) + " |",
            "|---" * (4 + len(criteria)) + "|",
            *(
                f"| {markdown_cell(one.name)} | {one.images} | {one.rejected} | {one.unfilled} | "
                + " | ".join(str(one.rejected_by.get(name, 0)) for name in criteria)
                + " |"
                for one in summary.subsets
            ),
            "",
            *[line for warning in summary.warnings for line in (f"Warning: {markdown_cell(warning)}.", "")],
            "`rejected.jsonl` lists every rejected image with the criteria that rejected it.",
            "",
            "## The real dataset behind it",
            "",
            description.citation,
            "",
            description.homepage,
            "",
            f"Licence: {description.licence}",
            "",
        ]
    )
