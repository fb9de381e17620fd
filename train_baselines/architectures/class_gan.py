"""`class_gan`: class-conditional images from noise, without masks.

Mirza and Osindero, Conditional Generative Adversarial Nets (2014), with the layers and settings of
a project for dermoscopic images of nine classes: 64 x 64, noise 100, batches of 16, Adam 2e-4 with
beta1 0.5, binary cross-entropy. Its "100000 epochs at batch 16" in 8 h 45 min on a P100 can only
mean 100000 batches, the default here. Further options: self-attention (Zhang et al. 2019),
progressive growing (Karras et al. 2018), spectral norm, sizes up to 256 and above, and those of all
GANs (`train_baselines.adversarial`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from maskloom.models.class_gan import ClassGenerator, attention_level, doublings, level_widths
from maskloom.models.layers.self_attention import SelfAttention
from maskloom.pipeline.config.base import Size
from maskloom.pipeline.config.bounds import BatchSize, Channels, Steps
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.sampler import global_batch, total_steps
from maskloom.train_baselines.adversarial import GENERATOR, Gan, normal_start
from maskloom.train_baselines.architecture import Samples
from maskloom.train_baselines.from_noise import SLOPE, BatchDeviation, FromNoiseOptions


class Options(FromNoiseOptions):
    """Options of `class_gan`."""

    image_size: Size | None = Field((64, 64), description="null: the dataset's")
    train_batch_size: BatchSize = Field(16, ge=2, description="at least 2, for batch norm")
    max_train_steps: Steps = Field(100_000, ge=0)
    logging_steps: Steps = Field(100, ge=1)
    validation_steps: Steps = Field(1000, ge=1)
    checkpointing_steps: Steps = Field(5000, ge=1)
    latent_dim: Channels = Field(100, ge=1, description="length of the noise")
    base_channels: Channels = Field(64, ge=1, description="channels of the layers next to the image")
    self_attention: bool = Field(False, description="self-attention at 32 x 32, in both networks")
    growth_samples: int | None = Field(
        None,
        ge=1,
        description="progressive growing from 8 x 8: samples over which each size is faded in, and over which it is then kept; null: full size from the start",
    )

    @property
    def trains_all_weights(self) -> bool:
        """False while growing: layers of later sizes are not trained yet."""
        return self.growth_samples is None

    def check_size(self, size: tuple[int, int]) -> None:
        """See `ArchitectureOptions.check_size`."""
        doublings(size)


class Phase(NamedTuple):
    """A phase of progressive growing.

    Attributes:
        level: resolution level; 0 is 8 x 8, each level doubles both sides.
        alpha: 0..1, blending weight of this level against the one below.
    """

    level: int
    alpha: float


def phase_at(seen: int, growth_samples: int | None, last_level: int) -> Phase:
    """Return the phase after `seen` samples.

    Level 0 is held, level 1 faded in, level 1 held, and so on, each for `growth_samples`. The phase
    depends on the number of samples alone, so a resumed training continues in the same phase.
    """
    if growth_samples is None or seen >= (2 * last_level) * growth_samples:
        return Phase(last_level, 1.0)
    number, within = divmod(seen, growth_samples)
    return Phase((number + 1) // 2, within / growth_samples if number % 2 else 1.0)


class ClassCritic(nn.Module):
    """Maps images (B, channels, H, W) of any level and their classes to logits (B, 1).

    The class is an additional learnt image plane. Channels at 64 x 64: 64 at 32 x 32, 128 at 16 x
    16, 256 at 8 x 8, then a dense layer to 1; kernels of 4 with stride 2, batch norm from the
    second layer on, LeakyReLU 0.2. The levels are those of `ClassGenerator`. `norms` and `compares`
    are the options discriminator_norm and batch_deviation.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        size: tuple[int, int],
        base_channels: int,
        attends: bool,
        grows: bool,
        norms: bool = True,
        compares: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.levels = size, doublings(size)
        widths = level_widths(self.levels, base_channels)
        self.class_planes = nn.Embedding(num_classes, size[0] * size[1])
        ends = [*widths, channels + 1]
        stages = [
            _down_block(ends[level + 1], width, norm=norms and level < self.levels - 1)
            for level, width in enumerate(widths)
        ]
        if attends:
            attending = attention_level(size)
            stages[attending].append(SelfAttention(widths[attending]))
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(_head(channels + 1, width) for width in widths if grows)
        cells = (size[0] >> self.levels) * (size[1] >> self.levels)
        last = nn.Linear((widths[0] + compares) * cells, 1)
        self.last = nn.Sequential(*([BatchDeviation()] if compares else []), nn.Flatten(), last)

    def forward(self, images: Tensor, labels: Tensor, alpha: Tensor | None = None) -> Tensor:
        """Return the logits; `alpha` as in `ClassGenerator.forward`."""
        classes = self.class_planes(labels).unflatten(1, (1, *self.size))
        classes = functional.adaptive_avg_pool2d(classes, (images.shape[2], images.shape[3]))
        planes = torch.cat([images, classes.to(images.dtype)], dim=1)
        level = self.levels - (self.size[0] // images.shape[2]).bit_length() + 1
        features = planes if level == self.levels else self.heads[level](planes)
        for below in range(level - 1, -1, -1):  # stage n leads from level n + 1 to level n
            features = self.stages[below](features)
            if alpha is not None and below == level - 1:
                coarse = self.heads[below](functional.avg_pool2d(planes, 2))
                features = torch.lerp(coarse, features, alpha.to(features.dtype))
        return self.last(features)


def _down_block(before: int, after: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 4, 2, 1)]
    layers += [nn.BatchNorm2d(after)] if norm else []
    return nn.Sequential(*layers, nn.LeakyReLU(SLOPE))


