"""The card of a combined dataset: README.md with the rows by origin and class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from huggingface_hub import CardData, RepoCard

from maskloom.pipeline.dataset.combining.plan import Combination
from maskloom.pipeline.dataset.combining.sets import SyntheticRow, SyntheticSet, positions_of
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.licence import other_licence
from maskloom.pipeline.files.formatting import markdown_table

TEMPLATE = Path(__file__).with_name("dataset_card.md.j2")


def combination_card(
    about: Description,
    real: MaskPromptDataset,
    sets: Sequence[SyntheticSet],
    plan: Combination,
    real_labels: Sequence[int | None],
) -> str:
    """Return README.md: rows by origin and class, what was added, licence and citation."""
    added = Counter(row.set for row in plan.chosen)
    sources = [
        [
            one.generator,
            added[number],
            len(one.ids),
            one.dataset.description.licence,
            f"`{one.dataset.digest[:12]}`",
        ]
        for number, one in enumerate(sets)
    ]
    card = RepoCard.from_template(
        # `DatasetCardData` would reorder the keys, and with them change the digests of datasets.
        CardData(**other_licence(about), tags=["medical", "maskloom", "mask-and-prompt", "combined", "synthetic"]),
        template_path=str(TEMPLATE),
        about=about,
        classes=_class_table(about.labels, real_labels, plan.chosen),
        other_splits={name: real.contract.splits[name].rows for name in real.contract.split_names if name != "train"},
        sources="\n".join(markdown_table(["generator", "rows taken", "rows there", "licence", "digest"], sources)),
        copies=[
            line for number, one in enumerate(sets) for line in _copies_lines(one, positions_of(plan.chosen, number))
        ],
        settings=plan.settings,
        licence=f"Real rows: {real.description.licence}. {about.citation}. {about.homepage}".strip(),
    )
    return f"{card}\n"


def _copies_lines(one: SyntheticSet, positions: Collection[int]) -> list[str]:
    """Return which rows of a set are copies, and what became of them; `positions`: of its rows that were taken."""
    found = {"left out": one.left_out, "**kept**": one.kept_among(positions)}
    return [
        f"{one.generator}: {len(rows)} rows are copies of training images, and were {done}: "
        f"{', '.join(f'{one.prefix}{sample} of {original}' for sample, original in rows.items())}."
        for done, rows in found.items()
        if rows
    ]


def _class_table(names: Sequence[str], real_labels: Sequence[int | None], chosen: Sequence[SyntheticRow]) -> str:
    real, synthetic = Counter(real_labels), Counter(row.label for row in chosen)
    labels: list[int | None] = [*range(len(names)), *([None] if real[None] or synthetic[None] else [])]
    lines = [
        ["no class" if label is None else names[label], real[label], synthetic[label], real[label] + synthetic[label]]
        for label in labels
    ]
    total = ["all", real.total(), synthetic.total(), real.total() + synthetic.total()]
    return "\n".join(markdown_table(["class", "real", "synthetic", "together"], [*lines, total]))
