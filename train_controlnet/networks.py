"""The backbone, and which of its weights (or of a ControlNet's, or of adapters') are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from maskloom.models.stable_diffusion.keys import CONTROLNET_KEY, KEY
from maskloom.models.stable_diffusion.loading import (
    load_controlnet,
    load_noise_schedule,
    load_part,
    use_xformers,
)
from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder, text_states
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.text import load_tokenizer
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError, excerpt
from maskloom.pipeline.training.precision import DTYPES

# Blocks of one class share their code, and beyond so many shapes of them torch would continue uncompiled; its default of 8 is too few.
MOST_BLOCK_SHAPES = 64
# The attention's projections, as in diffusers' LoRA scripts; CLIP names its own otherwise.
LORA_TARGETS = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "controlnet": ["to_k", "to_q", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
# What a ControlNet's inputs and residuals have in common with the UNet that they are added to.
SHARED_SIZES = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")


@dataclass
class Networks:
    """The parts of Stable Diffusion, and a ControlNet.

    Attributes:
        scheduler: the noise schedule that is trained with.
        controlnet: None where there is none.
        scheduler_settings: of the backbone's own scheduler, from which images are sampled (`models.stable_diffusion.sampling`).
    """

    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    controlnet: ControlNetModel | None
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)

    def loaded(self) -> dict[str, nn.Module]:
        """Return the networks that there are, by name."""
        parts = {
            "controlnet": self.controlnet,
            "unet": self.unet,
            "text_encoder": self.text_encoder,
            "vae": self.vae,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, device: torch.device | str) -> None:
        """Move all networks."""
        for part in self.loaded().values():
            part.to(device)

    def trained(self) -> dict[str, nn.Module]:
        """Return the networks that hold trained weights, by name."""
        return {name: part for name, part in self.loaded().items() if any(p.requires_grad for p in part.parameters())}

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return mean and log-variance of the latents, (B, 2C, h, w), of (B, 3, H, W) images in [-1, 1]."""
        return self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def text_states(self, encoder: PromptEncoder, prompts: Sequence[str]) -> Tensor:
        """Return the text encoder's last hidden states, (B, L, D); L counts the tokens of all pieces of a prompt."""
        return text_states(self.text_encoder, encoder.tokens(prompts).to(self.text_encoder.device))


def load_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Return the networks on the device; trained weights are float32, frozen ones of `mixed_precision`.

    Weights that start at random (a fresh ControlNet's, the adapters') follow torch's global seed.

    Raises:
        MaskLoomError: a part cannot be loaded or does not fit the others, or a switch needs a package that is missing.
    """
    source, dtype = BackboneSource.of(config), DTYPES[config.mixed_precision]
    # In float32 at first: weights that will be trained, or are copied to be, must not begin rounded.
    unet = load_part(source, "unet")
    networks = Networks(
        load_tokenizer(source),
        load_noise_schedule(source, config.prediction_type, config.rescale_betas_zero_snr),
        load_part(source, "text_encoder", dtype),
        load_part(source, "vae", dtype),
        unet,
        _controlnet(config, unet),
        source.scheduler_settings(),
    )
    return prepared_networks(networks, config, device)


def prepared_networks(networks: Networks, config: TrainConfig, device: torch.device) -> Networks:
    """Return the networks as they are trained: what is trained chosen, precisions, device and switches set."""
    _choose_trained(networks, config)
    for network in networks.loaded().values():
        _set_precision(network, DTYPES[config.mixed_precision])
        network.to(device)
    _apply_switches(networks, config)
    return networks


def _controlnet(config: TrainConfig, unet: UNet2DConditionModel) -> ControlNetModel | None:
    """Return a ControlNet in float32: a copy of the UNet's encoder, or given weights to continue from.

    Raises:
        MaskLoomError: the given weights cannot be loaded or belong to another kind of backbone, or the UNet's encoder cannot be copied.
    """
    if config.controlnet == "none":
        return None
    if not config.controlnet_model_name_or_path:
        return copied_controlnet(config, unet)
    controlnet = load_controlnet(config.controlnet_model_name_or_path)
    check_controlnet(config, controlnet, unet)
    return controlnet


def copied_controlnet(config: TrainConfig, unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet that starts as a copy of the UNet's encoder.

    Raises:
        MaskLoomError: the UNet has layers that diffusers' ControlNet has not.
    """
    try:
        return ControlNetModel.from_unet(unet)
    except Exception as error:  # whatever a UNet of another make raises, the remedy is the same
        raise MaskLoomError(
            f"{KEY}={config.pretrained_model_name_or_path}: no ControlNet can be made from its UNet ({excerpt(error)}); "
            "give a backbone of Stable Diffusion 1.x or 2.x, or set train.controlnet=none"
        ) from error


