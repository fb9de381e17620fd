"""Export of a trained architecture: weights for diffusers, model card, latest previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.errors import report_write_errors
from maskloom.pipeline.files.atomic import model_digest
from maskloom.pipeline.files.ownership import whole_folder
from maskloom.pipeline.files.provenance import git_sha
from maskloom.pipeline.hub.cards import licence_metadata
from maskloom.train_baselines.architecture import Architecture


def export(
    architecture: Architecture, name: str, config: ExperimentConfig, contract: Contract, target: Path
) -> dict[str, Any]:
    """Write the weights, the model card and the latest previews to `target`, atomically.

    Args:
        architecture: the trained architecture.
        name: its name in the configuration.
        config: the experiment.
        contract: the contract of the real dataset.
        target: the output folder; each entry of `Architecture.weights` becomes a subfolder.

    Returns:
        The digest of the weights, and the number of trained parameters of each network.
    """
    weights = architecture.weights()
    preview = max(architecture.preview_folder.glob("step-*.png"), default=None)
    sizes = {key: sum(p.numel() for p in network.parameters()) for key, network in architecture.networks.items()}
    with report_write_errors(target), whole_folder(target) as folder:
        for key, network in weights.items():
            network.save_pretrained(folder / key)
        (folder / "README.md").write_text(_card(architecture, name, config, contract, sizes, preview), encoding="utf-8")
        if preview:
            (folder / "samples.png").write_bytes(preview.read_bytes())
    return {"weights_digest": model_digest(str(target)), "trained_parameters": sizes}


def _card(
    architecture: Architecture,
    name: str,
    config: ExperimentConfig,
    contract: Contract,
    sizes: dict[str, int],
    preview: Path | None,
) -> str:
    """Return the text of the model card (README.md), without local paths."""
    about, options = contract.description, architecture.options
    metadata = {**licence_metadata(about), "tags": ["medical", "maskloom", name.replace("_", "-")]}
    height, width = architecture.rows.size
    changed = options.model_dump(mode="json", exclude_defaults=True)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# `{name}` for {about.modality} ({about.dataset})

Trained by MaskLoom on real images only; `maskloom generate` samples from it.
{"![previews](samples.png)" if preview else ""}

| | |
|---|---|
| data | {about.dataset}, {about.licence}; {len(architecture.rows)} train rows |
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
