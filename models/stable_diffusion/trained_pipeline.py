"""The pipeline that a training leaves: the backbone with the trained weights of a run, and their
digest.

Generators sample from it, and evaluation measures its loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskloom.models.stable_diffusion.sampling import (
    Pipeline,
    build_pipeline,
    sampling_scheduler,
)
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import ADAPTER_FILE, exported_names
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.generate import GenerateConfig
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import file_digest, value_digest
from maskloom.pipeline.runs.record import require_intact
from maskloom.pipeline.runs.run import Run

if TYPE_CHECKING:
    import torch

AGAIN = "run train again with --force"
MODEL_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def trained_parts(config: ExperimentConfig, run: Run, wanted: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the `wanted` weights that this configuration trains, by name.

    The names are those of `models.stable_diffusion.trained_parts`.
    """
    return {name: run.generator / name for name in exported_names(config.fine_tuning) if name in wanted}


def weights_digest(config: ExperimentConfig, run: Run, parts: Mapping[str, Path]) -> str:
    """Return a digest of the backbone's identity and the content of the trained parts.

    Args:
        config: names the backbone.
        run: the run that trained the parts.
        parts: from `trained_parts`.

    Raises:
        MaskLoomError: a part has not been trained yet, or has changed since training.
    """
    for folder in parts.values():
        require_intact(run, "train", folder)
    files = [folder / name for part, folder in parts.items() for name in _files(part)]
    backbone = BackboneSource.of(config.fine_tuning).digest()
    return value_digest([backbone, *(file_digest(file) for file in files)]) if files else backbone


def _files(part: str) -> Sequence[str]:
    return (ADAPTER_FILE,) if part == "lora" else MODEL_FILES


def load_backbone(
    config: ExperimentConfig, device: torch.device, parts: Mapping[str, Path], sizes: Sequence[tuple[int, int]]
) -> Pipeline:
    """Return a Stable Diffusion pipeline; a ControlNet pipeline if `parts` has a `controlnet`.

    Args:
        config: names the backbone and the scheduler.
        device: the device to load it onto.
        parts: trained weights that replace or extend those of the backbone; from `trained_parts`.
        sizes: (height, width) of the images to be generated.

    Raises:
        MaskLoomError: the backbone or a part cannot be read, or xFormers is requested and not
            installed.
    """
    import torch

    from maskloom.models.stable_diffusion.loading import load_part, use_xformers
    from maskloom.models.stable_diffusion.text import load_tokenizer
    from maskloom.pipeline.cpu_memory import keep_freed_memory

    source, dtype, trained = (
        BackboneSource.of(config.fine_tuning),
        weight_dtype(config.generate),
        _models(config, parts),
    )
    pipe = build_pipeline(
        vae=trained.get("vae") or load_part(source, "vae", dtype),
        text_encoder=load_part(source, "text_encoder", dtype),
        tokenizer=load_tokenizer(source),
        unet=trained.get("unet") or load_part(source, "unet", dtype),
        scheduler=sampling_scheduler(source.scheduler_settings(), config.generate, config.fine_tuning, bool(parts)),
        controlnet=trained.get("controlnet"),
        sizes=sizes,
    )
    pipe.to(device)
    if "lora" in parts:
        _add_adapters(pipe, parts["lora"])
    if config.generate.enable_xformers_memory_efficient_attention:
        use_xformers(pipe)
    torch.backends.cudnn.deterministic = True
    if device.type == "cpu":
        keep_freed_memory()
    return pipe


def _models(config: ExperimentConfig, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Return the trained parts that are complete networks.

    Raises:
        MaskLoomError: a part's files are damaged.
    """
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    from maskloom.models.stable_diffusion.loading import load_trained

    kinds: dict[str, Any] = {"controlnet": ControlNetModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    dtype = weight_dtype(config.generate)
    return {name: load_trained(kinds[name], folder, AGAIN, dtype) for name, folder in parts.items() if name in kinds}


def _add_adapters(pipe: Pipeline, folder: Path) -> None:
    """Fuse LoRA adapters into the weights, so that sampling costs the same as without them.

    Raises:
        MaskLoomError: the file is damaged or belongs to another backbone.
    """
    try:
        pipe.load_lora_weights(folder, weight_name=ADAPTER_FILE, local_files_only=True, use_safetensors=True)
    except Exception as error:  # loaders raise many types; the remedy is the same
        raise MaskLoomError(f"{folder}: cannot be read as LoRA of this backbone: {one_line(error)}; {AGAIN}") from error
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # removes the wrapper layers; the fused weights stay


def weight_dtype(config: GenerateConfig) -> torch.dtype:
    """Return the dtype of weights and activations for `generate.mixed_precision`."""
    from maskloom.pipeline.training.precision import DTYPES

    return DTYPES[config.mixed_precision]
