"""Training of UNet and text encoder together, from scratch, on cached moments of the VAE."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from maskloom.models.stable_diffusion.objective import (
    denoising_losses,
    prediction_target,
    sample_latents,
    timestep_weights,
)
from maskloom.pipeline.progress import progress
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.task import Task
from maskloom.train_backbone.config import DenoiserConfig
from maskloom.train_backbone.images import TrainImages
from maskloom.train_backbone.vae import normalised_moments

ENCODE_BATCH = 16


class LatentRows(Dataset[dict[str, Any]]):
    """Augmented copies of the training images as moments of the VAE, with their prompts.

    They are kept in memory, 8 KiB per row.
    """

    def __init__(self, images: TrainImages, size: int, seed: int) -> None:
        """Store the images and settings; `encode` computes moments and prompts.

        Args:
            images: the training images.
            size: side of the encoded images in pixels.
            seed: seed of the augmentation.
        """
        self.images, self.size, self.seed = images, size, seed
        self.moments = torch.empty(0)
        self.texts: list[str] = []

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL, device: torch.device, show: bool) -> None:
        """Encode every copy; the same weights give the same moments.

        Args:
            vae: moved to the device.
            device: where it encodes.
            show: whether to show a progress bar.
        """
        vae.to(device).eval()
        moments: list[Tensor] = []
        self.texts = []
        with progress("encoding", len(self.images), "images", show=show) as advance:
            for start in range(0, len(self.images), ENCODE_BATCH):
                indices = range(start, min(start + ENCODE_BATCH, len(self.images)))
                pixels, texts = zip(*(self.images.copy(i, self.size, self.seed) for i in indices), strict=True)
                moments.append(vae.encode(torch.stack(pixels).to(device)).latent_dist.parameters.cpu())
                self.texts.extend(texts)
                advance(len(indices))
        self.moments = torch.cat(moments)

    def normalise(self, centre: Tensor, spread: Tensor) -> None:
        """Convert the moments to those of the normalised VAE; see `normalise_vae`."""
        self.moments = normalised_moments(self.moments, centre, spread)

    def tokenise(self, tokenizer: CLIPTokenizer) -> None:
        """Tokenize the prompts."""
        self.tokens = token_ids(tokenizer, self.texts)

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"moments": self.moments[index], "tokens": self.tokens[index]}


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return token ids (N, model_max_length) int64, padded and truncated as in diffusers."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


class DenoiserTask(Task):
    """Trains UNet and text encoder with the diffusion objective and one optimizer."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDPMScheduler,
        rows: LatentRows,
        config: DenoiserConfig,
    ) -> None:
        """Store the networks, data and settings. The VAE's scaling factor is 1: see `normalise_vae`."""
        self.networks = {"unet": unet, "text_encoder": text_encoder}
        self.dataset, self.scheduler, self.config = rows, scheduler, config
        self.empty_prompt = token_ids(tokenizer, [""])

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters of both networks as one group."""
        return {"denoiser": [p for network in self.networks.values() for p in network.parameters() if p.requires_grad]}

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the weighted denoising loss."""
        moments, tokens = batch["moments"], batch["tokens"]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        latents = sample_latents(moments, draws.normal("posterior", shape), scaling_factor=1.0)
        noise = draws.normal("noise", shape)
        timesteps = draws.integers("timestep", self.scheduler.config.num_train_timesteps)
        dropped = draws.uniform("empty prompt") < self.config.proportion_empty_prompts
        tokens = torch.where(dropped[:, None], self.empty_prompt.to(tokens), tokens)
        text = self.networks["text_encoder"](tokens)[0]
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.networks["unet"](noisy, timesteps, text).sample
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        weights = timestep_weights(self.scheduler, timesteps, self.config.snr_gamma, debiased=False)
        yield "denoiser", (denoising_losses(prediction, target) * weights).mean()

    def row_name(self, index: int) -> str:
        """Return the sample id of a training row."""
        return self.dataset.images.name(index)  # type: ignore[attr-defined]
