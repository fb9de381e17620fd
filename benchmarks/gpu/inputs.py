"""What the other parts are measured on: a random backbone, simulated images, an untrained ControlNet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.experiment import experiment
from benchmarks.gpu.setup import ROOT, SMALL_BACKBONE, Setup
from benchmarks.random_backbone import ARCHITECTURES, Architecture, write_random_backbone
from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.dataset.contract import read_contract


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Write an input and return its size."""
    if item == "dataset":
        prepare(experiment(setup, setup.run), force=False)
        return {f"{name}_rows": split.rows for name, split in read_contract(setup.run / "dataset").splits.items()}
    folder = setup.backbone if item == "backbone" else setup.run / "generator" / "controlnet"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        written = folder.with_name(f".{folder.name}.tmp")  # a killed process leaves no half of a folder
        shutil.rmtree(written, ignore_errors=True)
        (write_backbone if item == "backbone" else write_controlnet)(setup, written)
        written.rename(folder)
    return {"mib": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20}


def write_backbone(setup: Setup, folder: Path) -> None:
    """Write a Stable Diffusion folder with random weights."""
    name = setup.scale.backbone
    if name in ARCHITECTURES:
        write_random_backbone(ARCHITECTURES[name], folder)
    else:
        write_random_backbone(Architecture(SMALL_BACKBONE.name, 16, "epsilon"), folder, settings=ROOT / "assets")


def write_controlnet(setup: Setup, folder: Path) -> None:
    """Write a ControlNet as a training starts with it; its zero convolutions cost as much as trained ones."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(setup.backbone, subfolder="unet", local_files_only=True)
    ControlNetModel.from_unet(unet).save_pretrained(folder)
