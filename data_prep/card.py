"""The dataset card: README.md with the front matter that the Hub reads.

The front matter has no `configs`, because `datasets` infers the splits from the names of the
shards. With `configs` in a local card, `datasets` 5.2 ignores the content of the files when it
computes its cache key, so that `load_dataset(PATH)` would return the cached rows of another dataset
with the same card and folder name.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard

from maskloom.pipeline.dataset.contract import LEDGER_FILE, Description
from maskloom.pipeline.dataset.licence import HUB_LICENCES, hub_identifier, other_licence
from maskloom.pipeline.errors import one_line
from maskloom.pipeline.files.formatting import markdown_table

TEMPLATE = Path(__file__).with_name("dataset_card.md.j2")
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
    names = list(about.labels) or ["none"]
    rows = [[split, labels[split].total(), groups[split], *(labels[split][name] for name in names)] for split in filled]
    # `DatasetCardData` would reorder the keys, and with them change the digests of datasets.
    card = RepoCard.from_template(
        CardData(**_front_matter(about, sum(labels[split].total() for split in filled))),
        template_path=str(TEMPLATE),
        about=about,
        sizes=" or ".join(f"{height} x {width}" for height, width in about.sizes),
        counts="\n".join(markdown_table(["split", "rows", "groups", *names], rows)),
        mask_classes=[one_line(name) for name in about.mask_classes],
        rejected=len(reasons),
        ledger=LEDGER_FILE,
        reasons=_reasons_table(reasons) if reasons else "",
        preprocessing={key.replace("_", " "): one_line(_shown(value)) for key, value in about.preprocessing.items()},
        licence=f"{about.licence}. {about.citation}. {about.homepage}".strip(),
    )
    return f"{card}\n"


def _front_matter(about: Description, rows: int) -> dict[str, Any]:
    known = about.licence.lower() in HUB_LICENCES
    tasks = [
        "text-to-image",
        *(["image-segmentation"] if len(about.mask_classes) > 1 else []),
        *(["image-classification"] if about.labels else []),
    ]
    return {
        "pretty_name": f"{about.dataset} (mask-and-prompt)",
        **({"license": about.licence.lower()} if known else other_licence(about)),
        "task_categories": tasks,
        "tags": ["medical", "maskloom", "mask-and-prompt", about.origin, hub_identifier(about.modality)],
        "size_categories": [next((name for limit, name in SIZE_CATEGORIES if rows < limit), "n>1M")],
    }


def _reasons_table(reasons: Sequence[str]) -> str:
    """Return a table of reasons and counts, without the details (names, numbers) in the ledger."""
    # A reason may begin with the name of a raw file, which may name a patient; the card is
    # published.
    counts = Counter(FILE_NAME.sub("a file", re.split(r"[:(]", reason)[0].strip()) for reason in reasons)
    return "\n".join(markdown_table(["reason", "inputs"], counts.most_common()))


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return "none" if value is None else str(value)
