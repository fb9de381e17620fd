"""The training shared by all GANs: two networks, their losses and penalties, and balance checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from maskloom.pipeline.config.bounds import BatchSize
from maskloom.pipeline.progress import say
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.architecture import ArchitectureOptions, ArchitectureTask
from maskloom.train_baselines.diff_augment import Policy, augmented

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
R1_LOSS_SCALE = 2.0**10
"""Loss scale that keeps the small gradients of the R1 penalty within the range of fp16.

A power of two is exact in float32.
"""
WINS = 0.98
"""Accuracy, on real and on generated samples alike, above which the discriminator has won."""

GanSchedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "constant_then_linear"]


class GanOptions(ArchitectureOptions):
    """Options shared by all GANs, with the optimizer defaults of DCGAN (Radford et al. 2016)."""

    train_batch_size: BatchSize = Field(16, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    adam_beta1: float = Field(0.5, ge=0, lt=1)
    lr_scheduler: GanSchedule = "constant"
    gan_loss: Literal["bce", "hinge"] = "bce"
    r1_gamma: float = Field(0.0, ge=0, description="weight of the R1 penalty; 0: none")
    spectral_norm: bool = Field(False, description="spectral normalisation of the discriminator's layers")
    diff_augment: list[Policy] = Field(
        default_factory=list,
        description="differentiable augmentation for small datasets: [brightness, translation, cutout]",
    )

    @model_validator(mode="after")
    def _has_no_early_stopping(self) -> GanOptions:
        if self.early_stopping_patience is not None:
            raise ValueError("early_stopping_patience needs a validation loss, which a GAN does not have")
        return self

    @model_validator(mode="after")
    def _compiles_without_r1(self) -> GanOptions:
        if self.torch_compile and self.r1_gamma > 0:
            raise ValueError(
                "torch_compile cannot be combined with r1_gamma: compiled code cannot be differentiated twice"
            )
        return self


class Gan(ArchitectureTask):
    """Trains a generator against a discriminator (Goodfellow et al. 2014, arXiv:1406.2661).

    Each step updates the discriminator first, then the generator.

    Subclasses build `generator` and `discriminator` and call `prepare_networks`.
    """

    options: Any
    generator: Any
    discriminator: Any

    def prepare_networks(self) -> None:
        """Prepare the two networks for the loop."""
        if self.options.spectral_norm:
            add_spectral_norm(self.discriminator)
        self.generator, self.discriminator = self.placed(self.generator), self.placed(self.discriminator)
        self.networks = {DISCRIMINATOR: self.discriminator, GENERATOR: self.generator}
        self._extra_metrics: dict[str, Tensor] = {}
        self._accuracy: dict[str, Tensor] = {}
        self._batches = 0

    @abstractmethod
    def real_planes(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the discriminator's input for real rows, (B, planes, H, W), image planes first."""

    @abstractmethod
    def generated_planes(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Return the discriminator's input for samples generated from the same classes or masks.

        Gradients flow back to the generator.
        """

    def discriminate(self, network: Any, planes: Tensor, labels: Tensor) -> Tensor:
        """Return the discriminator's logits; class-conditional discriminators also use `labels`."""
        return network(planes)

    def further_losses(self, generated: Tensor, real: Tensor) -> Mapping[str, Tensor]:
        """Return the terms of the generator's loss besides the adversarial one, by name."""
        return {}

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the discriminator's loss, then the generator's against the new discriminator."""
        batch = self.flipped(batch, draws)
        labels, real = batch["label"], self.real_planes(batch)
        generated = self.generated_planes(batch, draws)
        yield DISCRIMINATOR, self._discriminator_loss(real, generated.detach(), labels, draws)
        with frozen(self.discriminator):
            logits = self.discriminate(self.discriminator, self._augmented(generated, draws, "generator"), labels)
        further = self.further_losses(generated, real)
        self._extra_metrics |= {key: value.detach() for key, value in further.items()}
        yield GENERATOR, generator_loss(logits, self.options.gan_loss) + sum(further.values())

    def extra_metrics(self) -> Mapping[str, Tensor]:
        """Return the discriminator's accuracy and the terms of the generator's loss."""
        return self._extra_metrics

    def validate(self, step: int) -> dict[str, float]:
        """Write previews; warn if the samples have collapsed or the discriminator has won."""
        figures = super().validate(step)
        accuracy = {key: float(total) / self._batches for key, total in self._accuracy.items()}
        if accuracy and min(accuracy.values()) > WINS:
            say(
                f"step {step}: the discriminator is right in {min(accuracy.values()):.0%} of all cases, so the generator learns little from it. "
                "Lower learning_rate, or use r1_gamma, spectral_norm or diff_augment"
            )
        self._accuracy, self._batches = {}, 0
        return figures

    def weights(self) -> Mapping[str, Any]:
        """Return the generator; the discriminator is not needed for sampling."""
        return {GENERATOR: self.generator}

    def _discriminator_loss(self, real: Tensor, generated: Tensor, labels: Tensor, draws: Draws) -> Tensor:
        network, penalised = self.networks[DISCRIMINATOR], self.options.r1_gamma > 0
        seen = self._augmented(real, draws, "discriminator").requires_grad_(penalised)
        with sdpa_kernel(SDPBackend.MATH) if penalised else nullcontext():  # the other kernels are differentiable once
            on_real = self.discriminate(network, seen, labels)
        on_generated = self.discriminate(network, self._augmented(generated, draws, "discriminator"), labels)
        self._record_accuracy(on_real, on_generated)
        loss = discriminator_loss(on_real, on_generated, self.options.gan_loss)
        if penalised:
            loss = loss + self.options.r1_gamma / 2 * r1_penalty(on_real, seen)
        return loss

    def _augmented(self, planes: Tensor, draws: Draws, purpose: str) -> Tensor:
        return augmented(planes, self.description.channels, self.options.diff_augment, draws, purpose)

    def _record_accuracy(self, on_real: Tensor, on_generated: Tensor) -> None:
        right = {"real": (on_real > 0).float().mean(), "drawn": (on_generated < 0).float().mean()}
        self._extra_metrics = {f"right/{key}": value.detach() for key, value in right.items()}
        for key, value in right.items():
            self._accuracy[key] = self._accuracy.get(key, torch.zeros_like(value)) + value.detach()
        self._batches += 1


def discriminator_loss(on_real: Tensor, on_generated: Tensor, kind: str) -> Tensor:
    """Return the mean of the losses on real and generated samples, from logits of any shape.

    Args:
        on_real: logits of real samples.
        on_generated: logits of generated samples.
        kind: `bce` (Goodfellow et al. 2014) or `hinge` (Lim and Ye, Geometric GAN, 2017).
    """
    if kind == "hinge":
        return (functional.relu(1 - on_real).mean() + functional.relu(1 + on_generated).mean()) / 2
    ones, zeros = torch.ones_like(on_real), torch.zeros_like(on_generated)
    with_logits = functional.binary_cross_entropy_with_logits
    return (with_logits(on_real, ones) + with_logits(on_generated, zeros)) / 2


def generator_loss(on_generated: Tensor, kind: str) -> Tensor:
    """Return the generator's adversarial loss: non-saturating for `bce`, linear for `hinge`."""
    if kind == "hinge":
        return -on_generated.mean()
    return functional.binary_cross_entropy_with_logits(on_generated, torch.ones_like(on_generated))


def r1_penalty(on_real: Tensor, real: Tensor) -> Tensor:
    """Return the mean squared norm of the discriminator's gradient at real samples.

    The R1 penalty without its factor gamma / 2: Mescheder et al., Which Training Methods for GANs
    do actually Converge? (2018).

    Args:
        on_real: logits computed from `real`, with the graph.
        real: (B, C, H, W), requiring gradients.
    """
    (gradient,) = torch.autograd.grad(on_real.sum() * R1_LOSS_SCALE, real, create_graph=True)
    return (gradient.float() / R1_LOSS_SCALE).square().flatten(1).sum(dim=1).mean()


def add_spectral_norm(network: nn.Module) -> None:
    """Apply spectral normalisation to every linear and convolutional layer (Miyato et al. 2018)."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            spectral_norm(layer)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Freeze a network's weights within the block; gradients still flow through it."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def normal_start(network: nn.Module) -> None:
    """Initialise the weights as DCGAN does: N(0, 0.02), batch norm N(1, 0.02), biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)
