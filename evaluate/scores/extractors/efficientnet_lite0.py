"""EfficientNet-Lite0 (Tan and Le 2019, ImageNet): its weights come in a package, so it needs no download. The offline default."""

from __future__ import annotations

from maskloom.evaluate.scores.features import Extractor
from maskloom.pipeline.files.atomic import file_digest

INPUT_SIZE = 224
DIMENSIONS = 1280
MEAN, SCALE = 127.0, 128.0  # of TensorFlow's Lite models, which these weights were converted from


def check(side: int) -> None:
    """Check what `load` needs; the network is convolutional and takes any side, and its weights come with the package."""


def load(side: int, device: str) -> Extractor:
    """Return the extractor: mean of the last convolution's 1280 maps over the picture.

    Args:
        side: input side in pixels; the network is convolutional and takes any.
        device: `cpu` or `cuda`.
    """
    import torch

    from maskloom.models.efficientnet_lite0 import load_efficientnet_lite0, weights_file

    network = load_efficientnet_lite0().to(device)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        scaled = ((pixels - MEAN) / SCALE).contiguous(memory_format=torch.channels_last)
        return network(scaled).mean(dim=(2, 3))

    return Extractor("efficientnet_lite0", file_digest(weights_file()), side, features)
