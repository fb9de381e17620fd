"""Base class and helpers of the Stable Diffusion generators: loading weights, batched sampling."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskloom.generate.generator import Condition, ImageGenerator, Options
from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder
from maskloom.models.stable_diffusion.sampling import (
    Pipeline,
    Sampling,
    check_sampling,
    prompt_embedding,
    sample,
)
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_pipeline import load_backbone, weights_digest
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Description

if TYPE_CHECKING:
    import torch


CACHED_PROMPTS = 512


def check_backbone(config: ExperimentConfig) -> None:
    """Check, before anything is computed, that the backbone can be sampled on this machine.

    Raises:
        MaskLoomError: names `train.pretrained_model_name_or_path` and the problem.
    """
    from maskloom.models.stable_diffusion import checks as backbone_checks

    backbone_checks.check_backbone(BackboneSource.of(config.fine_tuning))


class Sampler:
    """Samples batches from a pipeline, with one noise seed per image."""

    def __init__(
        self, pipe: Pipeline, how: Sampling, description: Description, prompt_chunks: int | None = None
    ) -> None:
        """Store the pipeline and the sampling settings.

        Args:
            pipe: from `load_backbone`.
            how: steps and guidance.
            description: provides the channels of the dataset.
            prompt_chunks: `train.prompt_chunks`.
        """
        self.pipe, self.how, self.description = pipe, how, description
        self.prompt_encoder = PromptEncoder.of(pipe.tokenizer, pipe.text_encoder.config, prompt_chunks)
        self.embedding = lru_cache(maxsize=CACHED_PROMPTS)(partial(prompt_embedding, pipe, self.prompt_encoder))

    def images(self, conditions: Sequence[Condition], conditioning: torch.Tensor | None = None) -> NDArray[np.float32]:
        """Return images, (B, H, W) or (B, H, W, 3) in 0..1, of the size of the conditioning images.

        The grey value of a one-channel dataset is the mean of the three channels.

        Args:
            conditions: prompts, seeds and conditioning images, all of one size.
            conditioning: the input of the ControlNet, from `control_tensor`; None without one.
        """
        import torch

        size = conditions[0].conditioning_image.shape[:2]
        noise = [torch.Generator("cpu").manual_seed(condition.seed) for condition in conditions]
        with torch.inference_mode():
            prompts = [self.embedding(condition.text) for condition in conditions]
            batch = sample(
                self.pipe, prompts, self.embedding(self.how.negative_prompt), conditioning, size, noise, self.how
            )
        pixels = batch.numpy()  # (B, 3, H, W)
        return pixels.mean(axis=1) if self.description.channels == 1 else np.moveaxis(pixels, 1, -1)


def control_tensor(conditions: Sequence[Condition], dtype: torch.dtype) -> torch.Tensor:
    """Return the conditioning images as (B, 3, H, W) in 0..1."""
    import torch

    stacked = np.stack([condition.conditioning_image for condition in conditions])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(dtype) / 255


class BackboneOptions(Options):
    """Options shared by the Stable Diffusion generators."""

    negative_prompt: str = ""


class BackboneGenerator(ImageGenerator):
    """Stable Diffusion with the trained weights in `parts`.

    Plug-ins differ in these weights and in the conditions that they pass on.
    """

    options: Any

    @property
    def parts(self) -> dict[str, Path]:
        """The trained weights to load, by name; from `trained_parts`."""
        return {}

    @property
    def training_stage(self) -> str | None:
        """The stage that trained the weights, `train`; None: the backbone as it is."""
        return "train" if self.parts else None

    def weights_digest(self) -> str:
        """Return a digest of the backbone and of the trained weights.

        Raises:
            MaskLoomError: a part has not been trained, or is not trained by this configuration.
        """
        return weights_digest(self.config, self.run, self.parts)

    def check_settings(self) -> None:
        """Check the backbone, and that the sampler supports its noise schedule."""
        trained = bool(self.parts)  # first: without a ControlNet the backbone does not matter
        check_backbone(self.config)
        source, steps = BackboneSource.of(self.config.fine_tuning), [self.config.generate.num_inference_steps]
        check_sampling(source.scheduler_settings(), self.config.generate, self.config.fine_tuning, trained, steps)

    def check(self) -> None:
        """See `check_settings`."""
        self.check_settings()

    def load(self, device: torch.device, description: Description) -> None:
        """Read the backbone and the trained weights.

        Raises:
            MaskLoomError: files are damaged.
        """
        pipe = load_backbone(self.config, device, self.parts, description.sizes)
        how = Sampling.of(self.config.generate, self.options.model_dump())
        self.sampler = Sampler(pipe, how, description, self.config.fine_tuning.prompt_chunks)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the prompts; masks are ignored."""
        return self.sampler.images(conditions)
