"""The card of a combined dataset: README.md with the rows by origin and class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import yaml

from maskloom.pipeline.dataset.combining.plan import Combination
from maskloom.pipeline.dataset.combining.sets import SyntheticRow, SyntheticSet
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.licence import other_licence
from maskloom.pipeline.files.formatting import markdown_cell


def combination_card(
    about: Description,
    real: MaskPromptDataset,
    sets: Sequence[SyntheticSet],
    plan: Combination,
    real_labels: Sequence[int | None],
) -> str:
    """Return README.md: rows by origin and class, what was added, licence and citation."""
    front = yaml.safe_dump(
        {
            **other_licence(about),
            "tags": ["medical", "maskloom", "mask-and-prompt", "combined", "synthetic"],
        },
        sort_keys=False,
    )
    added = Counter(row.set for row in plan.chosen)
    lines = [
        f"---\n{front}---\n",
        f"# {about.dataset}: real and synthetic rows\n",
        f"{about.modality.capitalize()} images in MaskLoom's mask-and-prompt format: all rows of the real dataset, and synthetic ones in the train"
        " split. `origin` tells them apart. Validation, test and external splits hold real rows only. Synthetic images are not patients.\n",
        "## Train rows\n",
        _class_table(about.labels, real_labels, plan.chosen),
        "## Other splits\n",
        "".join(
            f"- {split}: {real.contract.splits[split].rows} real\n"
            for split in real.contract.split_names
            if split != "train"
        )
        or "None.\n",
        "## Synthetic datasets\n",
        "| generator | rows taken | rows there | licence | digest |\n| --- | --- | --- | --- | --- |\n"
        + "".join(
            f"| {one.settings()['generator']} | {added[number]} | {len(one.ids)} | {markdown_cell(one.dataset.description.licence)} |"
            f" `{one.dataset.digest[:12]}` |\n"
            for number, one in enumerate(sets)
        ),
        f"Ratio: {'as many as there are or are needed' if plan.settings['ratio'] is None else plan.settings['ratio']}; classes balanced: "
        f"{'yes' if plan.settings['balance'] else 'no'}; stage: {plan.settings['stage'] or 'the only one'}; seed {plan.settings['seed']}.\n",
        "## Licence and citation\n",
        f"Real rows: {real.description.licence}. {about.citation}. {about.homepage}".strip() + "\n",
    ]
    return "\n".join(lines)


def _class_table(names: Sequence[str], real_labels: Sequence[int | None], chosen: Sequence[SyntheticRow]) -> str:
    real, synthetic = Counter(real_labels), Counter(row.label for row in chosen)
    labels: list[int | None] = [*range(len(names))]
    if real[None] or synthetic[None]:
        labels.append(None)
    lines = [
        f"| {'no class' if label is None else markdown_cell(names[label])} | {real[label]} | {synthetic[label]} | {real[label] + synthetic[label]} |\n"
        for label in labels
    ]
    total = f"| all | {real.total()} | {synthetic.total()} | {real.total() + synthetic.total()} |\n"
    return "| class | real | synthetic | together |\n| --- | --- | --- | --- |\n" + "".join(lines) + total
