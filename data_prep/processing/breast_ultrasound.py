"""Classes, colours, prompts and decoding shared by the breast ultrasound datasets.

With common definitions, one dataset can serve as external test set of another.
"""

from pathlib import Path

from maskloom.data_prep.adapter import RawImage
from maskloom.data_prep.readers.common import bright, decoded_image, eight_bit, require_same_size
from maskloom.pipeline.errors import RejectedSample

MODALITY = "breast ultrasound"
LABELS = ("benign", "malignant")
MASK_CLASSES = ("background", "lesion")
PALETTE = ((0, 0, 0), (255, 80, 80))
PROMPT_TEMPLATES = (
    "{modality} image of a {label} lesion",
    "{modality} of a {size} {shape} {label} lesion, {place}",
    "{size} {label} lesion in a {modality} image, {place}",
    "B-mode {modality}: {shape} {label} lesion, {size}, {place}",
)


def image_with_lesion(image_path: Path, mask_path: Path) -> RawImage:
    """Return an image (H, W) uint8 and its lesion mask (H, W) of 0 and 1.

    Raises:
        RejectedSample: a file is unreadable or has more than 8 bits per channel, or the mask has
            another size or is empty.
    """
    image, darkened = eight_bit(decoded_image(image_path), "L")
    mask = bright(decoded_image(mask_path))
    require_same_size(f"mask {mask_path.name}", mask, image)
    if not mask.any():
        raise RejectedSample(f"mask {mask_path.name} is empty: an image of this dataset has a lesion")
    return RawImage(image=image, mask=mask, darkened=darkened)
