"""Sampling from a Stable Diffusion pipeline, for `generate`, validation and mask adherence alike.

Imports torch and diffusers only where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder, text_states
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.generate import GenerateConfig, SchedulerName
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError, excerpt

if TYPE_CHECKING:
    import torch

# StableDiffusionPipeline or StableDiffusionControlNetPipeline: diffusers imports both lazily, so
# type checkers do not see them.
Pipeline = Any
SLICED_DECODING_PIXELS = 512 * 512  # from this size on the VAE decodes image by image, to save memory
GENERATORS = "generate.generators"


class CallOptions(Section):
    """Options of a generator that are passed to the pipeline; names as in diffusers."""

    negative_prompt: str = ""
    control_guidance_start: float = Field(0.0, ge=0, lt=1)
    control_guidance_end: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _guidance_is_a_range(self) -> Self:
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError(
                f"control_guidance_start={self.control_guidance_start:g} must lie below "
                f"control_guidance_end={self.control_guidance_end:g}"
            )
        return self


@dataclass(frozen=True)
class Sampling:
    """The arguments of a pipeline call.

    Attributes:
        num_inference_steps: number of steps of the scheduler.
        guidance_scale: scale of classifier-free guidance; at most 1: no guidance, in half the time.
        controlnet_conditioning_scale: factor of the ControlNet's residuals.
        negative_prompt: the prompt of the unconditional half of guidance.
        control_guidance_start, control_guidance_end: the ControlNet acts between these fractions of
            the steps.
    """

    num_inference_steps: int
    guidance_scale: float
    controlnet_conditioning_scale: float
    negative_prompt: str = ""
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0

    @classmethod
    def of(cls, config: GenerateConfig, options: Mapping[str, Any] | None = None, where: str = GENERATORS) -> Sampling:
        """Return the sampling settings of the stage `generate`.

        Args:
            config: the section `generate`.
            options: options of one generator; only those in `CallOptions` are used.
            where: the configuration key of the options, for messages.

        Raises:
            MaskLoomError: one of these options is invalid.
        """
        own = {key: value for key, value in (options or {}).items() if key in CallOptions.model_fields}
        called = validated(own, CallOptions, where).model_dump()
        return cls(config.num_inference_steps, config.guidance_scale, config.controlnet_conditioning_scale, **called)

    @classmethod
    def of_training(cls, config: GenerateConfig, train: TrainConfig) -> Sampling:
        """Return the sampling settings of the stage `generate` for the networks being trained.

        Raises:
            MaskLoomError: see `of`.
        """
        name = "lora" if train.controlnet == "none" else "controlnet"
        return cls.of(config, config.generators.get(name), f"{GENERATORS}.{name}")

    def but(self, **overrides: Any) -> Sampling:
        """Return a copy with new values; those that are None are not changed."""
        return replace(self, **{key: value for key, value in overrides.items() if value is not None})


def sampling_scheduler(settings: Mapping[str, Any], generate: GenerateConfig, train: TrainConfig, trained: bool) -> Any:
    """Return the scheduler of `generate.scheduler` with the noise schedule of the training.

    Args:
        settings: settings of the backbone's scheduler, from `scheduler_config.json`.
        generate: names the scheduler.
        train: names the changes of the training to the noise schedule.
        trained: whether trained weights are used. Without them the backbone's own schedule applies,
            except for a prediction type that was set although the UNet was frozen: it can only
            correct the backbone's settings.
    """
    kind, own = scheduler_class_and_settings(generate.scheduler)
    if train.prediction_type is not None and (trained or unet_is_frozen(train)):
        own["prediction_type"] = train.prediction_type
    if trained and train.rescale_betas_zero_snr:  # as in training, sampling must start where no signal is left
        own |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    try:
        return kind.from_config(settings, **own)
    except Exception as error:  # a wrong setting raises errors of many kinds; the remedy is the same
        raise unusable_scheduler(generate, train, error) from error


def check_sampling(
    settings: Mapping[str, Any], generate: GenerateConfig, train: TrainConfig, trained: bool, steps: Iterable[int]
) -> None:
    """Run the scheduler on a latent of one position, so that it does not fail after the training.

    Args:
        settings: see `sampling_scheduler`.
        generate: see `sampling_scheduler`.
        train: see `sampling_scheduler`.
        trained: see `sampling_scheduler`.
        steps: each number of inference steps that will be used.

    Raises:
        MaskLoomError: there are more steps than in the noise schedule, or the scheduler fails with
            the backbone's settings.
    """
    import torch

    for number in dict.fromkeys(steps):
        scheduler = sampling_scheduler(settings, generate, train, trained)
        if number > scheduler.config.num_train_timesteps:
            raise MaskLoomError(
                f"generate.num_inference_steps={number}: the backbone's noise schedule has "
                f"{scheduler.config.num_train_timesteps} steps; give at most this number"
            )
        latent = torch.ones(1, 4, 1, 1)
        try:
            scheduler.set_timesteps(number)
            if not all(0 <= timestep < scheduler.config.num_train_timesteps for timestep in scheduler.timesteps):
                raise ValueError("timesteps outside the noise schedule")
            for timestep in scheduler.timesteps:
                latent = scheduler.step(latent * 0.1, timestep, latent).prev_sample
        except Exception as error:  # see `sampling_scheduler`
            raise unusable_scheduler(generate, train, error) from error
        if not latent.isfinite().all():
            raise unusable_scheduler(generate, train, ValueError(f"{number} steps lead to values that are not finite"))


def unusable_scheduler(generate: GenerateConfig, train: TrainConfig, error: Exception) -> MaskLoomError:
    """Return the error for a scheduler that fails with the backbone's settings."""
    return MaskLoomError(
        f"generate.scheduler={generate.scheduler}: cannot sample with scheduler/scheduler_config.json of "
        f"{train.pretrained_model_name_or_path} ({type(error).__name__}: {excerpt(error)}); "
        "choose another scheduler or number of steps, or download the backbone again"
    )


