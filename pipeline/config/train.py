"""The section `train`, and the settings of the shared training loop.

The keys have the names of diffusers' flags, so that a command line of `train_controlnet.py` can be
reused.
"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maskloom.pipeline.config.base import (
    MAX_NAME,
    NAME_PATTERN,
    RESUMABLE,
    RESUMABLE_UNLESS_STOPPED_EARLY,
    Precision,
    Resumable,
    Section,
    Size,
)
from maskloom.pipeline.config.bounds import (
    Accumulation,
    BatchSize,
    Copies,
    Epochs,
    Layers,
    Rank,
    Rows,
    Shown,
    Side,
    Steps,
    Timesteps,
    Workers,
)

Tracker = Literal["tensorboard", "wandb", "comet_ml", "all"]
"""Names of accelerate, each that of the tracker's package; `all`: those that are installed."""
POLYNOMIAL_END = 1e-7
"""The final learning rate of diffusers' polynomial schedule."""


class LoopConfig(Section):
    """The settings of the shared training loop, for any network."""

    train_batch_size: BatchSize = Field(4, ge=1, description="samples per process and micro-batch")
    gradient_accumulation_steps: Accumulation = Field(1, ge=1)
    max_train_steps: Steps = Field(1000, ge=0, description="optimizer steps; 0 leaves the networks untrained")
    num_train_epochs: Epochs | None = Field(
        None, ge=1, description="train for this many epochs instead of max_train_steps"
    )
    learning_rate: float = Field(1e-5, gt=0)
    scale_lr: bool = Field(False, description="multiply learning_rate by the global batch size")
    lr_scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant_then_linear",
    ] = "constant_with_warmup"
    lr_warmup_steps: Steps = Field(0, ge=0)
    lr_decay_start: float = Field(
        0.5, ge=0, lt=1, description="constant_then_linear: fraction of the steps before the decay starts"
    )
    lr_num_cycles: Steps = Field(1, ge=1)
    lr_power: float = Field(1.0, gt=0, description="exponent of the polynomial schedule")
    use_8bit_adam: bool = False
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Precision = "no"
    allow_tf32: bool = False
    torch_compile: bool = Field(
        False, description="compile the repeated blocks of the networks (torch.compile, regional)"
    )
    channels_last: bool = Field(False, description="use the channels-last memory format for convolutions")
    use_ema: bool = False
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    checkpointing_steps: Annotated[Steps, RESUMABLE] = Field(500, ge=1)
    checkpoints_total_limit: Annotated[Steps | None, RESUMABLE] = Field(2, ge=1)
    resume_from_checkpoint: Annotated[str | None, RESUMABLE] = Field(
        "latest", description="'latest', a checkpoint folder, or null to start from scratch"
    )
    validation_steps: Annotated[Steps, RESUMABLE_UNLESS_STOPPED_EARLY] = Field(500, ge=1)
    early_stopping_patience: Steps | None = Field(
        None, ge=1, description="stop after this many validations without a lower loss, and keep the best weights"
    )
    logging_steps: Annotated[Steps, RESUMABLE] = Field(10, ge=1)
    report_to: Annotated[Tracker | None, RESUMABLE] = "tensorboard"
    tracker_project_name: Annotated[str, RESUMABLE] = Field("maskloom", pattern=NAME_PATTERN, max_length=MAX_NAME)
    dataloader_num_workers: Annotated[Workers, RESUMABLE] = Field(0, ge=0)

    @model_validator(mode="after")
    def _polynomial_falls(self) -> Self:
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"lr_scheduler=polynomial decays to {POLYNOMIAL_END:g}, but learning_rate={self.learning_rate:g} "
                "is not above it; raise learning_rate, or choose another lr_scheduler"
            )
        return self

    @property
    def section(self) -> str:
        """Name of the configuration section, for messages."""
        return "train"

    @property
    def resumable_settings(self) -> frozenset[str]:
        """Names of the settings that may differ when this training is resumed, see `Resumable`."""
        classes = [one for one in reversed(type(self).__mro__) if issubclass(one, LoopConfig)]
        fields = [item for one in classes for item in one.model_fields.items()]
        marks = {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Resumable)}
        stops_early = self.early_stopping_patience is not None
        return frozenset(name for name, mark in marks.items() if mark.with_early_stopping or not stops_early)

    @property
    def trains_all_weights(self) -> bool:
        """Whether every weight receives a gradient in every step."""
        return True


