"""`joint_diffusion`: a class-conditional denoiser of an image together with its mask.

Inspired by MedSegDiff-V2 (Wu et al. 2024, arXiv:2301.11798), which segments a given image by a
diffusion model with transformer blocks. This architecture uses the same transformer blocks and
noise schedule, but denoises image and mask planes jointly and so generates both. Mask classes are
encoded as -1 and 1 (Chen et al., Analog Bits, 2022). Class dropout enables classifier-free guidance
(Ho and Salimans 2022). Patches may be folded into channels (Hoogeboom et al., simple diffusion,
2023).

Defaults: 256 x 256, 128 channels, transformers of 6 blocks with 8 heads, T = 1000, betas from 1e-4
to 0.02, AdamW at 1e-4 with a cosine schedule, batches of 8, 100 epochs.

The network is diffusers' `UNet2DConditionModel`, saved with its `DDPMScheduler`: both load without
this project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd
from typing import Annotated, Any, Literal

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from maskloom.models.joint_diffusion import class_tokens, sampled
from maskloom.models.mask_planes import decoded_masks, drawn_planes, encoded_masks
from maskloom.pipeline.config.base import RESUMABLE
from maskloom.pipeline.config.bounds import BatchSize, Channels, Epochs, Layers, Side, Timesteps
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.architecture import ArchitectureOptions, ArchitectureTask, Samples
from maskloom.train_baselines.rows import stacked

UNET = "unet"
VALIDATION_SAMPLES = 64


class Options(ArchitectureOptions):
    """Options of `joint_diffusion`."""

    train_batch_size: BatchSize = Field(8, ge=1)
    num_train_epochs: Epochs | None = Field(100, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "cosine"
    adam_weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    use_ema: bool = True
    validation_epochs: Epochs | None = Field(10, ge=1)
    checkpointing_epochs: Epochs | None = Field(10, ge=1)
    model_channels: Channels = Field(128, ge=8, multiple_of=8)
    channel_multipliers: tuple[Layers, ...] = Field(
        (1, 1, 2, 2, 2), min_length=1, description="multiples of model_channels, by level"
    )
    layers_per_block: Layers = Field(2, ge=1, description="residual blocks per level")
    attention_side: Side = Field(
        32, ge=1, description="levels with at most this side length in pixels have transformers"
    )
    transformer_depth: Layers = Field(6, ge=1, description="number of blocks per transformer")
    num_heads: Channels = Field(8, ge=1)
    patch_size: Side = Field(
        1,
        ge=1,
        description="side of the pixel squares that are folded into channels before the first layer: cheaper, coarser",
    )
    num_train_timesteps: Timesteps = Field(1000, ge=2)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    class_dropout: float = Field(
        0.1, ge=0, lt=1, description="fraction of the samples whose class is dropped in training"
    )
    preview_steps: Timesteps = Field(
        20, ge=1, description="UniPC steps for sample grids, which are sampled without guidance"
    )
    gradient_checkpointing: Annotated[bool, RESUMABLE] = Field(
        False, description="recompute activations in the backward pass"
    )

    @model_validator(mode="after")
    def _heads_divide_channels(self) -> Options:
        for multiplier in self.channel_multipliers:
            if self.model_channels * multiplier % self.num_heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide the {self.model_channels * multiplier} channels of a level; "
                    "change num_heads or model_channels"
                )
        return self

    def check_size(self, size: tuple[int, int]) -> None:
        """See `ArchitectureOptions.check_size`."""
        factor = self.patch_size * 2 ** (len(self.channel_multipliers) - 1)
        if any(side % factor for side in size):
            raise ValueError(
                f"both sides must be multiples of {factor} for {len(self.channel_multipliers)} levels and patch_size={self.patch_size}; "
                "give fewer channel_multipliers"
            )


class Architecture(ArchitectureTask):
    """A denoiser of images and masks."""

    options: Options
    needs_masks = True
    diversity_samples = 16  # each takes many passes
    collapse_remedy = "Early in training this is normal; later, train longer or change learning_rate or prediction_type"

    def __init__(self, *args: Any) -> None:
        """Build the denoiser."""
        super().__init__(*args)
        self.channels = self.description.channels
        self.mask_classes = len(self.description.mask_classes)
        self.mask_planes = drawn_planes(self.mask_classes)
        self.scheduler = noise_schedule(self.options)
        self.patch = self.options.patch_size
        planes = (self.channels + self.mask_planes) * self.patch**2
        size = (self.rows.size[0] // self.patch, self.rows.size[1] // self.patch)
        self.shape = (planes, *size)
        self.unet: Any = denoiser(self.options, planes, self.classes, size)
        if self.options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.networks = {UNET: self.placed(self.unet)}

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the denoising loss at random timesteps."""
        batch = self.flipped(batch, draws)
        clean = self._planes(batch)
        noise = draws.normal("noise", self.shape)
        timesteps = draws.integers("timestep", self.options.num_train_timesteps)
        dropped = draws.uniform("class dropout") < self.options.class_dropout
        labels = torch.where(dropped, self.classes, batch["label"])
        yield UNET, self._errors(self.networks[UNET], clean, noise, timesteps, labels).mean()

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Write previews; return their diversity and the validation loss, with fixed noise."""
        figures = super().validate(step)
        return figures if self.previews is self.rows else figures | {"loss": self._validation_loss()}

    def samples(self, labels: Tensor, masks: Tensor | None, seed: int) -> Samples:
        """Return image-mask pairs sampled without guidance."""
        noise = torch.randn(len(labels), *self.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        scheduler = UniPCMultistepScheduler.from_config(self.scheduler.config)
        folded = sampled(self.unet, scheduler, noise, labels, self.options.preview_steps, guidance_scale=1)
        planes = functional.pixel_shuffle(folded, self.patch)
        images, mask_planes = planes.split([self.channels, self.mask_planes], dim=1)
        return Samples(images, decoded_masks(mask_planes, self.mask_classes))

    def weights(self) -> Mapping[str, Any]:
        """Return the denoiser and its noise schedule."""
        return {UNET: self.unet, "scheduler": self.scheduler}

    def _planes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the denoiser's input for images and masks, (B, *shape)."""
        planes = torch.cat([batch["image"], encoded_masks(batch["mask"], self.mask_classes, self.mask_planes)], dim=1)
        return functional.pixel_unshuffle(planes, self.patch)

    def _errors(self, network: Any, clean: Tensor, noise: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error of the prediction for each sample, (B,).

        The network predicts the noise or the velocity (Salimans and Ho 2022).
        """
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        found = network(noisy, timesteps, class_tokens(labels, self.classes), class_labels=labels).sample.float()
        in_velocity = self.options.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(clean, noise, timesteps) if in_velocity else noise
        return functional.mse_loss(found, target, reduction="none").mean(dim=(1, 2, 3))

    def _validation_loss(self) -> float:
        """Return the mean error over validation rows, with evenly spaced timesteps."""
        count, batch_size = min(VALIDATION_SAMPLES, len(self.previews)), self.options.train_batch_size
        draws = Draws(self.seed, range(count), self.device)
        noise = draws.normal("validation noise", self.shape)
        timesteps = (torch.arange(count, device=self.device) + 0.5) / count * self.options.num_train_timesteps
        errors = []
        for start in range(0, count, batch_size):
            some = range(start, min(start + batch_size, count))
            batch = {key: value.to(self.device) for key, value in stacked([self.previews[n] for n in some]).items()}
            part = slice(some.start, some.stop)
            errors.append(
                self._errors(self.unet, self._planes(batch), noise[part], timesteps[part].long(), batch["label"])
            )
        return float(torch.cat(errors).mean())


def denoiser(options: Options, planes: int, classes: int, size: tuple[int, int]) -> UNet2DConditionModel:
    """Return the untrained network.

    Args:
        options: the options of this architecture.
        planes: number of input channels: image and mask planes, folded.
        classes: number of classes; index `classes` means no class.
        size: (height, width) after folding.
    """
    channels = [options.model_channels * multiplier for multiplier in options.channel_multipliers]
    attends = [max(size) / 2**level <= options.attention_side for level in range(len(channels))]
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=planes,
        out_channels=planes,
        block_out_channels=channels,
        down_block_types=["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends],
        up_block_types=["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)],
        layers_per_block=options.layers_per_block,
        norm_num_groups=gcd(32, options.model_channels // 4),  # groups of at least four channels
        transformer_layers_per_block=options.transformer_depth,
        attention_head_dim=options.num_heads,  # the number of heads, despite its name
        cross_attention_dim=classes + 1,
        num_class_embeds=classes + 1,
    )


def noise_schedule(options: Options) -> DDPMScheduler:
    """Return the noise schedule.

    Solvers built from it start at full noise and keep their estimates of the sample in [-1, 1].
    """
    return DDPMScheduler(
        num_train_timesteps=options.num_train_timesteps,
        beta_start=options.beta_start,
        beta_end=options.beta_end,
        beta_schedule="linear",
        prediction_type=options.prediction_type,
        thresholding=True,
        sample_max_value=1.0,
        timestep_spacing="trailing",
    )
