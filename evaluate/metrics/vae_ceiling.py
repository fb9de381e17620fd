"""What does the VAE destroy, and how much of it does a fine-tuned decoder recover?

Real test images are encoded and decoded: no generated image can be more accurate than these,
whatever the generator learns. A run whose `generator/vae/` holds a fine-tuned decoder
(`train.vae_decoder`) is measured with both, on the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.feature_cache import Features
from maskloom.evaluate.inputs import BATCH, EvaluationInputs, ImageSet, in_batches
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, batch_features, load_extractor, set_features
from maskloom.evaluate.scores.frechet import frechet_interval
from maskloom.evaluate.scores.statistics import Bootstrap, difference, weighted_mean
from maskloom.evaluate.scores.threads import network_results, thread_results
from maskloom.evaluate.thumbnails import image_grid
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.bounds import BatchSize, Rows, Shown
from maskloom.pipeline.results import Cell, Interval, MetricResult, Picture, Table, skipped_result
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.fixed_steps import normalised

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 4
QUESTION = "What does the VAE destroy, whatever the generator learns?"
FEWEST = 2
JACKKNIFE_BLOCKS = 20
BACKBONE, TUNED = "the backbone's VAE", "fine-tuned decoder"


class Options(ExtractorOptions):
    """The feature extractor, and how many images are encoded and decoded, and how."""

    most_images: Rows = Field(250, ge=2, description="of the real test images, so many at most, spread evenly")
    batch_size: BatchSize = Field(8, ge=1)
    shown_images: Shown = Field(4, ge=0)


@dataclass(frozen=True)
class Reconstruction:
    """Decoded images, compared with their originals.

    Attributes:
        features: (N, D).
        psnr: (N,) in dB.
        ssim: (N,).
        shown: the images at some places, (S, H, W, C) uint8.
    """

    features: Features
    psnr: NDArray[np.float64]
    ssim: NDArray[np.float64]
    shown: NDArray[np.uint8]


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare real test images with their reconstructions by each VAE.

    Raises:
        MaskLoomError: a VAE or the extractor cannot be loaded.
    """
    if inputs.backbone is None:
        return skipped_result(QUESTION, "no backbone is fine-tuned, so no image passes through a VAE")
    if len(inputs.test) < FEWEST:
        return skipped_result(QUESTION, f"there are fewer than {FEWEST} real test images")
    extractor, rows = load_extractor(inputs, options), spread(len(inputs.test), options.most_images)
    count, shown = len(rows), [rows[place] for place in spread(len(rows), options.shown_images)]
    reconstructions = {
        name: reconstruct(vae, inputs.test, rows, shown, extractor, options.batch_size, inputs.device)
        for name, vae in _load_vaes(inputs, inputs.backbone).items()
    }
    groups, originals = [inputs.test.groups[row] for row in rows], set_features(inputs, extractor, inputs.test)[rows]
    bootstrap = Bootstrap(groups, seed=inputs.seed)
    figures = {name: _figures(originals, groups, bootstrap, one) for name, one in reconstructions.items()}
    gain = _gain(bootstrap, reconstructions) if TUNED in reconstructions else {}
    return MetricResult(
        question=QUESTION,
        verdict=_verdict(figures, gain, count),
        tables=[_table(figures, gain, extractor, count)],
        pictures=[_picture(inputs.test.images(rows=shown), reconstructions)] if shown else [],
        limits=[
            "PSNR and SSIM are valid here, and only here, because each image is compared with itself.",
            *(
                [
                    "A decoder trained with a reconstruction loss may smooth texture: read PSNR and SSIM together with the distance."
                ]
                if gain
                else []
            ),
        ],
        values={
            "n": count,
            **{name: _as_values(row) for name, row in figures.items()},
            **({"gain": _as_values(gain)} if gain else {}),
        },
        n={"real test": count},
    )


def _load_vaes(inputs: EvaluationInputs, backbone: BackboneSource) -> dict[str, Any]:
    """Return the backbone's VAE and, if the run has one, the VAE with the fine-tuned decoder.

    Raises:
        MaskLoomError: the files of a VAE are damaged.
    """
    import torch
    from diffusers import AutoencoderKL

    from maskloom.models.stable_diffusion.loading import load_part, load_trained

    vaes: dict[str, Any] = {BACKBONE: load_part(backbone, "vae")}
    folder = Run(inputs.real.folder.parent).generator / "vae"  # `train` writes it into the real dataset's run
    if folder.is_dir():
        vaes[TUNED] = load_trained(AutoencoderKL, folder, "run train again with --force")
    return {name: vae.eval().to(inputs.device, memory_format=torch.channels_last) for name, vae in vaes.items()}


