"""How images are sampled from a Stable Diffusion pipeline: the stage `generate`, validation samples and mask adherence all sample so.

Imports torch and diffusers only where they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder, text_states
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.generate import GenerateConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError, excerpt

if TYPE_CHECKING:
    import torch

# StableDiffusionPipeline or its ControlNet sibling; diffusers builds both lazily, hidden from type checkers.
Pipeline = Any
SLICED_DECODING_PIXELS = 512 * 512  # from here on the VAE decodes image by image: a batch's activations would not fit
GENERATORS = "generate.generators"


class CallOptions(Section):
    """Options of a generator that change how the pipeline is called; shares of the steps as in diffusers' ControlNet pipeline."""

    negative_prompt: str = ""
    control_guidance_start: float = Field(0.0, ge=0, lt=1)
    control_guidance_end: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _guidance_is_a_range(self) -> Self:
        if self.control_guidance_start >= self.control_guidance_end:
            raise ValueError(
                f"control_guidance_start={self.control_guidance_start:g} must lie below control_guidance_end={self.control_guidance_end:g}"
            )
        return self


@dataclass(frozen=True)
class Sampling:
    """How a pipeline is called.

    Attributes:
        num_inference_steps: of the scheduler.
        guidance_scale: of the prompt; up to 1 there is none, and sampling takes half the time.
        controlnet_conditioning_scale: of the conditioning image.
        negative_prompt: what the unconditional half of guidance sees.
        control_guidance_start, control_guidance_end: shares of the steps between which the ControlNet acts.
    """

    num_inference_steps: int
    guidance_scale: float
    controlnet_conditioning_scale: float
    negative_prompt: str = ""
    control_guidance_start: float = 0.0
    control_guidance_end: float = 1.0

    @classmethod
    def of(cls, config: GenerateConfig, options: Mapping[str, Any] | None = None, where: str = GENERATORS) -> Sampling:
        """Return what the stage `generate` is configured to do.

        Args:
            config: its section.
            options: of one generator; of these, only those count that change how the pipeline is called.
            where: the options' key, for messages.

        Raises:
            MaskLoomError: one of these options does not fit.
        """
        own = {key: value for key, value in (options or {}).items() if key in CallOptions.model_fields}
        called = validated(own, CallOptions, where).model_dump()
        return cls(config.num_inference_steps, config.guidance_scale, config.controlnet_conditioning_scale, **called)

    @classmethod
    def of_training(cls, config: GenerateConfig, train: TrainConfig) -> Sampling:
        """Return how the stage `generate` will sample from what is trained.

        Raises:
            MaskLoomError: see `of`.
        """
        name = "lora" if train.controlnet == "none" else "controlnet"
        return cls.of(config, config.generators.get(name), f"{GENERATORS}.{name}")

    def but(self, **overrides: Any) -> Sampling:
        """Return it with those of the values that are not None."""
        return replace(self, **{key: value for key, value in overrides.items() if value is not None})


def sampling_scheduler(settings: Mapping[str, Any], generate: GenerateConfig, train: TrainConfig, trained: bool) -> Any:
    """Return the scheduler of `generate.scheduler` with the noise schedule that the networks were trained on.

    Args:
        settings: of the backbone's scheduler, as its `scheduler_config.json` has them.
        generate: names the scheduler.
        train: says how training changed the backbone's schedule.
        trained: whether trained weights take part. Without them the backbone's own schedule holds, but for a prediction type that
            was set while the UNet stayed frozen: it can only correct what the backbone says.
    """
    kind, own = solver(generate)
    if train.prediction_type is not None and (trained or unet_is_frozen(train)):
        own["prediction_type"] = train.prediction_type
    if trained and train.rescale_betas_zero_snr:  # sampling must start where no signal is left, as training did
        own |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    try:
        return kind.from_config(settings, **own)
    except Exception as error:  # whatever diffusers makes of a wrong setting, the remedy is the same
        raise _unusable(generate, train, error) from error


def check_sampling(
    settings: Mapping[str, Any], generate: GenerateConfig, train: TrainConfig, trained: bool, steps: Iterable[int]
) -> None:
    """Walk through the steps of the scheduler with a latent of one cell, before hours are spent on what could not be sampled in the end.

    Args:
        settings: see `sampling_scheduler`.
        generate: likewise.
        train: likewise.
        trained: likewise.
        steps: numbers of steps that images will be sampled in.

    Raises:
        MaskLoomError: more steps than the noise schedule has, or the scheduler fails with the backbone's settings.
    """
    import torch

    for number in dict.fromkeys(steps):
        scheduler = sampling_scheduler(settings, generate, train, trained)
        if number > scheduler.config.num_train_timesteps:
            raise MaskLoomError(
                f"generate.num_inference_steps={number}: the backbone's noise schedule has {scheduler.config.num_train_timesteps} steps; give at most so many"
            )
        latent = torch.ones(1, 4, 1, 1)
        try:
            scheduler.set_timesteps(number)
            if not all(0 <= timestep < scheduler.config.num_train_timesteps for timestep in scheduler.timesteps):
                raise ValueError("timesteps that the noise schedule has not")
            for timestep in scheduler.timesteps:
                latent = scheduler.step(latent * 0.1, timestep, latent).prev_sample
        except Exception as error:  # see `sampling_scheduler`
            raise _unusable(generate, train, error) from error
        if not latent.isfinite().all():
            raise _unusable(generate, train, ValueError(f"{number} steps lead to values that are not finite"))


def _unusable(generate: GenerateConfig, train: TrainConfig, error: Exception) -> MaskLoomError:
    return MaskLoomError(
        f"generate.scheduler={generate.scheduler}: cannot sample with scheduler/scheduler_config.json of {train.pretrained_model_name_or_path} "
        f"({type(error).__name__}: {excerpt(error)}); choose another scheduler or number of steps, or download the backbone again"
    )


def solver(config: GenerateConfig) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' class for `generate.scheduler`, and the settings that it needs besides those of a noise schedule."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "unipc": (UniPCMultistepScheduler, {}),
        "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "ddim": (DDIMScheduler, {}),
    }
    return kinds[config.scheduler]


def unet_is_frozen(train: TrainConfig) -> bool:
    """Return whether training leaves the UNet as the backbone has it."""
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
    """Return diffusers' pipeline of these parts, without a safety checker: there is none for medical images.

    Args:
        vae: decodes the latents.
        text_encoder: reads the prompts.
        tokenizer: of the text encoder.
        unet: denoises.
        scheduler: from `sampling_scheduler`.
        controlnet: None where there is none.
        sizes: (height, width) of the images that will be asked for.
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
        embeddings: of the prompts, (1, tokens, width) each, from `prompt_embedding`.
        unconditional: the embedding of the negative prompt.
        conditioning: (B, 3, H, W) in 0..1 for a ControlNet; None without one.
        size: (height, width).
        noise: one generator per image, on the CPU: the same seed then gives the same image on every device.
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
    """Return the text encoder's states of one prompt, (1, tokens, width), read as in training.

    One prompt at a time, so that an embedding does not depend on which other prompts share its batch.
    """
    return text_states(pipe.text_encoder, encoder.tokens([text]).to(pipe.device))
