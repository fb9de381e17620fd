"""The section `train`, and what every training loop is configured by.

Keys bear the names of diffusers' own flags, so that a command line of `train_controlnet.py` carries over.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from maskloom.pipeline.config.base import MAX_NAME, NAME_PATTERN, Precision, Section, Size
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

POLYNOMIAL_END = 1e-7
"""The learning rate that diffusers' polynomial schedule falls to."""


class LoopConfig(Section):
    """What the shared training loop needs, whatever is trained."""

    train_batch_size: BatchSize = Field(4, ge=1, description="samples a process and micro-batch")
    gradient_accumulation_steps: Accumulation = Field(1, ge=1)
    max_train_steps: Steps = Field(1000, ge=0, description="optimizer steps; 0 leaves the networks as they start")
    num_train_epochs: Epochs | None = Field(None, ge=1, description="train so many epochs instead of max_train_steps")
    learning_rate: float = Field(1e-5, gt=0)
    scale_lr: bool = Field(False, description="multiply learning_rate by the global batch")
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
        0.5, ge=0, lt=1, description="constant_then_linear: share of the steps before the fall"
    )
    lr_num_cycles: Steps = Field(1, ge=1)
    lr_power: float = Field(1.0, gt=0, description="of the polynomial")
    use_8bit_adam: bool = False
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_weight_decay: float = Field(1e-2, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    mixed_precision: Precision = "no"
    allow_tf32: bool = False
    torch_compile: bool = Field(False, description="compile the networks' repeated blocks (torch.compile, regional)")
    channels_last: bool = Field(False, description="keep convolutions' tensors channels-last")
    use_ema: bool = False
    ema_decay: float = Field(0.9999, gt=0, lt=1)
    checkpointing_steps: Steps = Field(500, ge=1)
    checkpoints_total_limit: Steps | None = Field(2, ge=1)
    resume_from_checkpoint: str | None = Field(
        "latest", description="'latest', a checkpoint folder, or null to start afresh"
    )
    validation_steps: Steps = Field(500, ge=1)
    early_stopping_patience: Steps | None = Field(
        None, ge=1, description="stop after so many validations without a lower loss, and keep the best weights"
    )
    logging_steps: Steps = Field(10, ge=1)
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all"] | None = "tensorboard"
    tracker_project_name: str = Field("maskloom", pattern=NAME_PATTERN, max_length=MAX_NAME)
    dataloader_num_workers: Workers = Field(0, ge=0)

    @model_validator(mode="after")
    def _polynomial_falls(self) -> Self:
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(
                f"lr_scheduler=polynomial falls to {POLYNOMIAL_END:g}, and learning_rate={self.learning_rate:g} is not above it; "
                "raise learning_rate, or choose another lr_scheduler"
            )
        return self

    @property
    def section(self) -> str:
        """Where these values stand in the configuration, for messages."""
        return "train"

    @property
    def trains_all_weights(self) -> bool:
        """Whether every step gives every weight a gradient."""
        return True


class AugmentConfig(Section):
    """How an image, its mask and its conditioning image are changed alike while training.

    Words of the prompt that are read off the mask follow it (a lesion on the left is on the right after a flip). All other words stay as
    they are: where a report's words or a label tell left from right, set `random_flip=false`.
    """

    variants: Copies = Field(
        4, ge=1, description="changed copies of each row besides the row itself; all of them are cached"
    )
    random_flip: bool = Field(True, description="mirror left and right in half of the copies")
    rotation_degrees: float = Field(5.0, ge=0, le=180)
    scale: tuple[float, float] = (0.95, 1.05)
    translation: float = Field(0.03, ge=0, lt=0.5, description="share of the image's side")
    brightness: float = Field(0.05, ge=0, lt=1, description="largest shift, as a share of the grey range; image only")
    contrast: float = Field(0.1, ge=0, lt=1, description="largest relative change; image only")

    @model_validator(mode="after")
    def _scale_is_a_range(self) -> "AugmentConfig":
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: give the smallest and the largest factor, both above 0")
        return self


class AdherenceConfig(Section):
    """Mask adherence while training: a small U-Net, trained on real images, reads the mask off sampled images."""

    num_images: Rows = Field(16, ge=8, description="validation masks that images are sampled for; fewer tell nothing")
    num_inference_steps: Timesteps | None = Field(None, ge=1, description="null: as `generate` samples")
    guidance_scale: float | None = Field(
        None, ge=0, description="null: as `generate` samples; 1: without guidance, in half the time"
    )
    controlnet_conditioning_scale: float | None = Field(None, ge=0, description="null: as `generate` samples")
    image_size: Size = Field((128, 128), description="that the U-Net sees")
    steps: Steps = Field(300, ge=1, description="training steps of the U-Net")

    @model_validator(mode="after")
    def _size_suits_the_levels(self) -> "AdherenceConfig":
        if any(side < 16 or side % 8 for side in self.image_size):
            raise ValueError(f"image_size={list(self.image_size)}: both sides must be multiples of 8, and at least 16")
        return self


class DecoderConfig(Section):
    """Fine-tuning of the VAE's decoder before the ControlNet: structures come out truer than from a frozen VAE, texture smoother."""

    max_train_steps: Steps = Field(1000, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    train_batch_size: BatchSize = Field(4, ge=1)
    crop: Side = Field(
        256, ge=64, multiple_of=64, description="side of the training crops in pixels; a decoder is convolutional"
    )


MOST_PROMPT_CHUNKS = 8
"""600 tokens of Stable Diffusion; the cost of cross-attention grows with them."""
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
        description="read prompts beyond the text encoder's limit in this many pieces; null: what exceeds it is cut",
    )
    single_file_config: str | None = Field(
        None,
        description="for a backbone that is one .safetensors file: Hub id or folder of a pipeline whose settings and tokenizer it takes; "
        "null: the settings of Stable Diffusion 1.x or 2.x, and tokenizer_name",
    )
    controlnet_model_name_or_path: str | None = Field(
        None, description="weights to go on from; null: the UNet's encoder"
    )
    lora_model_name_or_path: str | None = Field(
        None, description="adapters to go on from, a folder or a .safetensors file; null: fresh ones"
    )
    max_train_samples: Rows | None = Field(None, ge=1, description="train on the first so many rows only")

    controlnet: Literal["full", "shallow", "zero_convs", "frozen", "none"] = Field(
        "full",
        description="which of the ControlNet's weights are trained; shallow: the first controlnet_blocks blocks, all zero "
        "convolutions and what embeds the inputs; zero_convs: these and the conditioning's embedding; none: there is no ControlNet",
    )
    controlnet_blocks: Layers = Field(2, ge=1, description="for controlnet=shallow")
    sd_locked: bool = Field(True, description="false: the UNet's decoder is trained as well")
    lora: list[LoraTarget] = Field(default_factory=list, description="which networks get adapters on their attention")
    rank: Rank = Field(4, ge=1, description="of the adapters")
    lora_alpha: float | None = Field(None, gt=0, description="null: the rank")
    vae_decoder: DecoderConfig | None = None

    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: the ControlNet's, or without one the UNet's"
    )
    unet_gradient_checkpointing: bool = Field(False, description="recompute the UNet's activations as well")
    enable_xformers_memory_efficient_attention: bool = False
    cache_latents: bool = True

    augment: AugmentConfig | None = None
    proportion_empty_prompts: float = Field(0.0, ge=0, le=1, description="1: trained on masks only")
    proportion_empty_conditioning: float = Field(0.0, ge=0, le=1, description="1: trained on prompts only")
    shuffle_conditioning: bool = Field(
        False,
        description="a control experiment: every row gets another row's conditioning image, so none can be followed",
    )
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weights")
    debiased_estimation_loss: bool = Field(False, description="weights 1/sqrt(SNR)")
    lesion_loss_weight: float = Field(1.0, ge=1, description="weight of the mask's foreground against the background")
    noise_offset: float = Field(0.0, ge=0)
    rescale_betas_zero_snr: bool = Field(False, description="zero terminal SNR; needs v_prediction")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="null: as the backbone says"
    )

    num_validation_images: Shown = Field(4, ge=0, description="rows of the validation split in each grid of pictures")
    validation_prompt: list[str] = Field(default_factory=list, description="further pictures: their prompts, …")
    validation_image: list[Path] = Field(
        default_factory=list, description="… and their conditioning images, one a prompt, at the dataset's image size"
    )
    validation_timestep_bins: Timesteps = Field(4, ge=1)
    validation_samples: Rows = Field(64, ge=1, description="validation rows that the held-out loss is taken over")
    adherence: AdherenceConfig | None = None

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
                f"lora=[controlnet] adapts weights that stay as they are; set controlnet=zero_convs (or frozen), not {self.controlnet}"
            )
        if self.controlnet == "frozen" and self.controlnet_model_name_or_path is None:
            raise ValueError("controlnet=frozen needs controlnet_model_name_or_path: a fresh one says nothing")
        if self.lora_model_name_or_path is not None and not adapted & {"unet", "text_encoder"}:
            raise ValueError(
                "lora_model_name_or_path needs lora=[unet], [text_encoder] or both: nothing else starts from it"
            )
        if "unet" in adapted and not self.sd_locked:
            raise ValueError("lora=[unet] with sd_locked=false trains the UNet twice over; choose one")
        return self

    @model_validator(mode="after")
    def _further_pictures_are_pairs(self) -> "TrainConfig":
        prompts, images = len(self.validation_prompt), len(self.validation_image)
        if images != (0 if self.controlnet == "none" else prompts):
            raise ValueError(
                f"{prompts} validation_prompt and {images} validation_image with controlnet={self.controlnet}: give one image a prompt, "
                "and none without a ControlNet"
            )
        return self

    @model_validator(mode="after")
    def _objective_is_one(self) -> "TrainConfig":
        if self.snr_gamma is not None and self.debiased_estimation_loss:
            raise ValueError("snr_gamma and debiased_estimation_loss are two weightings of the loss; choose one")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr leaves no signal at the last step, where the noise says nothing; set prediction_type=v_prediction"
            )
        return self