def spread(count: int, most: int) -> list[int]:
    """Return at most so many rows of a set, spread evenly."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def _figures(
    originals: Features, groups: Sequence[str], bootstrap: Bootstrap, one: Reconstruction
) -> dict[str, Interval]:
    return {
        "Fréchet distance": frechet_interval(one.features, originals, groups, groups, JACKKNIFE_BLOCKS),
        "PSNR in dB": bootstrap.interval(weighted_mean(one.psnr)),
        "SSIM": bootstrap.interval(weighted_mean(one.ssim)),
    }


def _gain(bootstrap: Bootstrap, reconstructions: dict[str, Reconstruction]) -> dict[str, Interval]:
    """Return the paired difference, fine-tuned minus backbone."""
    before, after = reconstructions[BACKBONE], reconstructions[TUNED]
    pairs = {"PSNR in dB": (after.psnr, before.psnr), "SSIM": (after.ssim, before.ssim)}
    return {
        name: bootstrap.interval(difference(weighted_mean(new), weighted_mean(old)))
        for name, (new, old) in pairs.items()
    }


def _table(
    figures: dict[str, dict[str, Interval]], gain: dict[str, Interval], extractor: Extractor, count: int
) -> Table:
    columns = list(figures[BACKBONE])
    rows: list[list[Cell]] = [[name, count, *row.values()] for name, row in figures.items()]
    if gain:
        rows.append(["paired difference", count, *(gain.get(name) for name in columns)])
    return Table(
        title="VAE ceiling",
        note=f"{count} real test images against the same images encoded (mean of the posterior) and decoded. {extractor.title}. "
        "SSIM: Gaussian window, sigma 1.5, data range 255. 95 % intervals over groups.",
        columns=["VAE", "N", *columns],
        rows=rows,
    )


def _verdict(figures: dict[str, dict[str, Interval]], gain: dict[str, Interval], count: int) -> str:
    name = TUNED if gain else BACKBONE
    distance, psnr, ssim = (one.value for one in figures[name].values())
    sentence = (
        f"Real test images after {'the VAE with its fine-tuned decoder' if gain else name} have a PSNR of "
        f"{psnr:.1f} dB and an SSIM of {ssim:.2f}; Fréchet distance {distance:.1f} (N = {count})"
    )
    if not gain:
        return sentence + "."
    before = [one.value for one in figures[BACKBONE].values()]
    return f"{sentence}; with the backbone's own decoder they have {before[1]:.1f} dB, {before[2]:.2f} and {before[0]:.1f}."


def _as_values(row: dict[str, Interval]) -> dict[str, Any]:
    return {name: figure.model_dump() for name, figure in row.items()}


def through_vae(vae: Any, images: NDArray[np.uint8], batch_size: int, device: str) -> NDArray[np.uint8]:
    """Return the images (N, H, W, C) uint8 encoded and decoded.

    Grey images pass through the VAE as three equal channels, whose mean is returned.
    """
    import torch

    def decoded(pixels: Tensor) -> Tensor:
        output = vae.decode(vae.encode(pixels.expand(-1, 3, -1, -1)).latent_dist.mode()).sample
        output = output.mean(dim=1, keepdim=True) if images.shape[3] == 1 else output
        return ((output + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    return network_results(decoded, normalised(images, device), batch_size).cpu().numpy()


def reconstruct(
    vae: Any,
    image_set: ImageSet,
    rows: list[int],
    shown: list[int],
    extractor: Extractor,
    batch_size: int,
    device: str,
) -> Reconstruction:
    """Return the features of reconstructed images, with their PSNR and SSIM (Wang et al. 2004).

    A batch of images is in memory at a time, and the shown ones.

    Args:
        vae: the VAE.
        image_set: the images.
        rows: which of them are reconstructed.
        shown: which of these rows are kept as images.
        extractor: of the features.
        batch_size: images that pass through the VAE at a time, at most.
        device: where the networks are.
    """
    features, psnr, kept = [], [], []
    ssim: list[float] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        images = image_set.images(rows=batch)
        decoded = through_vae(vae, images, batch_size, device)
        features.append(batch_features(extractor, in_batches(decoded), device))
        error = ((images.astype(np.float64) - decoded) ** 2).mean(axis=(1, 2, 3))
        psnr.append(10 * np.log10(255**2 / np.maximum(error, 1e-2)))  # at most 68 dB, for equal images
        ssim += thread_results(lambda pair: _ssim(*pair), list(zip(images, decoded, strict=True)))
        kept += [decoded[batch.index(row)] for row in shown if row in batch]
    return Reconstruction(np.concatenate(features), np.concatenate(psnr), np.asarray(ssim), np.array(kept))


def _ssim(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    from skimage.metrics import structural_similarity

    similarity: float = structural_similarity(
        one, other, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return similarity


def _picture(originals: NDArray[np.uint8], reconstructions: dict[str, Reconstruction]) -> Picture:
    rows = [list(images) for images in (originals, *(one.shown for one in reconstructions.values()))]
    return Picture(
        title="Through the VAE",
        caption=f"From top to bottom: real test images; the same images after {', and after the '.join(reconstructions)}.",
        pixels=image_grid(rows, max(originals.shape[1:3])),
    )
