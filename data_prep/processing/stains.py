"""Stain normalisation of H&E images to a reference, with torchstain on numpy.

`macenko`: Macenko et al., "A method for normalizing histology slides for quantitative analysis"
(ISBI 2009). The directions of both stains in optical density are estimated from the tile and
replaced by those of the reference. `reinhard`: Reinhard et al., "Color transfer between images"
(IEEE Computer Graphics and Applications 2001): mean and standard deviation in the L*a*b* colour
space become those of the reference.

Undocumented behaviour of torchstain: it adds 1 before the logarithm and truncates decimals, so that
even an image that is its own reference changes by one grey value. It returns noise instead of an
error if a tile has too little of the two stains. Such tiles are rejected here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from maskloom.data_prep.readers.common import decoded_image, eight_bit
from maskloom.pipeline.config.data import StainConfig
from maskloom.pipeline.errors import MaskLoomError, RejectedSample, one_line
from maskloom.pipeline.plugins import require

WHITE = 240  # torchstain's `Io`: grey value of light without tissue
LEAST_DENSITY = 0.15  # torchstain's `beta`: optical density of the palest tissue
PALEST = WHITE * np.exp(-LEAST_DENSITY) - 1  # grey value of that density
LEAST_TISSUE = 0.1  # fraction of the tile; below, percentiles over the whole tile do not describe its tissue
LEAST_PIXELS = 100  # of tissue
LEAST_COLOUR = 8  # mean difference between a pixel's highest and lowest channel; a JPEG of a grey image stays below
LEAST_ANGLE = 3.0  # degrees between the stains' directions; haematoxylin and eosin are 22 apart
LEAST_STAIN = 0.1  # 99th percentile of a stain's concentration; the published reference has 2.0 and 1.0
LEAST_SPREAD = 0.1  # standard deviation of L*, a* and b*; Reinhard divides by it


@dataclass(frozen=True)
class StainNormaliser:
    """Normalises images to the stains of a fitted reference; picklable.

    Attributes:
        method: `macenko` or `reinhard`.
        library: torchstain's normaliser, fitted.
    """

    method: str
    library: Any

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a tile with the stains of the reference; deterministic.

        Args:
            image: (H, W, 3) uint8, RGB.

        Returns:
            (H, W, 3) uint8.

        Raises:
            RejectedSample: the tile has no colour, too little tissue, or no two distinguishable
                stains.
        """
        _fitted(self.method, image)  # runs the checks, which torchstain lacks
        with np.errstate(over="ignore"), threadpool_limits(1):  # overflows are white
            if self.method == "reinhard":
                return np.asarray(self.library.normalize(image), dtype=np.uint8)
            return np.asarray(self.library.normalize(image, Io=WHITE, beta=LEAST_DENSITY, stains=False)[0], np.uint8)


def stain_normaliser(config: StainConfig) -> StainNormaliser:
    """Return a normaliser fitted to the configured reference, or to torchstain's H&E vectors.

    Raises:
        MaskLoomError: torchstain (extra `slides`) is not installed, or the reference cannot be read
            or its stains estimated.
    """
    if config.reference is None:
        return StainNormaliser(config.method, _unfitted(config.method))
    try:
        pixels = eight_bit(decoded_image(config.reference), "RGB").pixels
        return StainNormaliser(config.method, _fitted(config.method, pixels))
    except RejectedSample as error:
        raise MaskLoomError(
            f"data.stain.reference={config.reference}: {one_line(error)}; give a well stained tile with much tissue"
        ) from error


def _unfitted(method: str) -> Any:
    require("torchstain", "slides", f"data.stain.method={method}")
    from torchstain.base.normalizers import MacenkoNormalizer, ReinhardNormalizer

    return {"macenko": MacenkoNormalizer, "reinhard": ReinhardNormalizer}[method](backend="numpy")


def _fitted(method: str, image: NDArray[np.uint8]) -> Any:
    """Return torchstain's normaliser, fitted to an image.

    Raises:
        RejectedSample: see `StainNormaliser`.
    """
    _check_colour_and_tissue(method, image)
    normaliser = _unfitted(method)
    with threadpool_limits(1):  # the same result on any number of cores
        if method == "reinhard":
            normaliser.fit(image)
            if not normaliser.target_stds.min() >= LEAST_SPREAD:
                raise RejectedSample("every pixel has nearly the same colour: there is nothing to normalise")
        else:
            normaliser.fit(image, Io=WHITE, beta=LEAST_DENSITY)
            _check_stains(normaliser.HERef, normaliser.maxCRef)
    return normaliser


def _check_colour_and_tissue(method: str, image: NDArray[np.uint8]) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise RejectedSample(f"no RGB image but {image.shape} {image.dtype}: its stains cannot be normalised")
    # Macenko estimates stains from pixels that are dense in all channels; for Reinhard, pale pink
    # is tissue as well.
    tissue = (image.max(axis=2) if method == "macenko" else image.min(axis=2)) <= PALEST
    if tissue.mean() < LEAST_TISSUE or tissue.sum() < LEAST_PIXELS:
        raise RejectedSample(
            f"too little tissue for stain normalisation: {tissue.sum()} pixels, {tissue.mean():.1%} of the image "
            f"(at least {LEAST_PIXELS} and {LEAST_TISSUE:.0%})"
        )
    colour = float(np.ptp(image[tissue], axis=1).mean())
    if colour < LEAST_COLOUR:
        raise RejectedSample(
            f"no colour to normalise: the channels differ by {colour:.1f} of 255 (at least {LEAST_COLOUR})"
        )


def _check_stains(directions: NDArray[np.float64], most: NDArray[np.float64]) -> None:
    """Check the estimated stain vectors, (3, 2), and 99th percentiles of concentration, (2,)."""
    angle = float(np.degrees(np.arccos(np.clip(directions[:, 0] @ directions[:, 1], -1, 1))))
    if not angle >= LEAST_ANGLE or not most.min() >= LEAST_STAIN:
        raise RejectedSample(
            f"two stains cannot be told apart: {angle:.1f} degrees between them (at least {LEAST_ANGLE:g}), "
            f"concentrations {most[0]:.2f} and {most[1]:.2f} (at least {LEAST_STAIN:g})"
        )
