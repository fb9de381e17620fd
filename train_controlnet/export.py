"""Export of the trained weights in diffusers' formats, each folder with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors.torch import save_file
from torch import Tensor

from maskloom.models.stable_diffusion.trained_parts import KOHYA_FILE, exported_names
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import report_write_errors
from maskloom.pipeline.files.ownership import whole_folder
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.model_card import model_card
from maskloom.train_controlnet.networks import Networks, load_networks

if TYPE_CHECKING:
    from maskloom.train_controlnet.task import DiffusionTask


def export(task: DiffusionTask, config: ExperimentConfig, run: Run, dataset: MaskPromptDataset) -> list[str]:
    """Write every folder of `exported_names`, each atomically, and return their names.

    `vae` is not among the folders written here: `train_decoder` has written it.
    """
    names = exported_names(config.fine_tuning)
    parts = task.parts if task.whole_weights is None else gathered_parts(task.whole_weights, config.fine_tuning)
    grid = max((run.logs("train") / "images").glob("step-*.png"), default=None)  # of the last validation
    for name in (name for name in names if name != "vae"):
        with report_write_errors(run.generator / name), whole_folder(run.generator / name) as folder:
            save_weights(name, parts, folder)
            (folder / "README.md").write_text(model_card(config, dataset, grid, name), encoding="utf-8")
            if grid:
                (folder / "samples.png").write_bytes(grid.read_bytes())
    return names


def gathered_parts(weights: Mapping[str, dict[str, Tensor]], config: TrainConfig) -> Networks:
    """Return newly loaded networks with the trained weights that an engine had sharded."""
    parts = load_networks(config, torch.device("cpu"))
    for name, network in parts.trained().items():
        network.load_state_dict(weights[name])
    return parts


def save_weights(name: str, parts: Networks, folder: Path) -> None:
    """Write one folder of `exported_names` without its model card."""
    if name == "lora":
        adapters = {
            f"{part}_lora_layers": diffusers_adapters(part, getattr(parts, part)) for part in ("unet", "text_encoder")
        }
        StableDiffusionPipeline.save_lora_weights(folder, **adapters)
        save_file(kohya_names(adapters), folder / KOHYA_FILE, metadata={"format": "pt"})
    else:
        merged_network(getattr(parts, name)).save_pretrained(folder, safe_serialization=True)


def diffusers_adapters(name: str, network: Any) -> dict[str, Tensor] | None:
    """Return a network's adapters under diffusers' names, or None if it has none.

    The second matrix is multiplied by alpha / rank, because all programs read a file without alpha
    as alpha = rank.
    """
    if not hasattr(network, "peft_config"):
        return None
    from peft.utils import get_peft_model_state_dict

    settings = network.peft_config["default"]
    adapters = {
        key: weight * (settings.lora_alpha / settings.r) if "lora_B" in key else weight
        for key, weight in get_peft_model_state_dict(network, save_embedding_layers=False).items()
    }
    # LoRA files have a level of names that transformers 5 has dropped; all versions of diffusers
    # read it.
    if name == "text_encoder" and not hasattr(network, "text_model"):
        adapters = {f"text_model.{key}": weight for key, weight in adapters.items()}
    return convert_state_dict_to_diffusers(adapters)


def kohya_names(adapters: Mapping[str, dict[str, Tensor] | None]) -> dict[str, Tensor]:
    """Return adapters under kohya's names, with alpha = rank for each layer.

    Args:
        adapters: `unet_lora_layers` and `text_encoder_lora_layers`, as
            `StableDiffusionPipeline.save_lora_weights` takes them; None: no adapters.
    """
    unet, text_encoder = adapters["unet_lora_layers"] or {}, adapters["text_encoder_lora_layers"] or {}
    peft_names = {f"unet.{key}": value for key, value in convert_unet_state_dict_to_peft(unet).items()}
    if text_encoder:
        found = convert_state_dict_to_peft(text_encoder)
        peft_names |= {f"text_encoder.{key}": value for key, value in found.items()}
    # diffusers numbers the text encoder as in SDXL; Stable Diffusion 1 and 2 have a single one.
    named = {
        key.replace("lora_te1_", "lora_te_"): value for key, value in convert_state_dict_to_kohya(peft_names).items()
    }
    return {key: value.float().contiguous() for key, value in named.items()}


def merged_network(network: Any) -> Any:
    """Return a network in float32 with its adapters merged into the weights.

    `from_pretrained` of diffusers does not load adapters.
    """
    has_adapters = hasattr(network, "peft_config")
    if not has_adapters and all(tensor.dtype == torch.float32 for tensor in network.parameters()):
        return network
    whole = deepcopy(network).float()
    if has_adapters:
        from diffusers.utils.peft_utils import recurse_remove_peft_layers
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in whole.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        recurse_remove_peft_layers(whole)
        del whole.peft_config
    return whole
