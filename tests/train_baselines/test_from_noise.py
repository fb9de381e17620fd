"""What the GANs that draw from noise share: layers and first weights that help them to textures."""

import numpy as np
import pytest
import torch
from torch import nn

from maskloom.models.layers.doubling import Doubling, noise_length, split_noise
from maskloom.train_baselines.architectures.class_gan import ClassCritic
from maskloom.train_baselines.from_noise import BatchDeviation, FromNoiseOptions, kaiming_start

SIZES = [(2, 3), (4, 6)]


def test_a_row_of_noise_is_the_latent_vector_and_then_the_planes_of_every_size():
    row = torch.arange(5.0 + 2 * 6 + 2 * 24).expand(3, -1)
    assert noise_length(5, 2, SIZES) == row.shape[1]
    latent, maps = split_noise(row, 5, 2, SIZES)
    assert torch.equal(latent, row[:, :5])
    assert [tuple(one.shape) for one in maps if one is not None] == [(3, 2, 2, 3), (3, 2, 4, 6)]
    assert torch.equal(torch.cat([latent, *(one.flatten(1) for one in maps if one is not None)], dim=1), row)
    whole, none = split_noise(row[:, :5], 5, 0, SIZES)
    assert torch.equal(whole, row[:, :5]) and none == [None, None]


def test_a_doubling_adds_mixed_noise_before_its_norm():
    torch.manual_seed(0)
    layer = Doubling(3, 4, nn.LeakyReLU(0.2), noise_planes=2).eval()
    features, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 8, 10)
    assert layer.noise is not None
    mixed = torch.einsum("oi,bihw->bohw", layer.noise.weight[:, :, 0, 0], noise)
    expected = layer.activation(layer.norm(layer.up(features) + mixed))
    torch.testing.assert_close(layer(features, noise), expected)
    assert layer(features, noise).shape == (2, 4, 8, 10)


def test_the_plane_of_deviations_is_that_of_the_paper():
    features = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    plane = BatchDeviation()(features)
    assert torch.equal(plane[:, :3], features)
    expected = np.sqrt(features.numpy().astype(np.float64).var(axis=0) + 1e-8).mean()
    np.testing.assert_allclose(plane[:, 3].numpy(), np.full((4, 2, 5), expected), rtol=1e-6)


def test_equal_samples_leave_finite_gradients():
    features = torch.ones(3, 2, 2, 2, requires_grad=True)
    BatchDeviation()(features).sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


@pytest.mark.parametrize("norms", [True, False])
def test_signals_keep_their_size_whether_the_discriminator_has_norms_or_not(norms: bool):
    torch.manual_seed(0)
    critic = ClassCritic(1, 2, (64, 64), 32, False, False, norms)
    FromNoiseOptions(discriminator_norm=norms).start(critic)
    with torch.no_grad():
        logits = critic(torch.randn(32, 1, 64, 64), torch.zeros(32, dtype=torch.long))
        features = critic.stages[1](critic.stages[2](torch.randn(32, 2, 64, 64)))
    assert 0.3 < features.std() < 2
    assert 0.01 < logits.std() < 5


def test_the_start_without_norms_has_the_deviation_of_its_paper():
    layer = nn.Conv2d(64, 128, 4)
    kaiming_start(layer)
    assert layer.weight.std().item() == pytest.approx(np.sqrt(2 / (1 + 0.2**2) / (64 * 16)), rel=0.02)
    assert layer.bias is not None and not layer.bias.any()
