"""What the images of one dataset have in common, so that it does not count as likeness.

A dark blob in the middle of light skin, the outline of a chest, the disc of a fundus: unrelated images of such a dataset correlate by their layout
alone. The leading principal components of their textures span that layout; what is left of an image is its *detail*, which only the same picture
shares (whitening of descriptors against co-occurring patterns: Jegou and Chum, Negative Evidences and Co-occurences in Image Retrieval, ECCV 2012).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.utils.extmath import randomized_svd

from maskloom.data_prep.splitting.textures import SIDE, Floats, read_texture, unit, window_vector, windows

COMPONENTS = 64
IMAGES_PER_COMPONENT = 2  # of few images more components would span the images themselves
SAMPLED_WINDOWS = 1024


@dataclass(frozen=True)
class Layout:
    """The common components.

    Attributes:
        components: (K, pixels), orthonormal.
    """

    components: Floats

    def detail(self, vector: Floats) -> Floats:
        """Return what of a window is not common, (pixels,), of mean 0 and length 1; zeros where nothing is left."""
        return unit(vector - self.components.T @ (self.components @ vector))


def layout_size(count: int) -> int:
    """Return the number of components for a dataset of so many images."""
    return min(COMPONENTS, count // IMAGES_PER_COMPONENT)


def principal_components(signatures: Path, count: int, side: int, number: int) -> Floats:
    """Return the leading principal components of windows of a dataset's textures, (number, side * side), the strongest first.

    Args:
        signatures: file of records.
        count: number of its images.
        side: of a window, pixels.
        number: of components, at most `SAMPLED_WINDOWS`.
    """
    if number == 0:
        return np.zeros((0, side * side), np.float32)
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
