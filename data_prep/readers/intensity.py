"""Intensity windows: the raw values of CT, MRI or X-ray images that become black and white."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.config.data import IntensityWindow


def window_range(values: NDArray[Any], window: IntensityWindow) -> tuple[float, float]:
    """Return the raw values (black, white) of a window.

    Args:
        values: the values for percentiles, mean and deviation, of any shape: an image, or the
            non-zero voxels of a volume.
        window: `percentile`, `window` (center and width in raw units, as in CT viewers), or
            `zscore`.
    """
    if window.method == "window":
        assert window.center is not None  # IntensityWindow checks it
        assert window.width is not None
        return window.center - window.width / 2, window.center + window.width / 2
    if values.size == 0:
        return 0.0, 1.0
    if window.method == "percentile":
        # numpy interpolates in the dtype of the values; the difference of two int16 may overflow.
        exact: NDArray[Any] = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
        black, white = np.percentile(exact, (window.lower, window.upper))
        return float(black), float(white)
    mean, spread = float(np.mean(values, dtype=np.float64)), float(np.std(values, dtype=np.float64))
    return mean - window.deviations * spread, mean + window.deviations * spread
