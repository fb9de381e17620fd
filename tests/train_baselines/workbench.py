"""Experiments that train tiny architectures for seconds."""

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.train_baselines.rows import Rows
from maskloom.train_baselines.train import PACKAGE, train_baselines

COUNTS = {"train": 12, "validation": 6, "test": 4}
IN_STEPS = {
    "num_train_epochs": None, "logging_epochs": None, "validation_epochs": None, "checkpointing_epochs": None, "report_to": None,
    "train_batch_size": 2, "max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 3, "logging_steps": 2,
    "preview_images_per_class": 2, "learning_rate": 1e-3,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "class_gan": {**IN_STEPS, "image_size": 16, "base_channels": 4, "latent_dim": 8},
    "joint_gan": {**IN_STEPS, "image_size": 32, "channels": 16, "discriminator_channels": 4, "latent_dim": 8},
    "pix2pix": {**IN_STEPS, "channels": [4, 8, 8, 8]},
    "joint_diffusion": {
        **IN_STEPS, "model_channels": 8, "num_heads": 2, "channel_multipliers": [1, 2], "layers_per_block": 1, "attention_side": 16,
        "transformer_depth": 1, "preview_steps": 2,
    },
}  # fmt: skip
"""Options by architecture: networks and trainings that take a second."""


def tiny_values(run: Path, architectures: dict[str, dict[str, Any]], **sections: Any) -> dict[str, Any]:
    """Return an experiment's values; `architectures` holds changes to `TINY` by architecture."""
    return {
        "experiment": "tiny",
        "run_dir": str(run),
        "seed": 3,
        "data": {"dataset": "tiny", "image_size": 32},
        "baselines": {name: {**TINY[name], **changes} for name, changes in architectures.items()},
        "generate": {"generators": {name: {} for name in architectures}, "num_inference_steps": 2},
        **sections,
    }


def tiny_config(run: Path, architectures: dict[str, dict[str, Any]], **sections: Any) -> ExperimentConfig:
    """Return the experiment of `tiny_values`."""
    return ExperimentConfig.model_validate(tiny_values(run, architectures, **sections))


def write_config(file: Path, values: dict[str, Any]) -> Path:
    """Write an experiment's values as YAML."""
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def trained(run: Path, architecture: str, **changes: Any) -> dict[str, bytes]:
    """Train one architecture to its end and return the files of weights that it leaves."""
    train_baselines(tiny_config(run, {architecture: changes}), force=False)
    return weights(run, architecture)


def weights(run: Path, architecture: str) -> dict[str, bytes]:
    """Return the exported weights' bytes by file."""
    folder = run / "baselines" / architecture / "weights"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def tensors(run: Path, architecture: str) -> dict[str, Tensor]:
    """Return the exported weights by file and key."""
    folder = run / "baselines" / architecture / "weights"
    return {
        f"{path.parent.name}/{key}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def opened(run: Path, architecture: str, **changes: Any) -> Any:
    """Return an architecture before its training, on the CPU, as the stage opens it."""
    plugin = load_plugin(PACKAGE, architecture, "architecture")
    options = plugin.Options(**{**TINY[architecture], **changes})
    dataset = MaskPromptDataset.open(run / "dataset")
    size = options.image_size or dataset.description.image_size
    rows, previews = (Rows(dataset, split, size, plugin.Architecture.needs_masks) for split in ("train", "validation"))
    torch.manual_seed(0)
    return plugin.Architecture(options, rows, previews, 3, make_accelerator(options, run / "logs"))