def check_controlnet(config: TrainConfig, controlnet: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Check that a given ControlNet was made for this kind of backbone.

    Raises:
        MaskLoomError: it was not.
    """
    unlike = [size for size in SHARED_SIZES if controlnet.config[size] != unet.config[size]]
    if unlike:
        differences = ", ".join(f"{size} {controlnet.config[size]}, not {unet.config[size]}" for size in unlike)
        raise MaskLoomError(
            f"{CONTROLNET_KEY}={config.controlnet_model_name_or_path}: made for another backbone than "
            f"{config.pretrained_model_name_or_path} ({differences}); give a ControlNet of this backbone, or null to start from its UNet"
        )


def _choose_trained(networks: Networks, config: TrainConfig) -> None:
    """Freeze everything, then let go of what the configuration trains; add the adapters."""
    for part in networks.loaded().values():
        part.requires_grad_(False).eval()
    for name in config.lora:
        from peft import LoraConfig

        adapters = LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_alpha or config.rank,  # type: ignore[arg-type]
            init_lora_weights="gaussian",
            target_modules=LORA_TARGETS[name],
        )
        getattr(networks, name).add_adapter(adapters)
    if config.lora_model_name_or_path is not None:
        from maskloom.train_controlnet.starting_adapters import load_adapters

        load_adapters(networks.loaded(), config)
    for module in _trained_modules(networks, config):  # after the adapters: adding them freezes all other weights
        module.requires_grad_(True)


def _set_precision(network: nn.Module, frozen: torch.dtype) -> None:
    """Give frozen weights their precision, and trained ones float32: small updates would be lost in half of it."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)


def _trained_modules(networks: Networks, config: TrainConfig) -> list[nn.Module]:
    """Return the modules whose own weights are trained."""
    modules: list[nn.Module] = []
    if networks.controlnet is not None:
        modules += _trained_controlnet_modules(networks.controlnet, config)
    if not config.sd_locked:  # as in ControlNet's own code: the output blocks, not the encoder that it copied
        modules += [networks.unet.up_blocks, networks.unet.conv_norm_out, networks.unet.conv_out]
    return modules


def _trained_controlnet_modules(controlnet: ControlNetModel, config: TrainConfig) -> list[nn.Module]:
    """Return the trained part of a ControlNet.

    Raises:
        MaskLoomError: `train.controlnet_blocks` is larger than the ControlNet.
    """
    if config.controlnet == "full":
        return [controlnet]
    if config.controlnet == "frozen":
        return []
    connections = [
        controlnet.controlnet_cond_embedding,
        controlnet.controlnet_down_blocks,
        controlnet.controlnet_mid_block,
    ]
    if config.controlnet == "zero_convs":
        return connections
    depth = len(controlnet.down_blocks)
    if config.controlnet_blocks > depth:
        raise MaskLoomError(
            f"train.controlnet_blocks={config.controlnet_blocks}: this ControlNet has {depth} blocks; give a smaller number, "
            "or train.controlnet=full"
        )
    return [*connections, controlnet.conv_in, *controlnet.down_blocks[: config.controlnet_blocks]]


def _apply_switches(networks: Networks, config: TrainConfig) -> None:
    """Set attention, activation checkpointing, memory format and compilation."""
    denoisers: list[Any] = [part for part in (networks.unet, networks.controlnet) if part is not None]
    if config.enable_xformers_memory_efficient_attention:
        use_xformers(*denoisers)
    # diffusers recomputes activations in training mode only; Stable Diffusion has no dropout that it would switch on.
    if config.recomputes_unet:
        networks.unet.train()
        networks.unet.enable_gradient_checkpointing()
    if config.gradient_checkpointing and networks.controlnet is not None:
        networks.controlnet.enable_gradient_checkpointing()
    if networks.controlnet is not None:
        networks.controlnet.train()
    for part in denoisers:
        if config.channels_last:
            part.to(memory_format=torch.channels_last)
        if config.torch_compile:
            compile_repeated_blocks(part)


def compile_repeated_blocks(network: nn.Module) -> None:
    """Compile each residual and attention block of a denoiser (regional compilation): equal blocks share one compilation.

    diffusers' own `compile_repeated_blocks` knows no blocks of a ControlNet, and leaves residual blocks out.
    """
    torch._dynamo.config.recompile_limit = MOST_BLOCK_SHAPES
    for module in network.modules():
        if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            module.compile()
