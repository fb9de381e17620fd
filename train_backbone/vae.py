"""Training of the VAE: reconstruction, perceptual distance, a little KL, and a patch discriminator.

The loss is that of the first stage of latent diffusion (Rombach et al., 2022; Esser et al., 2021).
L1 alone yields the mean of all speckle patterns, a grey blur. The perceptual term keeps edges, and
the discriminator, which joins late, makes texture realistic.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from maskloom.models.efficientnet_lite0 import load_efficientnet_lite0
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.task import Task
from maskloom.train_backbone.config import VaeConfig
from maskloom.train_backbone.images import TrainImages, random_crops

FEATURE_BLOCKS = (0, 2, 4, 5)  # after each: stride 2, 4, 8, 16


class Autoencoder(nn.Module):
    """Encoder and decoder in one forward pass, as data-parallel training needs."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return reconstructions (B, 3, H, W) and the posterior's moments (B, 8, H/8, W/8).

        Args:
            images: (B, 3, H, W) in [-1, 1].
            noise: (B, 4, H/8, W/8) standard normal, to sample latents from the posterior.
        """
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.parameters


class PerceptualDistance(nn.Module):
    """Distance between ImageNet features, after LPIPS (Zhang et al., 2018).

    The features are those of EfficientNet-Lite0, which needs no download and was trained on RGB in
    [-1, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = load_efficientnet_lite0().requires_grad_(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Return the mean squared distance of normalised features over five layers, a scalar."""
        with torch.no_grad():
            wanted = self._features(references)
        pairs = zip(self._features(images), wanted, strict=True)
        return torch.stack([(unit(found) - unit(sought)).pow(2).sum(dim=1).mean() for found, sought in pairs]).mean()

    def _features(self, images: Tensor) -> list[Tensor]:
        features = self.network.stem(images)
        layers = [features]
        for number, block in enumerate(self.network.blocks[: FEATURE_BLOCKS[-1] + 1]):
            features = block(features)
            if number in FEATURE_BLOCKS:
                layers.append(features)
        return layers


def unit(features: Tensor) -> Tensor:
    """Return (B, C, H, W) features scaled to length 1 over the channels, in float32."""
    features = features.float()
    return features / (features.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-3)


def new_discriminator() -> nn.Sequential:
    """Return a PatchGAN (Isola et al., 2017).

    It maps (B, 3, H, W) to scores (B, 1, about H/4, about W/4), high for real images.
    """

    def convolution(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, kernel_size=4, stride=stride, padding=1)

    return nn.Sequential(
        convolution(3, 32, 2), nn.LeakyReLU(0.2),
        convolution(32, 64, 2), nn.GroupNorm(8, 64), nn.LeakyReLU(0.2),
        convolution(64, 128, 1), nn.GroupNorm(8, 128), nn.LeakyReLU(0.2),
        convolution(128, 1, 1),
    )  # fmt: skip


class VaeTask(Task):
    """Trains the autoencoder and, from some point on, the discriminator, with an optimizer each."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        discriminator: nn.Module,
        images: TrainImages,
        config: VaeConfig,
        accelerator: Accelerator,
    ) -> None:
        """Store the networks, data and settings; the perceptual network is loaded from its package."""
        self.networks = {"vae": autoencoder, "discriminator": discriminator}
        self.dataset, self.config, self.accelerator = images, config, accelerator
        self.distance = PerceptualDistance().to(accelerator.device)

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the autoencoder's loss and, once it takes part, the discriminator's hinge loss."""
        images = random_crops(batch["image"], batch["may_flip"], draws, self.config)
        side = self.config.pixels // 8
        found, moments = self.networks["vae"](images, draws.normal("posterior", (4, side, side)))
        weight = self._adversarial_weight(draws.positions[0])
        with self.accelerator.autocast():
            distance = self.distance(found, images)
        reconstruction = functional.l1_loss(found.float(), images) + self.config.perceptual_weight * distance
        loss = reconstruction + self.config.kl_weight * kl_divergence(moments)
        if weight is not None:
            loss = loss - weight * self._frozen_score(found)
        yield "vae", loss
        if weight is not None:
            discriminate = self.networks["discriminator"]
            real, fake = discriminate(images).float(), discriminate(found.detach()).float()
            yield "discriminator", functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()

    def row_name(self, index: int) -> str:
        """Return the sample id of a training row."""
        return self.dataset.name(index)  # type: ignore[attr-defined]

    def _adversarial_weight(self, samples: int) -> float | None:
        """Return the weight of the adversarial loss after `samples`, or None before it starts."""
        start = self.config.adversarial_start
        if start is None or samples < start:
            return None
        return self.config.adversarial_weight * min(1.0, (samples - start) / self.config.adversarial_ramp)

    def _frozen_score(self, found: Tensor) -> Tensor:
        """Return the mean score of reconstructions, with a gradient for the autoencoder only."""
        network = self.accelerator.unwrap_model(self.networks["discriminator"])
        network.requires_grad_(False)
        try:
            with self.accelerator.autocast():
                return network(found).float().mean()
        finally:
            network.requires_grad_(True)


def kl_divergence(moments: Tensor) -> Tensor:
    """Return the mean KL divergence of posteriors from N(0, 1), in nats per latent element.

    Args:
        moments: (B, 2C, h, w) mean and log-variance of the posteriors.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance).mean()


def latent_statistics(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (C,) each, of latents sampled from posteriors.

    Args:
        moments: (N, 2C, h, w) mean and log-variance of the posteriors.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    variance = mean.var(dim=(0, 2, 3)) + log_variance.exp().mean(dim=(0, 2, 3))
    return mean.mean(dim=(0, 2, 3)), variance.sqrt()


def normalised_moments(moments: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """Return the moments, (N, 2C, h, w), of (latents - centre) / spread.

    Args:
        moments: (N, 2C, h, w) mean and log-variance of the latents.
        centre: (C,) to subtract.
        spread: (C,) to divide by.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    shape = (1, -1, 1, 1)
    return torch.cat([(mean - centre.view(shape)) / spread.view(shape), log_variance - 2 * spread.log().view(shape)], 1)


@torch.no_grad()
def normalise_vae(vae: AutoencoderKL, centre: Tensor, spread: Tensor) -> None:
    """Change the VAE in place so that its latents have mean 0 and variance 1 per channel.

    Stable Diffusion multiplies latents by one `scaling_factor`, which leaves channels with
    different means and variances. The layers next to the latents are 1x1 convolutions, so the
    normalisation can be merged into their weights without changing any reconstruction; the scaling
    factor is then 1.

    Args:
        vae: has `quant_conv` and `post_quant_conv`.
        centre: (C,) mean of its latents.
        spread: (C,) standard deviation of its latents.
    """
    into, out, channels = vae.quant_conv, vae.post_quant_conv, len(centre)
    out.bias += out.weight[:, :, 0, 0] @ centre
    out.weight *= spread[None, :, None, None]
    into.weight[:channels] /= spread[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - centre) / spread
    into.bias[channels:] -= 2 * spread.log()
