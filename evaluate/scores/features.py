"""Features of images by a pretrained network, computed once per set and shared by all metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from maskloom.evaluate.feature_cache import Features
from maskloom.evaluate.inputs import EvaluationInputs, Images, ImageSet
from maskloom.evaluate.scores.threads import network_results
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.bounds import Side
from maskloom.pipeline.plugins import load_plugin

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "maskloom.evaluate.scores.extractors"


class ExtractorOptions(Section):
    """The network that extracts features, and its input size."""

    extractor: str = Field(
        "efficientnet_lite0",
        description="file name in evaluate/scores/extractors; or a vision model: ./FOLDER, or NAMESPACE/NAME@COMMIT on the Hub",
    )
    extractor_size: Side | None = Field(
        None, ge=32, description="input side in pixels; null: the size at which the network was trained"
    )


@dataclass(frozen=True)
class Extractor:
    """A pretrained network that maps images to features.

    Attributes:
        name: file name in evaluate/scores/extractors, or the name of a vision model.
        digest: SHA-256 that identifies its weights.
        side: images are resized to side x side, bicubic with antialiasing, not rounded to 8 bits.
        features: maps NCHW float32 RGB in [0, 255] to (N, D) float32.
        maps: maps the same to the feature maps of several layers, (N, C, ...) each; None if the
            network does not give them.
    """

    name: str
    digest: str
    side: int
    features: Callable[[Tensor], Tensor]
    maps: Callable[[Tensor], list[Tensor]] | None = None

    @property
    def title(self) -> str:
        """Name, weights and size: figures are comparable only if this is the same."""
        return f"{self.name} (weights {self.digest[:12]}, {self.side} px, bicubic antialiased)"


def extractor_plugin(name: str) -> Any:
    """Return the file of an extractor, or what stands for the file of a vision model.

    Args:
        name: the option `extractor`; a name with a slash is that of a model.

    Raises:
        MaskLoomError: unknown name (lists the known ones), or the model's settings cannot be read.
    """
    if "/" not in name:
        return load_plugin(PACKAGE, name, "extractor")
    return load_plugin(PACKAGE, "huggingface", "extractor").of_model(name)


def check_extractor(options: ExtractorOptions) -> None:
    """Check that the extractor of the options takes the size and that its package is installed.

    No weights are read.

    Raises:
        MaskLoomError: see `extractor_plugin`; or it cannot be used.
    """
    plugin = extractor_plugin(options.extractor)
    plugin.check(options.extractor_size or plugin.INPUT_SIZE)


def extractor_digests(options: ExtractorOptions) -> dict[str, str]:
    """Return the digest of the vision model of the options by its name; empty for other extractors.

    The files of a folder may change under its name, other than those of an extractor's package.

    Raises:
        MaskLoomError: see `extractor_plugin`; or a folder has no weights.
    """
    if "/" not in options.extractor:
        return {}
    model = extractor_plugin(options.extractor)
    return {f"extractor {model.name}": model.digest()}


def load_extractor(inputs: EvaluationInputs, options: ExtractorOptions) -> Extractor:
    """Return the extractor of the options, loaded once.

    Raises:
        MaskLoomError: see `extractor_plugin`; or it cannot be loaded.
    """
    plugin = extractor_plugin(options.extractor)
    side = options.extractor_size or plugin.INPUT_SIZE
    extractor: Extractor = inputs.once(("extractor", options.extractor, side), lambda: plugin.load(side, inputs.device))
    return extractor


def set_features(inputs: EvaluationInputs, extractor: Extractor, image_set: ImageSet) -> Features:
    """Return the features of all images of a set, (N, D) float32.

    They are computed once, and kept on disk where the inputs have a cache.
    """
    cache, depends_on = inputs.feature_cache, [extractor.name, extractor.digest, extractor.side, inputs.device]

    def compute() -> Features:
        return batch_features(extractor, image_set.batches("image"), inputs.device)

    def cached() -> Features:
        if cache is None or not len(image_set):
            return compute()
        return cache.features(image_set.dataset.digest, image_set.split, depends_on, compute)

    key = ("features", *depends_on, image_set.name)
    features: Features = inputs.once(key, cached, large=cache is not None)  # then soon read again
    return features


def batch_features(extractor: Extractor, batches: Iterable[list[Images | None]], device: str) -> Features:
    """Return the features, (N, D) float32, of batches of (H, W) or (H, W, 3) uint8 images."""
    import torch

    def features(pixels: Tensor) -> Tensor:
        return extractor.features(as_rgb(pixels, extractor.side)).float()

    found = []
    for batch in batches:
        pixels = torch.from_numpy(np.stack([array for array in batch if array is not None])).to(device)
        found.append(network_results(features, pixels).cpu().numpy())
    return np.concatenate(found) if found else np.zeros((0, 1), dtype=np.float32)


def as_rgb(pixels: Tensor, side: int) -> Tensor:
    """Return (N, H, W[, 1 or 3]) uint8 as (N, 3, side, side) float32 in [0, 255]."""
    import torch

    channels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    colour = channels.expand(-1, 3, -1, -1).float()
    if colour.shape[-2:] == (side, side):
        return colour
    resized = torch.nn.functional.interpolate(colour, (side, side), mode="bicubic", antialias=True)
    return resized.clamp(0, 255)
