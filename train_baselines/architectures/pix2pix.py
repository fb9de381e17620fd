"""`pix2pix`: mask-to-image translation by a U-Net trained against a patch discriminator.

Isola et al., Image-to-Image Translation with Conditional Adversarial Networks (2017), with an SSIM
term in the loss as in a lung-CT project: 100 L1 + 5 (1 - SSIM) + the adversarial term; 128 x 128,
batches of 64, 200 epochs, with a learning rate that falls from epoch 100 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from monai.losses.ssim_loss import SSIMLoss
from monai.networks.nets.patchgan_discriminator import PatchDiscriminator
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from maskloom.models.mask_planes import encoded_masks
from maskloom.models.pix2pix import MaskToImageUNet
from maskloom.pipeline.config.bounds import BatchSize, Channels, Epochs
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.adversarial import Gan, GanOptions, GanSchedule, normal_start
from maskloom.train_baselines.architecture import Samples


class Options(GanOptions):
    """Options of `pix2pix`."""

    train_batch_size: BatchSize = Field(64, ge=1)
    num_train_epochs: Epochs | None = Field(200, ge=1)
    lr_scheduler: GanSchedule = "constant_then_linear"
    logging_epochs: Epochs | None = Field(1, ge=1)
    validation_epochs: Epochs | None = Field(10, ge=1)
    checkpointing_epochs: Epochs | None = Field(10, ge=1)
    channels: tuple[Channels, ...] = Field(
        (64, 128, 256, 512, 512, 512), min_length=4, description="channels of the U-Net's levels"
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout rate in the first three upsampling blocks")
    mask_encoding: Literal["grey", "one_hot"] = Field(
        "grey", description="one plane of grey levels, or one plane per class"
    )
    l1_weight: float = Field(100.0, ge=0)
    ssim_weight: float = Field(5.0, ge=0)

    def check_size(self, size: tuple[int, int]) -> None:
        """See `ArchitectureOptions.check_size`."""
        factor = 2 ** len(self.channels)
        if any(side % factor or side < 2 * factor for side in size):
            raise ValueError(
                f"both sides must be multiples of {factor} for {len(self.channels)} levels, and at least {2 * factor}; "
                "change it, or give fewer channels"
            )


class PatchCritic(nn.Module):
    """MONAI's patch discriminator, 2-64-128-256-512-1: (B, planes, H, W) to a map of logits."""

    def __init__(self, planes: int, channels: int) -> None:
        super().__init__()
        self.net = PatchDiscriminator(2, channels, planes, out_channels=1, num_layers_d=3, norm="INSTANCE", bias=True)

    def forward(self, planes: Tensor) -> Tensor:
        """Return the logits of the patches, (B, 1, h, w)."""
        return self.net(planes)[-1]


class Architecture(Gan):
    """The U-Net and its discriminator, which sees mask and image."""

    options: Options
    needs_masks = True
    given_masks = True

    def __init__(self, *args: Any) -> None:
        """Build the two networks."""
        super().__init__(*args)
        self.mask_classes = len(self.description.mask_classes)
        self.planes = 1 if self.options.mask_encoding == "grey" else self.mask_classes
        channels = self.description.channels
        self.generator = MaskToImageUNet(
            self.planes, channels, self.options.channels, self.options.dropout, self.rows.size
        )
        self.discriminator = PatchCritic(channels + self.planes, self.options.channels[0])
        normal_start(self.generator)
        normal_start(self.discriminator)
        self.similarity = SSIMLoss(spatial_dims=2, data_range=2.0)
        self.prepare_networks()

    def real_planes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return images and masks."""
        return torch.cat([batch["image"], self.encoded_planes(batch["mask"])], dim=1)

    def generated_planes(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Return images generated from the masks, and the masks."""
        masks = self.encoded_planes(batch["mask"])
        return torch.cat([self.networks["generator"](masks).float(), masks], dim=1)

    def further_losses(self, generated: Tensor, real: Tensor) -> Mapping[str, Tensor]:
        """Return the weighted L1 and SSIM losses between generated and real images."""
        generated, real = generated[:, : self.description.channels], real[:, : self.description.channels]
        dissimilarity = self.similarity(generated, real)
        self._extra_metrics["ssim"] = 1 - dissimilarity.detach()
        return {
            "l1": self.options.l1_weight * functional.l1_loss(generated, real),
            "dissimilarity": self.options.ssim_weight * dissimilarity,
        }

    def samples(self, labels: Tensor, masks: Tensor | None, seed: int) -> Samples:
        """Return images of the masks; dropout, the only noise, is off here."""
        assert masks is not None
        return Samples(self.generator(self.encoded_planes(masks)), None)

    def encoded_planes(self, masks: Tensor) -> Tensor:
        """Return masks (B, H, W) as the planes that the networks see, (B, planes, H, W)."""
        return encoded_masks(masks, self.mask_classes, self.planes)