def _head(planes: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(planes, width, 1), nn.LeakyReLU(SLOPE))


class Architecture(Gan):
    """The generator and the discriminator, both conditioned on the class."""

    options: Options
    needs_masks = False

    def __init__(self, *args: Any) -> None:
        """Build the two networks.

        Raises:
            MaskLoomError: the training is too short for them to grow to full size.
        """
        super().__init__(*args)
        options, channels, size = self.options, self.description.channels, self.rows.size
        self.levels = doublings(size)
        self._check_growth()
        grows = options.growth_samples is not None
        self.generator = ClassGenerator(
            self.classes,
            channels,
            options.latent_dim,
            size,
            options.base_channels,
            options.self_attention,
            grows,
            options.noise_planes,
        )
        self.noise_length = self.generator.noise_length
        self.discriminator = ClassCritic(
            channels,
            self.classes,
            size,
            options.base_channels,
            options.self_attention,
            grows,
            options.discriminator_norm,
            options.batch_deviation,
        )
        normal_start(self.generator)
        options.start(self.discriminator)
        self.prepare_networks()
        self._enter_phase(0)

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the two losses at the current size."""
        self._enter_phase(min(draws.positions))
        yield from super().losses(batch, draws)

    def real_planes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the images at the current size, blended with the size below while it fades in."""
        factor = 1 << (self.levels - self.phase.level)
        images = functional.avg_pool2d(batch["image"], factor) if factor > 1 else batch["image"]
        if self.alpha is None:
            return images
        coarse = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="nearest")
        return torch.lerp(coarse, images, self.alpha)

    def generated_planes(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Return generated images of the same classes."""
        noise = draws.normal("latent", [self.noise_length])
        return self.networks[GENERATOR](noise, batch["label"], self.phase.level, self.alpha).float()

    def discriminate(self, network: Any, planes: Tensor, labels: Tensor) -> Tensor:
        """Return the discriminator's logits for images and their classes."""
        return network(planes, labels, self.alpha)

    def samples(self, labels: Tensor, masks: Tensor | None, seed: int) -> Samples:
        """Return images of the classes, enlarged to full size while the networks are growing."""
        noise = torch.randn(len(labels), self.noise_length, generator=torch.Generator().manual_seed(seed))
        images = self.generator(noise.to(self.device), labels, self.phase.level, self.alpha)
        return Samples(functional.interpolate(images, self.rows.size, mode="nearest"), None)

    def _enter_phase(self, seen: int) -> None:
        self.phase = phase_at(seen, self.options.growth_samples, self.levels)
        self.alpha = torch.tensor(self.phase.alpha, device=self.device) if self.phase.alpha < 1 else None

    def _check_growth(self) -> None:
        options, processes = self.options, self.accelerator.num_processes
        steps = total_steps(options, len(self.rows), processes)
        seen = steps * global_batch(options, processes)
        if options.growth_samples and steps and seen <= 2 * self.levels * options.growth_samples:
            raise MaskLoomError(
                f"baselines.class_gan.growth_samples={options.growth_samples}: {self.levels} doublings take {2 * self.levels} times as many "
                f"samples, and the training ends after {seen}; give at most {max(1, (seen - 1) // (2 * self.levels))}, or train longer"
            )
