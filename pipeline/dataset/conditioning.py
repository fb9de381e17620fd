"""What ControlNet sees: coloured mask, Canny edges, both, foreground, or a paired image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.dataset.components import without_specks
from maskloom.pipeline.dataset.images import rgb_array
from maskloom.pipeline.errors import MaskLoomError

CANNY_SIGMA = 2.0
SPECK = 0.001  # fraction of the image; smaller islands of the foreground, and smaller holes, are noise


def conditioning_image(
    mask: NDArray[np.uint8] | None,
    image: NDArray[np.uint8],
    mode: str,
    palette: Sequence[Sequence[int]],
    paired: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Return the conditioning image.

    Args:
        mask: (H, W) class indices, or None if the dataset has no masks.
        image: (H, W) or (H, W, 3), 0..255; only its edges or its foreground are used.
        mode: `mask`, `edges`, `both` (edges drawn in white over the coloured mask), `foreground`
            (white on black), or `image` (the paired image).
        palette: RGB colour of each class index.
        paired: (H, W) or (H, W, 3), 0..255: the paired image, or None if the dataset has none.

    Returns:
        (H, W, 3) uint8.

    Raises:
        MaskLoomError: the mode needs a mask or a paired image, and there is none.
    """
    if mode == "image":
        if paired is None:
            raise MaskLoomError(
                "data.conditioning=image needs a paired image for every image, such as another stain of the same "
                "tissue, and this dataset has none; set data.conditioning to mask, edges or foreground"
            )
        return rgb_array(paired)
    if mode == "edges":
        return rgb_array(edge_map(image))
    if mode == "foreground":
        return rgb_array(foreground_map(image))
    if mask is None:
        raise MaskLoomError(
            f"data.conditioning={mode} needs masks and this dataset has none; set data.conditioning=edges or "
            "data.conditioning=foreground, which are drawn from the image"
        )
    coloured = np.take(np.asarray(palette, dtype=np.uint8), mask, axis=0)
    if mode == "both":
        coloured[edge_map(image) > 0] = 255
    return coloured


def edge_map(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the edges of a grey or RGB image, (H, W) uint8 of 0 and 255.

    Canny (1986), with scikit-image.
    """
    from skimage.feature import canny

    return (canny(_grey(image) / 255, sigma=CANNY_SIGMA) * 255).astype(np.uint8)


def foreground_map(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the foreground of a grey or RGB image, (H, W) uint8 of 0 and 255.

    It is one side of Otsu's threshold (1979; scikit-image): the side that takes up less of the
    image's border, such as tissue on a bright slide or a head in dark air. If both take up half, it
    is the brighter side. Specks are removed from both sides; a constant image has no foreground.
    """
    from skimage.filters import threshold_otsu

    grey = _grey(image)
    if grey.min() == grey.max():
        return np.zeros(grey.shape, dtype=np.uint8)
    bright = grey > threshold_otsu(grey)
    border = np.concatenate([bright[0], bright[-1], bright[1:-1, 0], bright[1:-1, -1]])
    foreground = bright if border.mean() <= 0.5 else ~bright
    islands = without_specks(foreground, SPECK * grey.size)
    filled = ~without_specks(~islands, SPECK * grey.size)
    return (filled * 255).astype(np.uint8)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    return (image.mean(axis=2) if image.ndim == 3 else image).astype(np.float64)
