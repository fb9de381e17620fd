"""Features of the images of a set where masks are: their own ones, or those of other images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.filtering.pooling import distance_bands, low_level_maps, pooled_features
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, as_rgb, load_extractor
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.errors import MaskLoomError

if TYPE_CHECKING:
    import torch

Pooled = NDArray[np.float16]


class MaskFeatureOptions(Section):
    """The input of the pretrained network whose feature maps are compared with masks."""

    extractor_size: int = Field(
        224, ge=32, le=2048, multiple_of=32, description="side in pixels at which EfficientNet-Lite0 sees images"
    )


def mask_extractor(inputs: EvaluationInputs, options: MaskFeatureOptions) -> Extractor:
    """Return the network, whose maps have half the side of its input, a quarter, and so on."""
    chosen = ExtractorOptions(extractor="efficientnet_lite0", extractor_size=options.extractor_size)
    return load_extractor(inputs, chosen)


def own_features(inputs: EvaluationInputs, image_set: ImageSet, options: MaskFeatureOptions) -> Pooled:
    """Return the features of each image where its own mask is, (N, D), computed once."""
    key = ("mask features", image_set.name, options.extractor_size)
    rows, own = np.arange(len(image_set)), np.arange(len(image_set))[:, None]
    found: Pooled = inputs.once(key, lambda: mask_features(inputs, image_set, rows, own, options)[:, 0])
    return found


def mask_features(
    inputs: EvaluationInputs,
    image_set: ImageSet,
    rows: NDArray[np.int64],
    masks: NDArray[np.int64],
    options: MaskFeatureOptions,
) -> Pooled:
    """Return the features of images where masks of the set are, (N, M, D), averaged over mirror images.

    Args:
        inputs: know the classes of the mask and the device.
        image_set: the set.
        rows: of the images, (N,).
        masks: rows of the masks that are laid on each image, (N, M).
        options: input size.
    """
    import torch

    extractor = mask_extractor(inputs, options)
    side = extractor.side // 2
    bands = torch.from_numpy(distance_bands(image_set.masks((side, side))[0], len(inputs.classes)))
    found, start = [], 0
    with torch.inference_mode():
        for batch in image_set.batches("image", rows=rows.tolist()):
            pixels = torch.from_numpy(np.stack([one for one in batch if one is not None])).to(inputs.device)
            laid = bands[torch.from_numpy(masks[start : start + len(batch)])].to(inputs.device)
            mirrored = _of_batch(extractor, pixels.flip(2), laid.flip(4))
            found.append(((_of_batch(extractor, pixels, laid) + mirrored) / 2).half().cpu().numpy())
            start += len(batch)
    if not found:
        return np.zeros((0, masks.shape[1], 0), dtype=np.float16)
    return np.concatenate(found)


def _of_batch(extractor: Extractor, pixels: torch.Tensor, bands: torch.Tensor) -> torch.Tensor:
    """Return the features, (B, M, D), of images (B, H, W[, C]) with bands (B, M, K, side, side)."""
    import torch

    if extractor.maps is None:
        raise MaskLoomError(f"extractor={extractor.name} gives no feature maps; use efficientnet_lite0")
    low = low_level_maps(as_rgb(pixels, bands.shape[3]))
    layers = extractor.maps(as_rgb(pixels, extractor.side))
    return torch.stack(
        [
            pooled_features([low[number], *(layer[number] for layer in layers)], bands[number])
            for number in range(len(pixels))
        ]
    )
