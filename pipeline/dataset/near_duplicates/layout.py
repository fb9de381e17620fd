"""The layout shared by all images of a dataset, which must not count as similarity.

A dark lesion in the middle of light skin, the outline of a chest, the disc of a fundus: unrelated
images of such datasets correlate because of their layout. The leading principal components of the
textures span the layout. The residual of an image is its *detail*, which only copies share
(whitening of descriptors against co-occurring patterns: Jegou and Chum, Negative Evidences and
Co-occurences in Image Retrieval, ECCV 2012).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskloom.pipeline.dataset.near_duplicates.textures import SIDE, Floats, read_texture, unit, window_vector, windows

COMPONENTS = 64
IMAGES_PER_COMPONENT = 2  # with fewer images per component, the components would span the images themselves
SAMPLED_WINDOWS = 1024


@dataclass(frozen=True)
class Layout:
    """The principal components of the layout.

    Attributes:
        components: (K, pixels), orthonormal.
    """

    components: Floats

    def detail(self, vector: Floats) -> Floats:
        """Return the detail of a window, (pixels,), of mean 0 and norm 1; zeros if it vanishes."""
        return unit(vector - self.components.T @ (self.components @ vector))


def layout_size(count: int) -> int:
    """Return the number of layout components for a dataset of `count` images."""
    return min(COMPONENTS, count // IMAGES_PER_COMPONENT)


def principal_components(signatures: Path, count: int, side: int, number: int) -> Floats:
    """Return the leading principal components of texture windows, (number, side * side).

    Args:
        signatures: file of records.
        count: number of images in it.
        side: side of a window in pixels.
        number: number of components, at most `SAMPLED_WINDOWS`.
    """
    if number == 0:
        return np.zeros((0, side * side), np.float32)
    from sklearn.utils.extmath import randomized_svd

    random, boxes = np.random.default_rng(0), windows()
    sample = np.stack(
        [
            window_vector(read_texture(signatures, image), np.array(boxes[box]) * SIDE, side)
            for image, box in zip(
                random.integers(count, size=SAMPLED_WINDOWS),
                random.integers(len(boxes), size=SAMPLED_WINDOWS),
                strict=True,
            )
        ]
    )
    return np.ascontiguousarray(randomized_svd(sample, number, random_state=0)[2], dtype=np.float32)
