"""Export of a trained architecture: weights for diffusers, model card, latest previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.dataset.licence import licence_metadata
from maskloom.pipeline.errors import report_write_errors
from maskloom.pipeline.files.atomic import model_digest
from maskloom.pipeline.files.ownership import whole_folder
from maskloom.pipeline.files.provenance import git_sha
from maskloom.train_baselines.architecture import ArchitectureTask

TEMPLATE = Path(__file__).with_name("model_card.md.j2")


def export(
    architecture: ArchitectureTask, name: str, config: ExperimentConfig, contract: Contract, target: Path
) -> dict[str, Any]:
    """Write the weights, the model card and the latest previews to `target`, atomically.

    Args:
        architecture: the trained architecture.
        name: its name in the configuration.
        config: the experiment.
        contract: the contract of the real dataset.
        target: the output folder; each entry of `ArchitectureTask.weights` becomes a subfolder.

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
    architecture: ArchitectureTask,
    name: str,
    config: ExperimentConfig,
    contract: Contract,
    sizes: dict[str, int],
    preview: Path | None,
) -> str:
    """Return the text of the model card (README.md), without local paths."""
    about = contract.description
    card = ModelCard.from_template(
        ModelCardData(**licence_metadata(about), tags=["medical", "maskloom", name.replace("_", "-")]),
        template_path=str(TEMPLATE),
        name=name,
        about=about,
        contract=contract,
        preview=preview,
        rows=len(architecture.rows),
        size=architecture.rows.size,
        parameters=", ".join(f"{key} {count:,}" for key, count in sizes.items()),
        changed=architecture.options.model_dump(mode="json", exclude_defaults=True),
        seed=config.seed,
        code=git_sha(),
    )
    return f"{card}\n"
