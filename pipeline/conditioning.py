"""What ControlNet sees: the mask in the palette's colours, Canny edges of the image, or both."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MaskLoomError

CANNY_SIGMA = 2.0


def conditioning_image(
    mask: NDArray[np.uint8] | None, image: NDArray[np.uint8], mode: str, palette: Sequence[Sequence[int]]
) -> NDArray[np.uint8]:
    """Return the conditioning image.

    Args:
        mask: (H, W) class indices, or None where the dataset has no masks.
        image: (H, W) or (H, W, 3), 0..255; only its edges are used.
        mode: `mask`, `edges` or `both` (edges drawn in white over the coloured mask).
        palette: RGB colour of each class index.

    Returns:
        (H, W, 3) uint8.

    Raises:
        MaskLoomError: the mode needs a mask and there is none.
    """
    if mode == "edges":
        return np.repeat(edge_map(image)[..., None], 3, axis=2)
    if mask is None:
        raise MaskLoomError(
            f"data.conditioning={mode} needs masks and this dataset has none; set data.conditioning=edges"
        )
    coloured = np.asarray(palette, dtype=np.uint8)[mask]
    if mode == "both":
        coloured[edge_map(image) > 0] = 255
    return coloured


def edge_map(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return Canny edges (Canny, 1986; scikit-image), (H, W) uint8 of 0 and 255, of a grey or RGB image."""
    from skimage.feature import canny

    grey = image.mean(axis=2) if image.ndim == 3 else image
    return (canny(grey.astype(np.float64) / 255, sigma=CANNY_SIGMA) * 255).astype(np.uint8)
