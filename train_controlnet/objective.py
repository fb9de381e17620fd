"""The diffusion objective: noisy latents, target, and min-SNR weights."""

from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional

from pipeline.errors import MaskLoomError


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Return a fresh sample of the VAE's posterior.

    Args:
        moments: (B, 2C, h, w) mean and log-variance, as `AutoencoderKL.encode(...).latent_dist.parameters`.
        noise: (B, C, h, w) standard normal.
        scaling_factor: the VAE's, which makes latents about unit variance.

    Returns:
        (B, C, h, w) scaled latents.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # the clamp is DiagonalGaussianDistribution's
    return (mean + deviation * noise) * scaling_factor


def prediction_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict: the noise, or the velocity (Salimans & Ho, 2022), (B, C, h, w).

    Raises:
        MaskLoomError: the scheduler has another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise MaskLoomError(
        f"the backbone's prediction type {kind!r} is not supported; set train.prediction_type to epsilon or v_prediction"
    )


def denoising_loss(
    scheduler: Any, prediction: Tensor, target: Tensor, timesteps: Tensor, snr_gamma: float | None
) -> Tensor:
    """Return the loss of each sample, (B,), float32.

    Args:
        scheduler: holds the noise schedule and the prediction type.
        prediction: the UNet's output, (B, C, h, w).
        target: what it should have been, (B, C, h, w).
        timesteps: (B,) int64.
        snr_gamma: weight each sample by min(SNR, gamma)/SNR, or by min(SNR, gamma)/(SNR + 1) for velocities
            (Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023); None: no weights.
    """
    losses = functional.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return losses
    snr = compute_snr(scheduler, timesteps)
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    return losses * snr.clamp(max=snr_gamma) / divisor
