"""`joint_gan`: image and mask together, from noise and a class, with one discriminator for both.

The architecture and settings are those of a conditional GAN for breast ultrasound (BUSI): 256 x
256, noise of length 100, batches of 8, 200 epochs at a learning rate of 2e-4, a checkpoint and
previews every 20 epochs. Conditional as in Mirza and Osindero (2014), convolutional as in Radford
et al. (2016). Masks lie in [-1, 1] like images, so their head ends in tanh where that project uses
a sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from maskloom.models.joint_gan import JointImageMaskGenerator, doublings
from maskloom.models.mask_planes import decoded_masks, drawn_planes, encoded_masks
from maskloom.pipeline.config.base import Size
from maskloom.pipeline.config.bounds import BatchSize, Channels, Epochs, Side
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.adversarial import GENERATOR, Gan, normal_start
from maskloom.train_baselines.architecture import Samples
from maskloom.train_baselines.from_noise import SLOPE, BatchDeviation, FromNoiseOptions


class Options(FromNoiseOptions):
    """Options of `joint_gan`."""

    image_size: Size | None = Field(
        (256, 256), description="size of the training and generated images; null: the dataset's"
    )
    train_batch_size: BatchSize = Field(8, ge=2, description="at least 2, for batch norm")
    num_train_epochs: Epochs | None = Field(200, ge=1)
    logging_epochs: Epochs | None = Field(1, ge=1)
    validation_epochs: Epochs | None = Field(20, ge=1)
    checkpointing_epochs: Epochs | None = Field(20, ge=1)
    latent_dim: Channels = Field(100, ge=1, description="length of the noise vector and of the class embedding")
    channels: Channels = Field(
        512, ge=8, description="channels of the generator's first grid; halved with every doubling of the size"
    )
    discriminator_channels: Channels = Field(
        64, ge=1, description="channels of the first layer; doubled with every halving of the size"
    )
    soft_edges: Side = Field(
        0,
        ge=0,
        description="width in pixels of the blurred edges of real masks that the discriminator sees; "
        "without it, hard edges identify real masks, because generated ones never have them",
    )

    def check_size(self, size: tuple[int, int]) -> None:
        """See `ArchitectureOptions.check_size`."""
        doublings(size)


class JointCritic(nn.Module):
    """Maps image and mask planes (B, planes, H, W) and classes (B,) to logits (B, 1).

    The class is an additional learnt plane. At 256: 64-128-256-512-1024 channels, batch norm from
    the second layer on, then 8 x 8 to one. `norms` and `compares` are the options
    discriminator_norm and batch_deviation.
    """

    def __init__(
        self,
        planes: int,
        classes: int,
        channels: int,
        size: tuple[int, int],
        norms: bool = True,
        compares: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(classes, size[0] * size[1])
        halvings = doublings(size) - 1
        widths = [planes + 1, *(channels << level for level in range(halvings))]
        blocks = [
            _halving(before, after, norms and level > 0) for level, (before, after) in enumerate(pairwise(widths))
        ]
        left = (size[0] >> halvings, size[1] >> halvings)
        further = [BatchDeviation()] if compares else []
        self.net = nn.Sequential(*blocks, *further, nn.Conv2d(widths[-1] + compares, 1, left), nn.Flatten())

    def forward(self, planes: Tensor, labels: Tensor) -> Tensor:
        """Return the logits."""
        of_class = self.embedding(labels).view(-1, 1, *self.size)
        return self.net(torch.cat([planes, of_class], dim=1))


class Architecture(Gan):
    """The two-headed generator and its discriminator."""

    options: Options
    needs_masks = True

    def __init__(self, *args: Any) -> None:
        """Build the two networks."""
        super().__init__(*args)
        options, channels, size = self.options, self.description.channels, self.rows.size
        self.mask_classes = len(self.description.mask_classes)
        self.planes = drawn_planes(self.mask_classes)
        self.generator = JointImageMaskGenerator(
            self.classes, channels, self.planes, options.latent_dim, options.channels, size, options.noise_planes
        )
        self.noise_length = self.generator.noise_length
        self.discriminator = JointCritic(
            channels + self.planes,
            self.classes,
            options.discriminator_channels,
            size,
            options.discriminator_norm,
            options.batch_deviation,
        )
        normal_start(self.generator)
        options.start(self.discriminator)
        self.prepare_networks()

    def real_planes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return images and masks."""
        masks = encoded_masks(batch["mask"], self.mask_classes, self.planes)
        return torch.cat([batch["image"], softened(masks, self.options.soft_edges)], dim=1)

    def generated_planes(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Return images and masks generated for the rows' classes."""
        noise = draws.normal("noise", (self.noise_length,))
        return torch.cat([part.float() for part in self.networks[GENERATOR](noise, batch["label"])], dim=1)

    def discriminate(self, network: Any, planes: Tensor, labels: Tensor) -> Tensor:
        """Return the logits of image, mask and class."""
        return network(planes, labels)

    def samples(self, labels: Tensor, masks: Tensor | None, seed: int) -> Samples:
        """Return images with their masks."""
        noise = torch.randn(len(labels), self.noise_length, generator=torch.Generator().manual_seed(seed))
        images, planes = self.generator(noise.to(self.device), labels)
        return Samples(images, decoded_masks(planes, self.mask_classes))


def softened(planes: Tensor, pixels: int) -> Tensor:
    """Return mask planes averaged over squares of side 2 * (pixels // 2) + 1.

    Straight edges stay in place.
    """
    reach = pixels // 2
    return functional.avg_pool2d(planes, 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)


def _halving(before: int, after: int, norm: bool) -> nn.Sequential:
    norms = [nn.BatchNorm2d(after)] if norm else []
    return nn.Sequential(nn.Conv2d(before, after, 4, 2, 1), *norms, nn.LeakyReLU(SLOPE))
