"""What does the backbone's frozen VAE destroy before any training?

Real test images, encoded and decoded: no image that the generator makes can be truer than these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from evaluate.features import ExtractorOptions, batch_features, load_extractor, set_features
from evaluate.frechet import frechet_interval
from evaluate.inputs import EvaluationInputs, in_batches
from evaluate.pictures import picture_grid
from evaluate.results import MetricResult, Picture, Table, skipped_result
from evaluate.statistics import Bootstrap, weighted_mean
from pipeline.fixed_steps import normalised

VERSION = 1
QUESTION = "What does the frozen VAE destroy before any training?"
FEWEST = 2
JACKKNIFE_BLOCKS = 20


class Options(ExtractorOptions):
    """The extractor, and how the images pass through the VAE."""

    batch_size: int = Field(8, ge=1)
    shown_images: int = Field(4, ge=0)


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare real test images with what the VAE makes of them.

    Raises:
        MaskLoomError: the backbone's VAE or the extractor cannot be loaded.
    """
    if len(inputs.test) < FEWEST:
        return skipped_result(QUESTION, f"there are fewer than {FEWEST} real test images")
    images = inputs.test.images()
    decoded = through_vae(_load_vae(inputs), images, options.batch_size, inputs.device)
    extractor, groups = load_extractor(inputs, options), inputs.test.groups
    features = batch_features(extractor, in_batches(decoded), inputs.device)
    distance = frechet_interval(
        features, set_features(inputs, extractor, inputs.test), groups, groups, JACKKNIFE_BLOCKS
    )
    bootstrap = Bootstrap(groups, seed=inputs.seed)
    noise_ratio, similarity = (bootstrap.interval(weighted_mean(values)) for values in _pairwise(images, decoded))
    figures = {"Fréchet distance": distance, "PSNR in dB": noise_ratio, "SSIM": similarity}
    note = f"{len(images)} real test images against the same images encoded (mean of the posterior) and decoded. {extractor.title}. SSIM: Gaussian window, sigma 1.5, data range 255."
    return MetricResult(
        question=QUESTION,
        verdict=f"Real test images that pass through the VAE keep a PSNR of {noise_ratio.value:.1f} dB and an SSIM of {similarity.value:.2f}; Fréchet distance {distance.value:.1f} (N = {len(images)}).",
        tables=[
            Table(
                title="The VAE's ceiling", note=note, columns=["N", *figures], rows=[[len(images), *figures.values()]]
            )
        ],
        pictures=[_picture(images, decoded, options.shown_images)] if options.shown_images else [],
        limits=["PSNR and SSIM are fair here, and only here, because each image is compared with itself."],
        values={"n": len(images), **{name: figure.model_dump() for name, figure in figures.items()}},
        n={"real test": len(images)},
    )


def _load_vae(inputs: EvaluationInputs) -> Any:
    from diffusers import AutoencoderKL

    from pipeline.backbone import load_part

    vae = load_part(AutoencoderKL, inputs.backbone, subfolder="vae", revision=inputs.revision)
    return vae.eval().to(inputs.device)


def through_vae(vae: Any, images: NDArray[np.uint8], batch_size: int, device: str) -> NDArray[np.uint8]:
    """Return images encoded and decoded, of the same shape (N, H, W, C) uint8; grey ones pass as equal channels."""
    import torch

    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            pixels = normalised(images[start : start + batch_size], device).expand(-1, 3, -1, -1)
            output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
            output = output.mean(dim=1, keepdim=True) if images.shape[3] == 1 else output
            parts.append(((output + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)


def _pairwise(images: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return PSNR in dB and SSIM (Wang et al. 2004) of each image with its decoded self, (N,) each."""
    from skimage.metrics import structural_similarity

    error = ((images.astype(np.float64) - decoded) ** 2).mean(axis=(1, 2, 3))
    noise_ratio = 10 * np.log10(255**2 / np.maximum(error, 1e-2))
    similarity = [
        structural_similarity(
            one, other, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for one, other in zip(images, decoded, strict=True)
    ]
    return noise_ratio, np.asarray(similarity)


def _picture(images: NDArray[np.uint8], decoded: NDArray[np.uint8], count: int) -> Picture:
    chosen = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    return Picture(
        title="Through the VAE",
        caption="Top: real test images. Bottom: the same, encoded and decoded.",
        pixels=picture_grid([[images[i] for i in chosen], [decoded[i] for i in chosen]], max(images.shape[1:3])),
    )
