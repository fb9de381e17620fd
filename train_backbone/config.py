"""The configuration of the backbone recipe (`configs/backbone.yaml`)."""

from pathlib import Path

from pydantic import Field, model_validator

from maskloom.pipeline.config.base import MAX_NAME, NAME_PATTERN, Section, UserPath
from maskloom.pipeline.config.bounds import Channels, Copies, Layers, Side
from maskloom.pipeline.config.train import LoopConfig


class Source(Section):
    """A prepared mask-and-prompt dataset; its train split is the training data."""

    path: UserPath
    copies: Copies = Field(1, ge=1, description="copies of each image per epoch, each with its own augmentation")
    random_flip: bool = Field(
        False, description="flip half of the copies horizontally; `left` and `right` are swapped in their prompts"
    )
    affine: bool = Field(False, description="slightly rotate, scale and shift all copies but the first")


class Architecture(Section):
    """Sizes of the networks; see `train_backbone.architecture`."""

    image_size: Side = Field(128, ge=16, multiple_of=8)
    vae_channels: tuple[Channels, Channels, Channels, Channels] = (32, 64, 64, 64)
    vae_norm_groups: Channels = 16
    text_width: Channels = 96
    text_layers: Layers = 2
    text_heads: Channels = 6
    model_max_length: Channels = Field(
        32, ge=8, description="number of tokens to which prompts are padded or truncated"
    )
    unet_channels: tuple[Channels, Channels, Channels] = (64, 96, 96)
    unet_head_dim: Channels = 16
    unet_norm_groups: Channels = 16
    prediction_type: str = Field("epsilon", pattern="^(epsilon|v_prediction)$")


class VaeConfig(LoopConfig):
    """Training of the VAE.

    It is convolutional, so it is trained on crops, which cost much less than whole images.
    """

    pixels: Side = Field(64, ge=16, multiple_of=8, description="side of the training images in pixels")
    crop: tuple[Side, Side] = Field(
        (72, 120), description="smallest and largest side of the crops from a prepared image"
    )
    brightness: tuple[float, float] = (0.85, 1.1)
    kl_weight: float = Field(5e-4, ge=0)
    perceptual_weight: float = Field(1.0, ge=0)
    adversarial_weight: float = Field(0.1, ge=0)
    adversarial_start: int | None = Field(
        None, ge=0, description="samples seen before adversarial training starts; null: never"
    )
    adversarial_ramp: int = Field(
        2400, ge=1, description="samples over which the adversarial weight grows to its full value"
    )


class DenoiserConfig(LoopConfig):
    """Training of UNet and text encoder together, on cached moments of the VAE."""

    snr_gamma: float | None = Field(5.0, gt=0)
    proportion_empty_prompts: float = Field(0.1, ge=0, le=1)


class BackboneConfig(Section):
    """The whole recipe."""

    experiment: str = Field(pattern=NAME_PATTERN, max_length=MAX_NAME)
    run_dir: UserPath | None = Field(None, description="folder of checkpoints and logs; by default runs/EXPERIMENT")
    output_dir: UserPath = Field(description="StableDiffusionPipeline folder, written at the end")
    seed: int = Field(0, ge=0, lt=2**31)
    sources: tuple[Source, ...] = Field(min_length=1)
    architecture: Architecture = Architecture()
    vae: VaeConfig
    denoiser: DenoiserConfig

    @model_validator(mode="after")
    def _one_precision(self) -> "BackboneConfig":
        if self.vae.mixed_precision != self.denoiser.mixed_precision:
            raise ValueError(
                "vae.mixed_precision and denoiser.mixed_precision must be the same, "
                f"not {self.vae.mixed_precision} and {self.denoiser.mixed_precision}"
            )
        return self

    @property
    def run_folder(self) -> Path:
        """Where checkpoints and logs go: `run_dir`, by default `runs/EXPERIMENT`."""
        return self.run_dir or Path("runs") / self.experiment
