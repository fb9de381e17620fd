"""The networks of a training: backbone, ControlNet, adapters, and which weights are trained."""

from collections.abc import Callable, Mapping, Sequence
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

# Blocks of one class share compiled code, and torch stops compiling after this number of shapes.
# Its default of 8 is too low.
MOST_BLOCK_SHAPES = 64
# The projections of attention, as in diffusers' LoRA scripts, in diffusers' and in CLIP's names.
LORA_TARGETS = {
    "unet": ["to_k", "to_q", "to_v", "to_out.0"],
    "controlnet": ["to_k", "to_q", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
# Sizes in which a ControlNet must agree with the UNet that its residuals are added to.
SHARED_SIZES = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")


@dataclass
class Networks:
    """The parts of Stable Diffusion and, optionally, a ControlNet.

    Attributes:
        scheduler: the noise schedule of the training.
        controlnet: None without a ControlNet.
        scheduler_settings: the settings of the backbone's own scheduler, for sampling
            (`models.stable_diffusion.sampling`).
    """

    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    controlnet: ControlNetModel | None
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)

    def loaded(self) -> dict[str, nn.Module]:
        """Return the networks that exist, by name."""
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
        """Return mean and log-variance, (B, 2C, h, w), of images (B, 3, H, W) in [-1, 1]."""
        return self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def text_states(self, encoder: PromptEncoder, prompts: Sequence[str]) -> Tensor:
        """Return the text encoder's last hidden states, (B, L, D), over L tokens of all chunks."""
        return text_states(self.text_encoder, encoder.tokens(prompts).to(self.text_encoder.device))


def load_networks(config: TrainConfig, device: torch.device) -> Networks:
    """Return the networks on the device: trained weights in float32, others in `mixed_precision`.

    Weights that are initialised at random (adapters, layers of a new ControlNet) depend on torch's
    global seed.

    Raises:
        MaskLoomError: a part cannot be loaded or does not fit the others, or a switch needs a
            package that is missing.
    """
    source, dtype = BackboneSource.of(config), DTYPES[config.mixed_precision]
    # In float32 first: weights that will be trained, or copied into trained ones, are not rounded.
    unet = load_part(source, "unet")
    networks = Networks(
        load_tokenizer(source),
        load_noise_schedule(source, config.prediction_type, config.rescale_betas_zero_snr),
        load_part(source, "text_encoder", dtype),
        load_part(source, "vae", dtype),
        unet,
        make_controlnet(config, unet, load_controlnet),
        source.scheduler_settings(),
    )
    return prepared_networks(networks, config, device)


def prepared_networks(networks: Networks, config: TrainConfig, device: torch.device) -> Networks:
    """Choose the trained weights, set precisions, device and switches, and return the networks."""
    choose_trained(networks, config)
    frozen = DTYPES[config.mixed_precision]
    for network in networks.loaded().values():
        for parameter in network.parameters():  # trained ones in float32: half precision loses small updates
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
        network.to(device)
    apply_switches(networks, config)
    return networks


def make_controlnet(
    config: TrainConfig, unet: UNet2DConditionModel, load: Callable[[str], ControlNetModel]
) -> ControlNetModel | None:
    """Return the ControlNet to train: a copy of the UNet's encoder, or the one that is configured.

    Args:
        config: the section `train`.
        unet: the backbone's, in float32.
        load: loads a ControlNet by folder or Hub id.

    Raises:
        MaskLoomError: the configured ControlNet cannot be loaded or belongs to another backbone, or
            the UNet's encoder cannot be copied.
    """
    if config.controlnet == "none":
        return None
    if not config.controlnet_model_name_or_path:
        return copied_controlnet(config, unet)
    controlnet = load(config.controlnet_model_name_or_path)
    check_controlnet(config, controlnet, unet)
    return controlnet


def copied_controlnet(config: TrainConfig, unet: UNet2DConditionModel) -> ControlNetModel:
    """Return a ControlNet initialised as a copy of the UNet's encoder.

    Raises:
        MaskLoomError: the UNet has layers that diffusers' ControlNet does not have.
    """
    try:
        return ControlNetModel.from_unet(unet)
    except Exception as error:  # other kinds of UNet raise many kinds of errors; the remedy is the same
        raise MaskLoomError(
            f"{KEY}={config.pretrained_model_name_or_path}: no ControlNet can be made from its UNet ({excerpt(error)}); "
            "give a backbone of Stable Diffusion 1.x or 2.x, or set train.controlnet=none"
        ) from error


def check_controlnet(config: TrainConfig, controlnet: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Check that a ControlNet was made for this kind of backbone.

    Raises:
        MaskLoomError: its sizes differ.
    """
    unlike = [size for size in SHARED_SIZES if controlnet.config[size] != unet.config[size]]
    if unlike:
        differences = ", ".join(f"{size} {controlnet.config[size]}, not {unet.config[size]}" for size in unlike)
        raise MaskLoomError(
            f"{CONTROLNET_KEY}={config.controlnet_model_name_or_path}: made for another backbone than "
            f"{config.pretrained_model_name_or_path} ({differences}); give a ControlNet of this backbone, "
            "or null to start from its UNet"
        )


def choose_trained(networks: Networks, config: TrainConfig) -> None:
    """Freeze all weights, add the adapters, then unfreeze what the configuration trains."""
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
    for module in trained_modules(networks, config):  # last, because adding adapters freezes all other weights
        module.requires_grad_(True)


def trained_modules(networks: Networks, config: TrainConfig) -> list[nn.Module]:
    """Return the modules whose weights are trained, apart from adapters."""
    modules: list[nn.Module] = []
    if networks.controlnet is not None:
        modules += trained_controlnet_modules(networks.controlnet, config)
    if not config.sd_locked:  # as in the ControlNet repository: output blocks, not the copied encoder
        modules += [networks.unet.up_blocks, networks.unet.conv_norm_out, networks.unet.conv_out]
    return modules


def trained_controlnet_modules(controlnet: ControlNetModel, config: TrainConfig) -> list[nn.Module]:
    """Return the trained modules of a ControlNet.

    Raises:
        MaskLoomError: `train.controlnet_blocks` exceeds its number of blocks.
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


def apply_switches(networks: Networks, config: TrainConfig) -> None:
    """Set attention implementation, activation checkpointing, memory format and compilation."""
    denoisers: list[Any] = [part for part in (networks.unet, networks.controlnet) if part is not None]
    if config.enable_xformers_memory_efficient_attention:
        use_xformers(*denoisers)
    # diffusers recomputes activations only in training mode, which changes nothing else: Stable
    # Diffusion has no dropout.
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
    """Compile each residual and attention block of a denoiser: equal blocks share one compilation.

    diffusers' own `compile_repeated_blocks` (regional compilation) has no list of blocks for
    ControlNet, and leaves out residual blocks.
    """
    torch._dynamo.config.recompile_limit = MOST_BLOCK_SHAPES
    for module in network.modules():
        if type(module).__name__ in ("ResnetBlock2D", "BasicTransformerBlock"):
            module.compile()
