"""Losses, penalties and warnings that all GANs share, against plain formulas and MONAI."""

import math

import pytest
import torch
from accelerate import Accelerator
from monai.losses.adversarial_loss import PatchAdversarialLoss
from pydantic import ValidationError
from torch import Tensor, nn

from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.adversarial import (
    WINS,
    GanOptions,
    add_spectral_norm,
    discriminator_loss,
    frozen,
    generator_loss,
    normal_start,
    r1_penalty,
)
from tests.train_baselines.toys import ToyOptions, made

CPU = torch.device("cpu")
REAL = [2.0, -0.5, 0.3]
DRAWN = [-1.5, 0.4, 3.0]


def logits(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_the_losses_are_those_of_the_papers():
    """Non-saturating cross-entropy is softplus of the logits (Goodfellow et al. 2014).

    The hinge loss is that of Lim and Ye (2017).
    """
    both = [softplus(-r) for r in REAL] + [softplus(d) for d in DRAWN]
    assert float(discriminator_loss(logits(REAL), logits(DRAWN), "bce")) == pytest.approx(sum(both) / 6)
    assert float(generator_loss(logits(DRAWN), "bce")) == pytest.approx(sum(softplus(-d) for d in DRAWN) / 3)
    both = [max(0, 1 - r) for r in REAL] + [max(0, 1 + d) for d in DRAWN]
    assert float(discriminator_loss(logits(REAL), logits(DRAWN), "hinge")) == pytest.approx(sum(both) / 6)
    assert float(generator_loss(logits(DRAWN), "hinge")) == pytest.approx(-sum(DRAWN) / 3)


def test_the_losses_are_monais():
    bce, hinge = PatchAdversarialLoss(criterion="bce"), PatchAdversarialLoss(criterion="hinge")
    real, drawn = torch.randn(2, 4, 1, 5, 5, generator=torch.Generator().manual_seed(0))

    def of_both(loss: PatchAdversarialLoss) -> Tensor:
        on_real = loss(real, target_is_real=True, for_discriminator=True)
        return (on_real + loss(drawn, target_is_real=False, for_discriminator=True)) / 2

    # MONAI bounds the logits of its hinge loss by tanh first, and its generator's loss is larger
    # by 1.
    torch.testing.assert_close(discriminator_loss(real.tanh(), drawn.tanh(), "hinge"), of_both(hinge))
    of_generator = hinge(drawn, target_is_real=True, for_discriminator=False)
    torch.testing.assert_close(1 + generator_loss(drawn.tanh(), "hinge"), of_generator)
    # It takes the cross-entropy of probabilities, which is the same but for rounding.
    torch.testing.assert_close(discriminator_loss(real, drawn, "bce"), of_both(bce), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        generator_loss(drawn, "bce"), bce(drawn, target_is_real=True, for_discriminator=False), rtol=1e-4, atol=1e-5
    )


def critic(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 4, 2, 1), nn.Tanh())


def test_r1_is_the_mean_squared_gradient_norm_of_samples_taken_one_by_one():
    network, real = critic(), torch.randn(3, 2, 8, 8)
    norms = []
    for sample in real:
        seen = sample[None].clone().requires_grad_()
        network(seen).sum().backward()
        norms.append(float(seen.grad.square().sum()))
    seen = real.clone().requires_grad_()
    assert r1_penalty(network(seen), seen).item() == pytest.approx(sum(norms) / 3, rel=1e-5)


def test_the_gradient_of_r1_reaches_the_weights():
    """For a linear critic w . x the penalty is |w| ** 2, and its gradient 2 w."""
    network = nn.Conv2d(1, 1, 4, bias=False)
    seen = torch.randn(5, 1, 4, 4, requires_grad=True)
    penalty = r1_penalty(network(seen), seen)
    penalty.backward()
    assert penalty.item() == pytest.approx(network.weight.square().sum().item(), rel=1e-5)
    torch.testing.assert_close(network.weight.grad, 2 * network.weight.detach())


def test_r1_survives_gradients_that_half_precision_would_lose():
    """Without the factor each pixel's gradient, 1e-8, becomes 0 where fp16 carries it back."""
    seen = torch.randn(2, 1, 4, 4, requires_grad=True)
    on_real = (seen.half().flatten(1) @ torch.full((16, 1), 1e-4).half()).float() * 1e-4
    assert r1_penalty(on_real, seen).item() == pytest.approx(16 * 1e-16, rel=0.05)


def test_the_discriminators_loss_has_half_of_gamma_times_r1(tmp_path):
    architecture = made(tmp_path, r1_gamma=6.0, sharpness=0.5)
    plain, penalised = (first_loss(architecture, gamma) for gamma in (0.0, 6.0))
    # The gauge's gradient is sharpness / pixels at every pixel.
    assert penalised - plain == pytest.approx(3 * 32 * 32 * (0.5 / 32**2) ** 2, rel=1e-3)


def first_loss(architecture, gamma: float) -> float:
    architecture.options = architecture.options.model_copy(update={"r1_gamma": gamma})
    name, loss = next(architecture.losses(batch(architecture), Draws(0, range(4), CPU)))
    assert name == "discriminator"
    return loss.item()


