"""What the Stable Diffusion generators share: reading a backbone, and sampling from it in batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from generate.generator import Condition
from pipeline.config import ExperimentConfig, GenerateConfig
from pipeline.contract import Description
from pipeline.files import model_digest

if TYPE_CHECKING:
    import torch

# StableDiffusionPipeline or its ControlNet sibling; diffusers builds both lazily, hidden from type checkers.
Pipeline = Any
CACHED_PROMPTS = 512
SLICED_DECODING_PIXELS = 512 * 512  # from here on the VAE decodes image by image: a batch's activations would not fit


def backbone_digest(config: ExperimentConfig) -> str:
    """Return the identity of the backbone."""
    return model_digest(config.train.pretrained_model_name_or_path, config.train.revision)


def check_backbone_folder(config: ExperimentConfig) -> None:
    """Tell a mistyped folder before anything is computed.

    Raises:
        MaskLoomError: names `train.pretrained_model_name_or_path`.
    """
    from pipeline.backbone import check_backbone

    check_backbone(config.train.pretrained_model_name_or_path)


def load_backbone(config: ExperimentConfig, device: torch.device, **parts: Any) -> Pipeline:
    """Return a Stable Diffusion pipeline ready to sample; a ControlNet pipeline where `parts` holds a `controlnet`.

    Raises:
        MaskLoomError: the backbone cannot be read, or xFormers is asked for and missing.
    """
    import torch
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

    from pipeline.backbone import load_part, use_xformers
    from pipeline.cpu_memory import keep_freed_memory

    pipe = load_part(
        StableDiffusionControlNetPipeline if "controlnet" in parts else StableDiffusionPipeline,
        config.train.pretrained_model_name_or_path,
        revision=config.train.revision,
        variant=config.train.variant,
        torch_dtype=weight_dtype(config.generate),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    pipe.scheduler = fast_scheduler(pipe.scheduler.config, config)
    pipe.set_progress_bar_config(disable=True)
    if config.generate.enable_xformers_memory_efficient_attention:
        use_xformers(pipe)
    torch.backends.cudnn.deterministic = True
    if device.type == "cpu":
        keep_freed_memory()
    return pipe.to(device)


def weight_dtype(config: GenerateConfig) -> torch.dtype:
    """Return the type of weights and activations for `generate.mixed_precision`."""
    from pipeline.backbone import DTYPES

    return DTYPES[config.mixed_precision]


def fast_scheduler(backbone: Any, config: ExperimentConfig) -> Any:
    """Return the configured scheduler with the noise schedule of the backbone's own.

    Args:
        backbone: the configuration of the backbone's scheduler.
        config: names the scheduler and, where set, corrects the backbone's prediction type.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "unipc": (UniPCMultistepScheduler, {}),
        "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "ddim": (DDIMScheduler, {}),
    }
    kind, settings = kinds[config.generate.scheduler]
    if config.train.prediction_type is not None:
        settings["prediction_type"] = config.train.prediction_type
    return kind.from_config(backbone, **settings)


class Sampler:
    """Samples batches from a pipeline, with a noise seed for every image."""

    def __init__(self, pipe: Pipeline, config: GenerateConfig, description: Description, negative_prompt: str) -> None:
        """Keep the pipeline.

        Args:
            pipe: from `load_backbone`.
            config: steps and guidance.
            description: image size and channels of the dataset.
            negative_prompt: what unconditional guidance sees.
        """
        self.pipe, self.config, self.description, self.negative_prompt = pipe, config, description, negative_prompt
        # One prompt at a time, so that an embedding does not depend on which other prompts share its batch.
        self.embedding = lru_cache(maxsize=CACHED_PROMPTS)(self._embedding)
        if np.prod(description.image_size) >= SLICED_DECODING_PIXELS:
            pipe.vae.enable_slicing()

    def images(self, conditions: Sequence[Condition], **control: Any) -> NDArray[np.float32]:
        """Return images, (B, H, W) or (B, H, W, 3), in 0..1.

        Args:
            conditions: prompts and seeds.
            control: further arguments of the pipeline's call.
        """
        import torch

        height, width = self.description.image_size
        # Noise is drawn on the CPU: the same seed then gives the same picture on every device.
        noise = [torch.Generator("cpu").manual_seed(condition.seed) for condition in conditions]
        with torch.inference_mode():
            batch = self.pipe(
                prompt_embeds=torch.cat([self.embedding(condition.text) for condition in conditions]),
                negative_prompt_embeds=torch.cat([self.embedding(self.negative_prompt)] * len(conditions)),
                height=height,
                width=width,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=self.config.guidance_scale,
                generator=noise,
                output_type="pt",
                **control,
            ).images
        return self._in_dataset_channels(batch.float().cpu().numpy())

    def _embedding(self, text: str) -> torch.Tensor:
        """Return the text encoder's states of one prompt, (1, tokens, width)."""
        return self.pipe.encode_prompt(text, self.pipe.device, 1, do_classifier_free_guidance=False)[0]

    def _in_dataset_channels(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (B, 3, H, W) as (B, H, W, 3), or as (B, H, W) by the mean of the channels for grey datasets."""
        return batch.mean(axis=1) if self.description.channels == 1 else np.moveaxis(batch, 1, -1)


def control_tensor(conditions: Sequence[Condition], dtype: torch.dtype) -> torch.Tensor:
    """Return the conditioning images as (B, 3, H, W) in 0..1."""
    import torch

    stacked = np.stack([condition.conditioning_image for condition in conditions])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(dtype) / 255
