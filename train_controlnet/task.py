"""Training of a ControlNet, adapters, or both, as a task of the shared loop."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from maskloom.models.stable_diffusion.objective import (
    denoising_losses,
    lesion_weights,
    prediction_target,
    sample_latents,
    timestep_weights,
)
from maskloom.models.stable_diffusion.prompt_encoding import text_states
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.training.precision import DTYPES
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.task import Task
from maskloom.train_controlnet.data.training_data import TrainingData
from maskloom.train_controlnet.data.views import size_buckets
from maskloom.train_controlnet.networks import Networks

OPTIMIZER = "denoiser"


class TaskValidator(Protocol):
    """Validates the networks between training steps; `validation.validator` implements it."""

    def metrics(self, step: int) -> dict[str, float]:
        """Return held-out metrics by name after `step` optimizer steps."""


class DiffusionTask(Task):
    """The networks and their denoising loss.

    Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models (2023); Hu et al.,
    LoRA: Low-Rank Adaptation of Large Language Models (2021).

    Attributes:
        validator: set after the task is built, because it computes losses with the task; None: no
            validation.
    """

    validator: TaskValidator | None = None

    def __init__(self, config: TrainConfig, parts: Networks, data: TrainingData, device: torch.device) -> None:
        """Store the networks, data and settings.

        Args:
            config: the section `train`.
            parts: the networks.
            data: rows and prompts. Without rows, as in the memory plan, losses can be computed, but
                the loop has nothing to iterate over.
            device: the device of the training.
        """
        self.config, self.device, self.dtype = config, device, DTYPES[config.mixed_precision]
        self.parts, self.scheduler, self.networks = parts, parts.scheduler, parts.trained()
        self.rows, self.text, self.prompt_encoder = data.rows, data.text, data.prompt_encoder
        if "train" in data.rows:
            self.dataset, self.buckets = data.rows["train"], size_buckets(data.rows["train"].views)
        self.trained_parameters = sum(p.numel() for p in self.parameters()[OPTIMIZER])

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return all trained weights as the parameters of one optimizer."""
        return {OPTIMIZER: [p for net in self.networks.values() for p in net.parameters() if p.requires_grad]}

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the weighted denoising loss; see `Task.losses`."""
        latents = self.latents(batch, draws)
        noise = self._noise(latents, draws)
        timesteps = draws.integers("timestep", self.scheduler.config.num_train_timesteps)
        prompts, conditioning = self.drop_conditions(batch, draws)
        losses = self.sample_losses(latents, noise, timesteps, prompts, conditioning, batch.get("foreground"))
        weights = timestep_weights(
            self.scheduler, timesteps, self.config.snr_gamma, self.config.debiased_estimation_loss
        )
        yield OPTIMIZER, (losses * weights).mean()

    def drop_conditions(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Return prompt numbers (B,) and conditioning images (B, 3, H, W) after condition dropout.

        Some prompts become the empty prompt (number 0) and, independently, some conditioning images
        become black.
        """
        without_prompt = draws.uniform("empty prompt") < self.config.proportion_empty_prompts
        prompts = batch["prompt"].masked_fill(without_prompt, 0)
        conditioning = batch.get("conditioning")
        if conditioning is not None and self.config.proportion_empty_conditioning:
            without_mask = draws.uniform("empty conditioning") < self.config.proportion_empty_conditioning
            conditioning = conditioning * ~without_mask[:, None, None, None]
        return prompts, conditioning

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """Return latents (B, C, h, w) float32, newly sampled from the posterior of each image."""
        moments = batch["moments"] if "moments" in batch else self.parts.moments(batch["pixels"])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        return sample_latents(moments.float(), draws.normal("posterior", shape), self.parts.vae.config.scaling_factor)

    def sample_losses(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        prompts: Tensor,
        conditioning: Tensor | None,
        foreground: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each sample, (B,), without the weight of its timestep.

        Args:
            latents: (B, C, h, w) float32.
            noise: (B, C, h, w) float32 standard normal.
            timesteps: (B,) int64.
            prompts: (B,) prompt numbers; 0 is the empty prompt.
            conditioning: (B, 3, H, W) uint8; None without a ControlNet.
            foreground: (B, H, W), 0 or 1, to weigh the masks' foreground; None: no weights.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.prediction(noisy, timesteps, prompts, conditioning)
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        weights = None
        if foreground is not None:
            size = (latents.shape[2], latents.shape[3])
            weights = lesion_weights(foreground, self.config.lesion_loss_weight, size)
        return denoising_losses(prediction, target, weights)

    def prediction(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, conditioning: Tensor | None) -> Tensor:
        """Return the UNet's output, (B, C, h, w), with the residuals of the ControlNet, if any.

        Args:
            noisy: noisy latents (B, C, h, w).
            timesteps: (B,) int64.
            prompts: (B,) prompt numbers.
            conditioning: (B, 3, H, W) uint8; None without a ControlNet.
        """
        noisy, text = noisy.to(self.dtype), self.prompt_states(prompts)
        residuals: dict[str, Any] = {}
        if self.parts.controlnet is not None:
            assert conditioning is not None
            down, mid = self._network("controlnet")(
                noisy,
                timesteps,
                encoder_hidden_states=text,
                controlnet_cond=conditioning.to(self.dtype) / 255,
                return_dict=False,
            )
            residuals = {
                "down_block_additional_residuals": [residual.to(self.dtype) for residual in down],
                "mid_block_additional_residual": mid.to(self.dtype),
            }
        return self._network("unet")(noisy, timesteps, encoder_hidden_states=text, return_dict=False, **residuals)[0]

    def prompt_states(self, prompts: Tensor) -> Tensor:
        """Return the text encoder's states, (B, L, D), of prompt numbers (B,).

        They are looked up, or computed if the text encoder is trained.
        """
        if "text_encoder" in self.networks:
            return text_states(self.networks["text_encoder"], self.text[prompts]).to(self.dtype)
        return self.text[prompts]

    def validate(self, step: int) -> dict[str, float]:
        """Return the validator's figures; empty without a validator."""
        return {} if self.validator is None else self.validator.metrics(step)

    def row_name(self, index: int) -> str:
        """Return the sample id of a training row."""
        return self.rows["train"].views.sample_id(index)

    def _network(self, name: str) -> Any:
        """Return a network: if it is trained, as the accelerator prepared it."""
        return self.networks[name] if name in self.networks else getattr(self.parts, name)

    def _noise(self, latents: Tensor, draws: Draws) -> Tensor:
        """Return noise (B, C, h, w), with `noise_offset` plus a constant per channel.

        Guttenberg, Diffusion with Offset Noise (2023).
        """
        noise = draws.normal("noise", latents.shape[1:])
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * draws.normal("noise offset", (latents.shape[1], 1, 1))
        return noise