def batch(architecture) -> dict[str, Tensor]:
    rows = [architecture.rows[number] for number in range(4)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_the_generators_loss_leaves_no_gradients_on_the_discriminator_and_the_discriminators_none_on_the_generator(
    tmp_path,
):
    architecture = made(tmp_path, diff_augment=["brightness", "translation", "cutout"])
    losses = architecture.losses(batch(architecture), Draws(0, range(4), CPU))
    next(losses)[1].backward()
    assert architecture.generator.variety.grad is None
    assert architecture.discriminator.sharpness.grad is not None
    architecture.discriminator.zero_grad()
    name, loss = next(losses)
    loss.backward()
    assert name == "generator"
    assert architecture.discriminator.sharpness.grad is None
    assert architecture.generator.variety.grad.abs() > 0


def test_a_frozen_network_lets_gradients_pass_and_learns_again_after_the_block_even_if_that_fails():
    network, samples = critic(), torch.randn(1, 2, 8, 8, requires_grad=True)
    with frozen(network):
        network(samples).sum().backward()
    assert samples.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    with pytest.raises(KeyError), frozen(network):
        raise KeyError
    assert all(p.requires_grad for p in network.parameters())


def test_spectral_norm_holds_the_largest_singular_value_of_every_layer_at_one_while_weights_grow():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 4), nn.ConvTranspose2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 25, 1))
    add_spectral_norm(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (-network(torch.randn(4, 3, 6, 6)).square().mean()).backward()
        optimizer.step()
    for layer in (network[0], network[1], network[3]):
        dimension = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        matrix = layer.weight.detach().movedim(dimension, 0).flatten(1)
        assert float(torch.linalg.svdvals(matrix)[0]) == pytest.approx(1, abs=0.05)
        original = layer.parametrizations.weight.original.detach()
        assert float(torch.linalg.svdvals(original.movedim(dimension, 0).flatten(1))[0]) > 0


def test_weights_start_as_dcgans_do():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(50, 400),
        nn.BatchNorm1d(400),
        nn.Conv2d(20, 20, 5),
        nn.ConvTranspose2d(20, 20, 5),
        nn.BatchNorm2d(900),
    )
    normal_start(network)
    for layer, centre in zip(network, (0, 1, 0, 0, 1), strict=True):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert layer.weight.mean().item() == pytest.approx(centre, abs=0.003)
        assert not layer.bias.any()


def warnings_of(architecture, capsys) -> str:
    for number in range(3):
        for _, _loss in architecture.losses(batch(architecture), Draws(0, range(4 * number, 4 * number + 4), CPU)):
            pass
    capsys.readouterr()
    architecture.validate(5)
    return capsys.readouterr().err


def test_a_discriminator_that_is_always_right_is_warned_of(tmp_path, capsys):
    """The painter draws black, and the gauge takes for real whatever is brighter."""
    architecture = made(tmp_path, variety=0.0, sharpness=3.0)
    told = warnings_of(architecture, capsys)
    assert "step 5: the discriminator is right in 100% of all cases" in told
    assert "r1_gamma" in told
    assert {float(architecture.extra_metrics()[f"right/{side}"]) for side in ("real", "drawn")} == {1.0}


@pytest.mark.parametrize(("variety", "sharpness"), [(0.0, 0.0), (0.0, -3.0), (10.0, 3.0)])
def test_one_that_cannot_tell_or_is_fooled_is_not(tmp_path, capsys, variety, sharpness):
    architecture = made(tmp_path, variety=variety, sharpness=sharpness)
    assert "the discriminator is right" not in warnings_of(architecture, capsys)
    assert min(float(architecture.extra_metrics()[f"right/{side}"]) for side in ("real", "drawn")) < WINS


def test_a_warning_speaks_of_the_steps_since_the_last_one(tmp_path, capsys):
    architecture = made(tmp_path, variety=0.0, sharpness=3.0)
    assert "the discriminator is right" in warnings_of(architecture, capsys)
    architecture.validate(6)
    assert "the discriminator is right" not in capsys.readouterr().err
    with torch.no_grad():
        architecture.discriminator.sharpness.zero_()
    assert "the discriminator is right" not in warnings_of(architecture, capsys)


@pytest.mark.parametrize("kind", ["bce", "hinge"])
def test_the_two_networks_learn_against_each_other_in_the_loop(tmp_path, kind):
    """The painter learns to show its noise, for brightness is what the gauge takes for real."""
    architecture = made(tmp_path, variety=0.1, sharpness=1.0, gan_loss=kind, max_train_steps=5, learning_rate=0.01)
    before = [w.item() for w in (architecture.generator.variety, architecture.discriminator.sharpness)]
    accelerator: Accelerator = architecture.accelerator
    TrainingLoop(architecture, architecture.options, accelerator, tmp_path / "checkpoints", 0, {}).run()
    after = [w.item() for w in (architecture.generator.variety, architecture.discriminator.sharpness)]
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert (architecture.preview_folder / "step-0000005.png").is_file()


def test_half_of_the_rows_are_mirrored_where_asked(tmp_path):
    architecture = made(tmp_path, random_flip=True)
    rows = batch(architecture)
    flipped = architecture.flipped(rows, Draws(0, range(4), CPU))["image"]
    kinds = [
        "mirrored" if torch.equal(new, old.flip(-1)) else "same" if torch.equal(new, old) else "other"
        for new, old in zip(flipped, rows["image"], strict=True)
    ]
    assert set(kinds) == {"mirrored", "same"}


def test_what_a_gan_cannot_do_is_refused():
    with pytest.raises(ValidationError, match="early_stopping_patience needs a validation loss"):
        GanOptions(early_stopping_patience=3)
    with pytest.raises(ValidationError, match="torch_compile cannot be combined with r1_gamma"):
        GanOptions(torch_compile=True, r1_gamma=1.0)
    assert ToyOptions(torch_compile=True).torch_compile
