"""The diffusion objective: latents, target, and the weights of timesteps and latent positions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from maskloom.pipeline.errors import MaskLoomError

MAX_SNR = 1000.0  # for debiased weights, as in sd-scripts: weights of the first timesteps would vanish


def sample_latents(moments: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """Return a sample from the VAE's posterior.

    Args:
        moments: (B, 2C, h, w) mean and log-variance, from
            `AutoencoderKL.encode(...).latent_dist.parameters`.
        noise: (B, C, h, w) standard normal.
        scaling_factor: the VAE's; it scales latents to about unit variance.

    Returns:
        (B, C, h, w) scaled latents.
    """
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))  # as in DiagonalGaussianDistribution
    return (mean + deviation * noise) * scaling_factor


def prediction_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the target of the UNet, (B, C, h, w).

    It is the noise, the velocity (Salimans and Ho, Progressive Distillation for Fast Sampling of
    Diffusion Models, 2022) or the latents, by the scheduler's prediction type.

    Raises:
        MaskLoomError: the scheduler has another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise MaskLoomError(
        f"the backbone's prediction type {kind!r} is not supported; "
        "set train.prediction_type to epsilon, v_prediction or sample"
    )


def denoising_losses(prediction: Tensor, target: Tensor, cell_weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample, (B,) float32.

    Args:
        prediction: the UNet's output, (B, C, h, w).
        target: the target, (B, C, h, w).
        cell_weights: weights of the latent positions, (B, 1, h, w), with mean 1 over each sample;
            None: no weights.
    """
    errors = functional.mse_loss(prediction.float(), target.float(), reduction="none")
    return (errors if cell_weights is None else errors * cell_weights).mean(dim=(1, 2, 3))


def lesion_weights(foreground: Tensor, weight: float, size: tuple[int, int]) -> Tensor:
    """Return the weight of each latent position, (B, 1, h, w), with mean 1 over each sample.

    Args:
        foreground: (B, H, W), 0 or 1.
        weight: weight of a foreground position relative to a background position.
        size: (h, w) of the latents.
    """
    share = functional.adaptive_avg_pool2d(foreground.float().unsqueeze(1), size)
    weights = 1 + (weight - 1) * share
    return weights / weights.mean(dim=(2, 3), keepdim=True)


def timestep_weights(scheduler: Any, timesteps: Tensor, snr_gamma: float | None, debiased: bool) -> Tensor:
    """Return the weight of each sample's loss, (B,) float32.

    Args:
        scheduler: holds the noise schedule and the prediction type.
        timesteps: (B,) int64.
        snr_gamma: weights min(SNR, gamma) for the error of the latents (Hang et al., Efficient
            Diffusion Training via Min-SNR Weighting Strategy, 2023), divided by SNR for noise and
            by SNR + 1 for velocities; None: no such weights.
        debiased: weights 1 / sqrt(SNR) for noise (Yu et al., Unmasking Bias in Diffusion Model
            Training, 2023) and 1 / (SNR + 1) for velocities, both with SNR at most `MAX_SNR`, as in
            sd-scripts (library/custom_train_functions.py); 1 for latents.
    """
    if snr_gamma is None and not debiased:
        return torch.ones(timesteps.shape, device=timesteps.device)
    kind, snr = scheduler.config.prediction_type, signal_to_noise(scheduler, timesteps)
    if snr_gamma is not None:
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
        return snr.clamp(max=snr_gamma) / divisor
    if kind == "sample":
        return torch.ones_like(snr)
    snr = snr.clamp(max=MAX_SNR)
    return 1 / (snr + 1) if kind == "v_prediction" else snr.rsqrt()


def signal_to_noise(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the SNR of each timestep, alpha^2 / sigma^2, (B,) float32.

    Equal to diffusers' `compute_snr`; importing that would load 80 MB of modules.
    """
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return kept / (1 - kept)
