"""Sampling from a class-conditional denoiser: diffusers' `UNet2DConditionModel`.

The class enters in two ways: as an embedding next to the timestep, and one-hot as the single token
that the transformer blocks attend to. One class more than the dataset has, the last, means "no
class", as classifier-free guidance needs (Ho and Salimans, Classifier-Free Diffusion Guidance,
2022).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def class_tokens(labels: Tensor, classes: int) -> Tensor:
    """Return the input of cross-attention, (B, 1, classes + 1) float32.

    Args:
        labels: (B,) int64; the value `classes` means no class.
        classes: number of classes of the dataset.
    """
    return functional.one_hot(labels, classes + 1).float()[:, None]


def guided(unet: Any, planes: Tensor, timestep: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
    """Return the prediction with classifier-free guidance, (B, C, H, W) float32.

    Args:
        unet: the denoiser.
        planes: (B, C, H, W) float32 noisy samples.
        timestep: the timestep of all samples.
        labels: (B,) int64 classes.
        guidance_scale: 0: the class is ignored; 1: as trained, in half the time of any other value;
            above 1: more typical of the class.
    """
    classes = unet.config.cross_attention_dim - 1
    if guidance_scale == 1:
        return _prediction(unet, planes, timestep, labels, classes)
    both = torch.cat([torch.full_like(labels, classes), labels])
    without, with_class = _prediction(unet, torch.cat([planes, planes]), timestep, both, classes).chunk(2)
    return without + guidance_scale * (with_class - without)


def sampled(unet: Any, scheduler: Any, noise: Tensor, labels: Tensor, steps: int, guidance_scale: float) -> Tensor:
    """Return (B, C, H, W) float32 samples, about -1 to 1.

    Args:
        unet: the denoiser.
        scheduler: a diffusers scheduler that draws no noise of its own (DDIM, UniPC, DPM-Solver++).
        noise: (B, C, H, W) float32 standard normal, from which the samples start.
        labels: (B,) int64 classes.
        steps: number of steps of the scheduler.
        guidance_scale: as in `guided`.
    """
    scheduler.set_timesteps(steps, device=noise.device)
    planes = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(planes, timestep)
        planes = scheduler.step(guided(unet, seen, timestep, labels, guidance_scale), timestep, planes).prev_sample
    return planes


def _prediction(unet: Any, planes: Tensor, timestep: Tensor, labels: Tensor, classes: int) -> Tensor:
    tokens = class_tokens(labels, classes).to(unet.dtype)
    return unet(planes.to(unet.dtype), timestep, tokens, class_labels=labels).sample.float()
