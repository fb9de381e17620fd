"""The networks of a training on torch's meta device, built from their `config.json`; no weights are read."""

import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel

from pipeline.backbone import KEY, check_backbone, silence_loading
from pipeline.config import TrainConfig
from pipeline.errors import MaskLoomError, one_line
from train_controlnet.networks import Networks, prepared_networks
from train_controlnet.plan_memory import OnGpu

META = torch.device("meta")
CONTROLNET_KEY = "train.controlnet_model_name_or_path"


def planned_networks(config: TrainConfig) -> Networks:
    """Return the networks as the training would have them, on the meta device; there is no tokenizer.

    Compilation and xFormers are left out: they change how fast a step is, and by little what it keeps.

    Raises:
        MaskLoomError: a `config.json` is not to be had, or does not fit.
    """
    check_backbone(config.pretrained_model_name_or_path)
    source = (config.pretrained_model_name_or_path, config.revision, KEY)
    with META:
        unet = UNet2DConditionModel.from_config(_settings(UNet2DConditionModel, "unet", *source))
        vae = AutoencoderKL.from_config(_settings(AutoencoderKL, "vae", *source))
        text_encoder = CLIPTextModel(_text_settings(*source))
        networks = Networks(
            tokenizer=None,
            scheduler=DDPMScheduler.from_config(_settings(DDPMScheduler, "scheduler", *source)),
            text_encoder=text_encoder,
            vae=vae,
            unet=unet,
            controlnet=_controlnet(config, unet),
        )
        plain = {"torch_compile": False, "enable_xformers_memory_efficient_attention": False}
        return prepared_networks(networks, config.model_copy(update=plain), META)


def recompute_on_gpu(networks: Networks, config: TrainConfig, gpu: OnGpu) -> None:
    """Have activation checkpointing call the layers again as they are called on a GPU: a backward pass suspends `gpu`."""
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (torch.enable_grad(), gpu))
    if config.recomputes_unet:
        networks.unet.enable_gradient_checkpointing(again)
    if config.gradient_checkpointing and networks.controlnet is not None:
        networks.controlnet.enable_gradient_checkpointing(again)


def _controlnet(config: TrainConfig, unet: UNet2DConditionModel) -> ControlNetModel | None:
    if config.controlnet == "none":
        return None
    name = config.controlnet_model_name_or_path
    if not name:
        return ControlNetModel.from_unet(unet)
    return ControlNetModel.from_config(_settings(ControlNetModel, None, name, None, CONTROLNET_KEY))


@lru_cache
def _settings(part: type[Any], subfolder: str | None, name: str, revision: str | None, key: str) -> dict[str, Any]:
    """Return the content of a part's `config.json`, from a folder, the Hub's cache, or the Hub.

    Raises:
        MaskLoomError: it is not there; says what to do.
    """
    silence_loading()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # about an old argument that diffusers hands to the Hub's library
            return part.load_config(name, subfolder=subfolder, revision=revision, local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        raise _unreadable(part, subfolder, name, key, error) from None


@lru_cache
def _text_settings(name: str, revision: str | None, key: str) -> CLIPTextConfig:
    """Return the text encoder's settings; see `_settings`."""
    silence_loading()
    try:
        return CLIPTextConfig.from_pretrained(
            name, subfolder="text_encoder", revision=revision, local_files_only=Path(name).is_dir()
        )
    except (OSError, ValueError) as error:
        raise _unreadable(CLIPTextModel, "text_encoder", name, key, error) from None


def _unreadable(part: type[Any], subfolder: str | None, name: str, key: str, error: Exception) -> MaskLoomError:
    where = "/".join(filter(None, (name, subfolder)))
    if Path(name).is_dir():
        return MaskLoomError(
            f"{key}: {where} holds no settings that {part.__name__} reads ({one_line(error)[:200]}); give a folder in diffusers format"
        )
    return MaskLoomError(
        f"{key}={name}: the settings of its {subfolder or 'ControlNet'} are neither in the Hub's cache nor to be had from the Hub; "
        "connect to the network once, correct the name, or give a local folder"
    )
