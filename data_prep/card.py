"""The dataset card: README.md with the front matter that the Hub reads.

The front matter has no `configs`, because `datasets` infers the splits from the names of the
shards. With `configs` in a local card, `datasets` 5.2 ignores the content of the files when it
computes its cache key, so that `load_dataset(PATH)` would return the cached rows of another dataset
with the same card and folder name.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import yaml

from maskloom.pipeline.dataset.contract import LEDGER_FILE, Description
from maskloom.pipeline.errors import one_line
from maskloom.pipeline.files.formatting import markdown_cell

# Licence identifiers of the Hub; any other licence is written as `other` with its name.
HUB_LICENCES = {
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "mit",
    "apache-2.0",
}
FILE_NAME = re.compile(r"\S+\.[A-Za-z][A-Za-z0-9]{1,4}(\.gz)?\b")
SIZE_CATEGORIES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(
    about: Description, labels: Mapping[str, Counter[str]], groups: Mapping[str, int], reasons: Sequence[str]
) -> str:
    """Return the text of the card.

    Args:
        about: description of the dataset.
        labels: number of rows per class for each split.
        groups: number of groups in each split.
        reasons: the reason for every input that was left out.
    """
    filled = [split for split in labels if labels[split]]
    front = yaml.safe_dump(
        _front_matter(about, sum(labels[split].total() for split in filled)), sort_keys=False, allow_unicode=True
    )
    sections = (
        f"---\n{front}---\n",
        f"# {about.dataset}: mask-and-prompt dataset\n",
        f"{about.modality.capitalize()}, {about.origin} images of {' or '.join(f'{height} x {width}' for height, width in about.sizes)} pixels (height x width), prepared by"
        " MaskLoom. `image` is what a generator learns, `conditioning_image` what a ControlNet sees, `mask` holds class indices,"
        " `text` is the prompt. A `group_id` (patient, lesion or cluster of near-duplicates) lies in one split.\n",
        "## Rows\n",
        _counts_table(about, labels, groups, filled),
        "## Mask classes\n",
        "".join(f"- {index}: {one_line(name)}\n" for index, name in enumerate(about.mask_classes)),
        "## Left out\n",
        _reasons_table(reasons),
        "## Preprocessing\n",
        "".join(
            f"- {key.replace('_', ' ')}: {one_line(_shown(value))}\n" for key, value in about.preprocessing.items()
        ),
        "## Licence and citation\n",
        f"{about.licence}. {about.citation}. {about.homepage}".strip() + "\n",
    )
    return "\n".join(sections)


def _front_matter(about: Description, rows: int) -> dict[str, object]:
    known = about.licence.lower() in HUB_LICENCES
    tasks = [
        "text-to-image",
        *(["image-segmentation"] if len(about.mask_classes) > 1 else []),
        *(["image-classification"] if about.labels else []),
    ]
    return {
        "pretty_name": f"{about.dataset} (mask-and-prompt)",
        "license": about.licence.lower() if known else "other",
        **({} if known else {"license_name": re.sub(r"[^a-z0-9.]+", "-", about.licence.lower()).strip("-")}),
        "task_categories": tasks,
        "tags": [
            "medical",
            "maskloom",
            "mask-and-prompt",
            about.origin,
            re.sub(r"[^a-z0-9]+", "-", about.modality.lower()).strip("-"),
        ],
        "size_categories": [next((name for limit, name in SIZE_CATEGORIES if rows < limit), "n>1M")],
    }


def _counts_table(
    about: Description, labels: Mapping[str, Counter[str]], groups: Mapping[str, int], splits: Sequence[str]
) -> str:
    names = list(about.labels) or ["none"]
    header = f"| split | rows | groups | {' | '.join(map(markdown_cell, names))} |\n|{' --- |' * (3 + len(names))}\n"
    lines = (
        f"| {split} | {labels[split].total()} | {groups[split]} | {' | '.join(str(labels[split][name]) for name in names)} |\n"
        for split in splits
    )
    return header + "".join(lines)


def _reasons_table(reasons: Sequence[str]) -> str:
    """Return a table of reasons and counts, without the details (names, numbers) in the ledger."""
    if not reasons:
        return "Nothing.\n"
    # A reason may begin with the name of a raw file, which may name a patient; the card is
    # published.
    counts = Counter(FILE_NAME.sub("a file", re.split(r"[:(]", reason)[0].strip()) for reason in reasons)
    lines = "".join(f"| {markdown_cell(reason)} | {count} |\n" for reason, count in counts.most_common())
    return f"{len(reasons)} inputs; `{LEDGER_FILE}` lists each with its reason.\n\n| reason | inputs |\n| --- | --- |\n{lines}"


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)
