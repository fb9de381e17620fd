"""EfficientNet-Lite0 (Tan and Le 2019), trained on ImageNet: the default.

Its weights come with an installed package, so nothing is downloaded.
"""

from __future__ import annotations

from maskloom.evaluate.scores.features import Extractor
from maskloom.pipeline.files.atomic import file_digest

INPUT_SIZE = 224
DIMENSIONS = 1280
MEAN, SCALE = 127.0, 128.0  # of TensorFlow's Lite models, which these weights were converted from


def check(side: int) -> None:
    """Check what `load` needs: nothing; the network takes any side, its weights are installed."""


def load(side: int, device: str) -> Extractor:
    """Return the extractor: the 1280 feature maps of the last convolution, averaged over the image.

    Args:
        side: input side in pixels; the network is convolutional and takes any.
        device: `cpu` or `cuda`.
    """
    import torch

    from maskloom.models.efficientnet_lite0 import load_efficientnet_lite0, weights_file

    network = load_efficientnet_lite0().to(device)

    def scaled(pixels: torch.Tensor) -> torch.Tensor:
        return ((pixels - MEAN) / SCALE).contiguous(memory_format=torch.channels_last)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return network(scaled(pixels)).mean(dim=(2, 3))

    def maps(pixels: torch.Tensor) -> list[torch.Tensor]:
        return network.maps_by_resolution(scaled(pixels))

    return Extractor("efficientnet_lite0", file_digest(weights_file()), side, features, maps)
