"""Does the image look like real ones? Distance to the nearest real validation images.

Two spaces are joined: the features of a pretrained network, which see content, and the power spectrum,
which sees noise and blur that the network has learnt to ignore. Each is scaled to unit variance.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.filtering import criterion
from maskloom.evaluate.filtering.criterion import Scores
from maskloom.evaluate.inputs import Images, ImageSet
from maskloom.evaluate.scores.features import ExtractorOptions, load_extractor, set_features

VERSION = 1
BANDS = 8  # of the power spectrum, of equal width, from the mean to the finest detail
CHUNK = 1024  # images whose distances are computed at a time
Points = NDArray[np.float64]


class Options(ExtractorOptions):
    """The network that extracts features, and the number of neighbours."""

    neighbours: int = Field(3, ge=1, le=1000, description="validation images over which the distance is averaged")
    spectrum: bool = Field(True, description="also compare the power spectrum: noise, blur, grids")


class Criterion(criterion.Criterion):
    """The mean distance to the nearest validation images of other groups, with a minus sign."""

    options: Options

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the negative distance of each image; NaN where no other group is in validation."""
        reference = np.array(self.inputs.validation.groups)
        points, groups = self._points(image_set), np.array(image_set.groups)
        scores = [
            nearest_mean(
                points[start : start + CHUNK],
                self._reference,
                groups[start : start + CHUNK, None] != reference,
                self.options.neighbours,
            )
            for start in range(0, len(points), CHUNK)
        ]
        return -np.concatenate([np.zeros(0), *scores])

    @cached_property
    def _reference(self) -> Points:
        return self._points(self.inputs.validation)

    def _points(self, image_set: ImageSet) -> Points:
        """Return the images as points, (N, D)."""
        features = self._features(image_set) / self._feature_scale
        if not self.options.spectrum:
            return features
        mean, matrix = self._whitening
        return np.concatenate([features, (self._spectra(image_set) - mean) @ matrix], axis=1)

    def _features(self, image_set: ImageSet) -> Points:
        extractor = load_extractor(self.inputs, self.options)
        return set_features(self.inputs, extractor, image_set).astype(np.float64)

    @cached_property
    def _feature_scale(self) -> float:
        variance = self._features(self.inputs.validation).var(axis=0).sum()
        return float(np.sqrt(variance)) or 1.0

    @cached_property
    def _whitening(self) -> tuple[Points, Points]:
        """Return mean and whitening matrix of the spectra of real train images; total variance 1."""
        spectra = self._spectra(self.inputs.train)
        values, vectors = np.linalg.eigh(np.cov(spectra, rowvar=False) + 1e-3 * np.eye(BANDS))
        return spectra.mean(axis=0), vectors / np.sqrt(values * BANDS)

    def _spectra(self, image_set: ImageSet) -> Points:
        def compute() -> Points:
            batches = [power_spectra(np.stack(batch)) for batch in image_set.batches("image")]  # type: ignore[arg-type]
            return np.concatenate([np.zeros((0, BANDS)), *batches])

        found: Points = self.inputs.once(("power spectra", image_set.name), compute)
        return found


def nearest_mean(points: Points, reference: Points, usable: NDArray[np.bool_], neighbours: int) -> Points:
    """Return the mean distance of each point to its nearest reference points, (N,).

    Args:
        points: (N, D).
        reference: (R, D).
        usable: (N, R), which reference points count for a point; NaN for a point with none.
        neighbours: number of reference points, at most as many as are usable.
    """
    squared = (points**2).sum(axis=1)[:, None] + (reference**2).sum(axis=1) - 2 * points @ reference.T
    distances = np.sort(np.where(usable, np.sqrt(np.maximum(squared, 0)), np.inf), axis=1)[:, :neighbours]
    counts = np.isfinite(distances).sum(axis=1)
    sums = np.where(np.isfinite(distances), distances, 0).sum(axis=1)
    return np.asarray(np.divide(sums, counts, out=np.full(len(points), np.nan), where=counts > 0))


def power_spectra(images: Images) -> Points:
    """Return the log power of images in bands of spatial frequency, (N, `BANDS`).

    Args:
        images: (N, H, W) or (N, H, W, 3) uint8; colour is averaged.
    """
    grey = images.mean(axis=3) if images.ndim == 4 else images.astype(np.float64)
    height, width = grey.shape[1:]
    window = np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.fft2((grey - grey.mean(axis=(1, 2), keepdims=True)) * window)) ** 2
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    band = np.minimum((frequency * 2 * BANDS).astype(int), BANDS)  # beyond half the sampling rate: not used
    return np.stack([np.log1p(power[:, band == one].mean(axis=1)) for one in range(BANDS)], axis=1)