class AugmentConfig(Section):
    """Augmentation, the same for an image, its mask and its conditioning image.

    Words of the prompt that describe the mask are updated: a lesion on the left is on the right
    after a flip. All other words stay the same, so set `random_flip=false` if the text of a report
    or a label distinguishes left from right.
    """

    variants: Copies = Field(
        4, ge=1, description="augmented copies of each row besides the row itself; all of them are cached"
    )
    random_flip: bool = Field(True, description="flip half of the copies horizontally")
    rotation_degrees: float = Field(5.0, ge=0, le=180)
    scale: tuple[float, float] = (0.95, 1.05)
    translation: float = Field(0.03, ge=0, lt=0.5, description="largest shift, as a fraction of the image's side")
    brightness: float = Field(
        0.05, ge=0, lt=1, description="largest shift, as a fraction of the intensity range; image only"
    )
    contrast: float = Field(0.1, ge=0, lt=1, description="largest relative change; image only")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> "AugmentConfig":
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: give the smallest and the largest factor, both above 0")
        return self


class AdherenceConfig(Section):
    """Mask adherence during training: a small U-Net trained on real images segments the samples."""

    num_images: Rows = Field(
        16, ge=8, description="validation masks to sample images for; fewer than 8 allow no conclusion"
    )
    num_inference_steps: Timesteps | None = Field(None, ge=1, description="null: the value of `generate`")
    guidance_scale: float | None = Field(
        None, ge=0, description="null: the value of `generate`; 1: without guidance, in half the time"
    )
    controlnet_conditioning_scale: float | None = Field(None, ge=0, description="null: the value of `generate`")
    image_size: Size = Field((128, 128), description="input size of the U-Net")
    steps: Steps = Field(300, ge=1, description="training steps of the U-Net")

    @model_validator(mode="after")
    def _size_suits_the_levels(self) -> "AdherenceConfig":
        if any(side < 16 or side % 8 for side in self.image_size):
            raise ValueError(f"image_size={list(self.image_size)}: both sides must be multiples of 8, and at least 16")
        return self


