"""The experiment that the parts train, sample and resume, and what they measure it with."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarks.gpu.setup import Setup
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.files.provenance import peak_memory_mb

LOWEST_PHANTOM = 64  # pixels


def values(setup: Setup, run: Path, **train: Any) -> dict[str, Any]:
    """Return a configuration as written in YAML.

    Args:
        setup: decides the sizes.
        run: the run folder.
        train: overrides of the section `train`.
    """
    scale = setup.scale
    return {
        "experiment": "benchmark",
        "run_dir": str(run),
        "data": {
            "dataset": "phantom_bus",
            "image_size": scale.image_size,
            "options": {"patients": scale.patients, "height": max(scale.image_size, LOWEST_PHANTOM)},
            "splits": {"train": 0.8, "validation": 0.2, "test": 0.0},
        },
        "train": {
            "pretrained_model_name_or_path": str(setup.backbone),
            "train_batch_size": scale.batch,
            "mixed_precision": setup.precisions[0],
            "lr_scheduler": "constant",
            "validation_samples": scale.batch,
            "num_validation_images": 0,
            "report_to": None,
            **train,
        },
        "generate": {
            "generators": {"controlnet": {}},
            "mixed_precision": setup.precisions[0],
            "batch_size": scale.batch,
            "num_inference_steps": scale.sampling_steps,
            "num_images": (1 + scale.rounds) * scale.batch,
        },
    }


def experiment(setup: Setup, run: Path, **train: Any) -> ExperimentConfig:
    """Return a configuration; see `values`."""
    return ExperimentConfig.model_validate(values(setup, run, **train))


def new_run(setup: Setup, folder: Path) -> Path:
    """Make a run folder with the dataset and return it."""
    folder.mkdir(parents=True)
    (folder / "dataset").symlink_to(setup.run / "dataset")
    return folder


def forget_accelerator() -> None:
    """Let the next training have another precision: accelerate keeps its state for a process's life."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def synchronise(device: str) -> None:
    """Wait until the device has computed everything."""
    if device == "cuda":
        torch.cuda.synchronize()


def forget_memory(device: str) -> None:
    """Free what nothing refers to, and let the peak start from what is left."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: str) -> float:
    """Return the peak memory of tensors on a GPU since `forget_memory`; on a CPU that of the whole process."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float(peak_memory_mb())


def device_mib(device: str) -> float:
    """Return the peak memory that a GPU shows in use, CUDA's own included; on a CPU as `peak_mib`."""
    if device != "cuda":
        return float(peak_memory_mb())
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()) / 2**20