def scheduler_class_and_settings(name: SchedulerName) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' class of a scheduler, and its settings besides the noise schedule.

    None of them draws noise of its own, so that the seed of an image decides all of its noise.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kinds: dict[SchedulerName, tuple[Any, dict[str, Any]]] = {
        "unipc": (UniPCMultistepScheduler, {}),
        "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "ddim": (DDIMScheduler, {}),
    }
    return kinds[name]


def unet_is_frozen(train: TrainConfig) -> bool:
    """Return whether training does not change the UNet."""
    return train.sd_locked and "unet" not in train.lora


def build_pipeline(
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    unet: Any,
    scheduler: Any,
    controlnet: Any | None,
    sizes: Sequence[tuple[int, int]],
) -> Pipeline:
    """Return diffusers' pipeline without a safety checker, as there is none for medical images.

    Args:
        vae: the VAE.
        text_encoder: the text encoder.
        tokenizer: the tokenizer of the text encoder.
        unet: the UNet.
        scheduler: from `sampling_scheduler`.
        controlnet: the ControlNet; None: no ControlNet.
        sizes: (height, width) of the images to sample, in pixels.
    """
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

    kind = StableDiffusionPipeline if controlnet is None else StableDiffusionControlNetPipeline
    pipe = kind(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **({} if controlnet is None else {"controlnet": controlnet}),
    )
    pipe.set_progress_bar_config(disable=True)
    if max(height * width for height, width in sizes) >= SLICED_DECODING_PIXELS:
        vae.enable_slicing()
    return pipe


def sample(
    pipe: Pipeline,
    embeddings: Sequence[torch.Tensor],
    unconditional: torch.Tensor,
    conditioning: torch.Tensor | None,
    size: tuple[int, int],
    noise: Sequence[torch.Generator],
    how: Sampling,
) -> torch.Tensor:
    """Return a batch of images, (B, 3, H, W) float32 in 0..1, on the CPU.

    Args:
        pipe: from `build_pipeline`.
        embeddings: embeddings of the prompts from `prompt_embedding`, each (1, tokens, width).
        unconditional: the embedding of the negative prompt, (1, tokens, width).
        conditioning: (B, 3, H, W) in 0..1 for a ControlNet; None without one.
        size: (height, width) in pixels.
        noise: one random generator per image, on the CPU, so that a seed gives the same noise on
            every device.
        how: steps and guidance.
    """
    import torch

    control: dict[str, Any] = {}
    if conditioning is not None:
        control = {
            "image": conditioning,
            "controlnet_conditioning_scale": how.controlnet_conditioning_scale,
            "control_guidance_start": how.control_guidance_start,
            "control_guidance_end": how.control_guidance_end,
        }
    batch = pipe(
        prompt_embeds=torch.cat(list(embeddings)),
        negative_prompt_embeds=torch.cat([unconditional] * len(embeddings)),
        height=size[0],
        width=size[1],
        num_inference_steps=how.num_inference_steps,
        guidance_scale=how.guidance_scale,
        generator=list(noise),
        output_type="pt",
        **control,
    ).images
    return batch.float().cpu()


def prompt_embedding(pipe: Pipeline, encoder: PromptEncoder, text: str) -> torch.Tensor:
    """Return the text encoder's states of one prompt, (1, tokens, width), as in training.

    Prompts are encoded one at a time, so an embedding does not depend on the others in its batch.
    """
    return text_states(pipe.text_encoder, encoder.tokens([text]).to(pipe.device))