class DecoderConfig(Section):
    """Fine-tuning of the VAE's decoder before the ControlNet.

    A fine-tuned decoder reproduces structures more accurately than a frozen one, and texture more
    smoothly.
    """

    max_train_steps: Steps = Field(1000, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    train_batch_size: BatchSize = Field(4, ge=1)
    crop: Side = Field(
        256, ge=64, multiple_of=64, description="side of the training crops in pixels (the decoder is convolutional)"
    )


MOST_PROMPT_CHUNKS = 8
"""600 tokens of Stable Diffusion. The cost of cross-attention grows with the number of chunks."""
LoraTarget = Literal["unet", "text_encoder", "controlnet"]


class TrainConfig(LoopConfig):
    """`train`: a ControlNet, adapters (LoRA), or both, on a Stable Diffusion backbone."""

    pretrained_model_name_or_path: str
    revision: str | None = None
    variant: str | None = None
    tokenizer_name: str | None = Field(None, description="null: the backbone's")
    prompt_chunks: int | None = Field(
        None,
        ge=2,
        le=MOST_PROMPT_CHUNKS,
        description="encode prompts beyond the text encoder's limit in this many chunks; null: truncate them",
    )
    single_file_config: str | None = Field(
        None,
        description="for a backbone in one .safetensors file: Hub id or folder of a pipeline whose settings and "
        "tokenizer are used; null: the settings of Stable Diffusion 1.x or 2.x, and tokenizer_name",
    )
    controlnet_model_name_or_path: str | None = Field(
        None, description="initial weights of the ControlNet; null: those of the UNet's encoder"
    )
    lora_model_name_or_path: str | None = Field(
        None, description="initial LoRA adapters, a folder or a .safetensors file; null: new ones"
    )
    max_train_samples: Rows | None = Field(None, ge=1, description="train only on the first rows, this many")

    controlnet: Literal["full", "shallow", "zero_convs", "frozen", "none"] = Field(
        "full",
        description="trained weights of the ControlNet; shallow: the first controlnet_blocks blocks, all zero "
        "convolutions and the layers that embed the inputs; zero_convs: the zero convolutions and the conditioning "
        "embedding; frozen: none of them; none: no ControlNet",
    )
    controlnet_blocks: Layers = Field(2, ge=1, description="number of trained blocks for controlnet=shallow")
    sd_locked: bool = Field(True, description="false: also train the UNet's decoder")
    lora: list[LoraTarget] = Field(
        default_factory=list, description="networks whose attention layers get LoRA adapters"
    )
    rank: Rank = Field(4, ge=1, description="rank of the LoRA adapters")
    lora_alpha: float | None = Field(None, gt=0, description="null: the rank")
    vae_decoder: Annotated[DecoderConfig | None, RESUMABLE] = None

    gradient_checkpointing: Annotated[bool, RESUMABLE] = Field(
        False,
        description="recompute activations in the backward pass: those of the ControlNet, or of the UNet without one",
    )
    unet_gradient_checkpointing: Annotated[bool, RESUMABLE] = Field(
        False, description="also recompute the UNet's activations"
    )
    enable_xformers_memory_efficient_attention: bool = False
    cache_latents: bool = True

    augment: AugmentConfig | None = None
    proportion_empty_prompts: float = Field(
        0.0, ge=0, le=1, description="fraction of samples with an empty prompt; 1: train on masks only"
    )
    proportion_empty_conditioning: float = Field(
        0.0, ge=0, le=1, description="fraction of samples with a black conditioning image; 1: train on prompts only"
    )
    shuffle_conditioning: bool = Field(
        False,
        description="control experiment: every row gets another row's conditioning image, so that none can be followed",
    )
    snr_gamma: float | None = Field(None, gt=0, description="gamma of the min-SNR weighting")
    debiased_estimation_loss: bool = Field(False, description="weight the loss by 1/sqrt(SNR)")
    lesion_loss_weight: float = Field(
        1.0, ge=1, description="weight of the mask's foreground relative to the background"
    )
    noise_offset: float = Field(0.0, ge=0)
    rescale_betas_zero_snr: bool = Field(False, description="zero terminal SNR; needs v_prediction")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="null: the backbone's"
    )

    num_validation_images: Annotated[Shown, RESUMABLE] = Field(
        4, ge=0, description="rows of the validation split in each sample grid"
    )
    validation_prompt: Annotated[list[str], RESUMABLE] = Field(
        default_factory=list, description="prompts of further samples"
    )
    validation_image: Annotated[list[Path], RESUMABLE] = Field(
        default_factory=list,
        description="conditioning images of these samples, one per prompt, at the dataset's image size",
    )
    validation_timestep_bins: Annotated[Timesteps, RESUMABLE_UNLESS_STOPPED_EARLY] = Field(4, ge=1)
    validation_samples: Annotated[Rows, RESUMABLE_UNLESS_STOPPED_EARLY] = Field(
        64, ge=1, description="validation rows for the held-out loss"
    )
    adherence: Annotated[AdherenceConfig | None, RESUMABLE] = None

    @property
    def recomputes_unet(self) -> bool:
        """Whether the UNet's activations are recomputed in the backward pass."""
        return self.unet_gradient_checkpointing or (self.gradient_checkpointing and self.controlnet == "none")

    @model_validator(mode="after")
    def _something_is_trained(self) -> "TrainConfig":
        adapted, own = set(self.lora), self.controlnet in ("full", "shallow", "zero_convs")
        if not (own or adapted or not self.sd_locked):
            raise ValueError(
                f"controlnet={self.controlnet} with sd_locked=true and no lora trains nothing; "
                "set lora=[unet], sd_locked=false, or controlnet=full"
            )
        if len(adapted) < len(self.lora):
            raise ValueError(f"lora={self.lora}: name each network once")
        if "controlnet" in adapted and self.controlnet not in ("zero_convs", "frozen"):
            raise ValueError(
                f"lora=[controlnet] adapts frozen weights; set controlnet=zero_convs (or frozen), not {self.controlnet}"
            )
        if self.controlnet == "frozen" and self.controlnet_model_name_or_path is None:
            raise ValueError("controlnet=frozen needs controlnet_model_name_or_path: a new ControlNet has no effect")
        if self.lora_model_name_or_path is not None and not adapted & {"unet", "text_encoder"}:
            raise ValueError(
                "lora_model_name_or_path needs lora=[unet], [text_encoder] or both: only these can start from it"
            )
        if "unet" in adapted and not self.sd_locked:
            raise ValueError("lora=[unet] with sd_locked=false trains the UNet twice; choose one")
        return self

    @model_validator(mode="after")
    def _validation_images_have_prompts(self) -> "TrainConfig":
        prompts, images = len(self.validation_prompt), len(self.validation_image)
        if images != (0 if self.controlnet == "none" else prompts):
            raise ValueError(
                f"{prompts} validation_prompt and {images} validation_image with controlnet={self.controlnet}: "
                "give one image per prompt, and no images without a ControlNet"
            )
        return self

    @model_validator(mode="after")
    def _objective_is_one(self) -> "TrainConfig":
        if self.snr_gamma is not None and self.debiased_estimation_loss:
            raise ValueError("snr_gamma and debiased_estimation_loss are alternative loss weightings; choose one")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr leaves no signal at the last timestep, where epsilon cannot be learned; "
                "set prediction_type=v_prediction"
            )
        return self
