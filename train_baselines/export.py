"""Writes what a family leaves: its weights as diffusers keeps models, with a model card and the newest previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.errors import told_when_unwritable
from maskloom.pipeline.files.atomic import model_digest
from maskloom.pipeline.files.ownership import whole_folder
from maskloom.pipeline.files.provenance import git_sha
from maskloom.pipeline.hub.cards import licence_metadata
from maskloom.train_baselines.family import Family


def export(family: Family, name: str, config: ExperimentConfig, contract: Contract, target: Path) -> dict[str, Any]:
    """Write the weights whole or not at all.

    Args:
        family: after its training.
        name: the family's.
        config: the experiment.
        contract: the real dataset's.
        target: the folder; each network of `Family.weights` becomes a folder in it.

    Returns:
        digest of the weights, and how many were trained for generation and in all.
    """
    weights = family.weights()
    pictures = max(family.pictures.glob("step-*.png"), default=None)
    sizes = {key: sum(p.numel() for p in network.parameters()) for key, network in family.networks.items()}
    with told_when_unwritable(target), whole_folder(target) as folder:
        for key, network in weights.items():
            network.save_pretrained(folder / key)
        (folder / "README.md").write_text(_card(family, name, config, contract, sizes, pictures), encoding="utf-8")
        if pictures:
            (folder / "samples.png").write_bytes(pictures.read_bytes())
    return {"weights_digest": model_digest(str(target)), "trained_parameters": sizes}


def _card(
    family: Family,
    name: str,
    config: ExperimentConfig,
    contract: Contract,
    sizes: dict[str, int],
    pictures: Path | None,
) -> str:
    """Return the README.md beside the weights; it names no path of this machine."""
    about, options = contract.description, family.options
    metadata = {**licence_metadata(about), "tags": ["medical", "maskloom", name.replace("_", "-")]}
    height, width = family.rows.size
    changed = options.model_dump(mode="json", exclude_defaults=True)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# `{name}` for {about.modality} ({about.dataset})

Trained by MaskLoom on real images only; `python -m generate` samples from it.
{"![previews](samples.png)" if pictures else ""}

| | |
|---|---|
| data | {about.dataset}, {about.licence}; {len(family.rows)} train rows |
| classes | {", ".join(about.labels) or "one"} |
| drawn at | {height} x {width}, {about.channels} channel(s) |
| parameters | {", ".join(f"{key} {count:,}" for key, count in sizes.items())} |
| options besides the defaults | `{changed}` |
| seed | {config.seed} |
| dataset digest | `{contract.digest}` |
| code | `{git_sha()}` |

Citation of the data: {about.citation}

The model can only show what its training data shows, may repeat training images, and is not a medical device.
"""
