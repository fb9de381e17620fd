"""The networks of a training on torch's meta device, built from their `config.json`; no weights are read."""

from functools import partial

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.loading import KINDS, load_noise_schedule, new_controlnet, new_network
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.train import TrainConfig
from maskloom.train_controlnet.memory_plan.memory import OnGpu
from maskloom.train_controlnet.networks import Networks, check_controlnet, copied_controlnet, prepared_networks

META = torch.device("meta")


def planned_networks(config: TrainConfig) -> Networks:
    """Return the networks as the training would have them, on the meta device; there is no tokenizer.

    Compilation and xFormers are left out: they change how fast a step is, and by little what it keeps.

    Raises:
        MaskLoomError: the backbone cannot be trained here, or the ControlNet does not fit it.
    """
    source = BackboneSource.of(config)
    check_backbone(source, settings_only=True)
    with META:
        unet, vae, text_encoder = (new_network(KINDS[part], source, part) for part in ("unet", "vae", "text_encoder"))
        networks = Networks(
            tokenizer=None,
            scheduler=load_noise_schedule(source, config.prediction_type, config.rescale_betas_zero_snr),
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
    if not config.controlnet_model_name_or_path:
        return copied_controlnet(config, unet)
    controlnet = new_controlnet(config.controlnet_model_name_or_path)
    check_controlnet(config, controlnet, unet)
    return controlnet
