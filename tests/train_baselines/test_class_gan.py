"""The class-conditional GAN: its layers are those of its table, it grows by the number of samples
seen, and its options train.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from maskloom.models.class_gan import ClassGenerator, attention_level, doublings
from maskloom.models.layers.self_attention import SelfAttention
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.architectures.class_gan import ClassCritic, Options, Phase, phase_at
from tests.tiny_datasets import Sample, tiny_description, write_tiny_run
from tests.train_baselines.test_resume import cut_back
from tests.train_baselines.workbench import opened, tensors, trained

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 1, 2])


def generator(size: tuple[int, int] = (64, 64), **settings) -> ClassGenerator:
    torch.manual_seed(0)
    return ClassGenerator(sample_size=size, **settings)


def critic(size: tuple[int, int] = (64, 64), base: int = 64, attends: bool = False, grows: bool = False) -> ClassCritic:
    torch.manual_seed(0)
    return ClassCritic(3, 9, size, base, attends, grows)


def noise(count: int = 3, length: int = 100) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(1))


def shapes(network: torch.nn.Module, kinds: tuple[type, ...], *inputs: Tensor) -> list[tuple[int, ...]]:
    """Return the output shapes of the layers of the given kinds, without the batch, in the order in
    which they run.
    """
    found: list[tuple[int, ...]] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _given, out: found.append(tuple(out.shape[1:])))
        for layer in network.modules()
        if isinstance(layer, kinds)
    ]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return found


def _leaves(network: torch.nn.Module) -> list[torch.nn.Module]:
    layers = [layer for layer in network.modules() if not list(layer.children())]
    return [layer for layer in layers if not isinstance(layer, torch.nn.ModuleList)]  # of heads that there are not


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_generator_has_the_layers_of_the_table():
    linear_and_convolutions = (torch.nn.Linear, torch.nn.Unflatten, torch.nn.ConvTranspose2d)
    assert shapes(generator(), linear_and_convolutions, noise(), LABELS) == [
        (8 * 8 * 256,), (256, 8, 8), (128, 16, 16), (64, 32, 32), (3, 64, 64),
    ]  # fmt: skip
    kinds = [type(layer).__name__ for layer in _leaves(generator())]
    assert kinds == [
        "Embedding",
        "Linear", "BatchNorm1d", "LeakyReLU", "Unflatten",
        "ConvTranspose2d", "BatchNorm2d", "LeakyReLU",
        "ConvTranspose2d", "BatchNorm2d", "LeakyReLU",
        "ConvTranspose2d", "Tanh",
    ]  # fmt: skip
    assert {layer.negative_slope for layer in generator().modules() if isinstance(layer, torch.nn.LeakyReLU)} == {0.2}


def test_the_generator_has_the_parameters_of_the_table():
    embedding = 9 * 100
    dense = 200 * 8 * 8 * 256 + 8 * 8 * 256
    to_16 = 4 * 4 * 256 * 128 + 128
    to_32 = 4 * 4 * 128 * 64 + 64
    to_64 = 4 * 4 * 64 * 3 + 3
    norms = 2 * (8 * 8 * 256 + 128 + 64)
    assert count(generator()) == embedding + dense + to_16 + to_32 + to_64 + norms == 3_985_863


def test_the_discriminator_has_the_layers_of_the_table():
    images = torch.randn(3, 3, 64, 64)
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    assert shapes(critic(), layers, images, LABELS) == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (1,)]
    norms = [layer.num_features for layer in critic().modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert sorted(norms) == [128, 256]  # none after the first layer
    slopes = [layer.negative_slope for layer in critic().modules() if isinstance(layer, torch.nn.LeakyReLU)]
    assert slopes == [0.2] * 3


def test_the_discriminator_has_the_parameters_of_the_table():
    class_planes = 9 * 64 * 64
    to_32 = 4 * 4 * (3 + 1) * 64 + 64
    to_16 = 4 * 4 * 64 * 128 + 128
    to_8 = 4 * 4 * 128 * 256 + 256
    norms = 2 * (128 + 256)
    dense = 8 * 8 * 256 + 1
    assert count(critic()) == class_planes + to_32 + to_16 + to_8 + norms + dense == 713_921


@pytest.mark.parametrize(("side", "widest"), [(16, 64), (32, 128), (64, 256), (128, 512), (256, 1024)])
def test_each_doubling_of_the_size_puts_a_wider_layer_at_8_x_8_and_leaves_those_next_to_the_image(side, widest):
    network = generator((side, side))
    features = shapes(network, (torch.nn.Unflatten, torch.nn.ConvTranspose2d), noise(2), LABELS[:2])
    assert features[0] == (widest, 8, 8)
    assert features[-2:] == [(64, side // 2, side // 2), (3, side, side)]
    images = torch.randn(2, 3, side, side)
    assert shapes(critic((side, side)), (torch.nn.Conv2d,), images, LABELS[:2])[-1] == (widest, 8, 8)
    assert critic((side, side))(images, LABELS[:2]).shape == (2, 1)


def test_without_norms_the_discriminator_has_the_same_other_layers():
    plain = ClassCritic(3, 9, (64, 64), 64, False, False, norms=False, compares=True)
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    images = torch.randn(3, 3, 64, 64)
    assert shapes(plain, layers, images, LABELS) == shapes(critic(), layers, images, LABELS)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in plain.modules())
    assert count(plain) == 713_921 - 2 * (128 + 256) + 8 * 8  # the plane of deviations


def test_sides_may_differ_and_widths_be_scaled():
    network = generator((32, 48), base_channels=4, out_channels=1)
    assert shapes(network, (torch.nn.ConvTranspose2d,), noise(), LABELS) == [(4, 16, 24), (1, 32, 48)]
    assert critic((32, 48), 4)(torch.randn(3, 3, 32, 48), LABELS).shape == (3, 1)


def test_planes_of_noise_bring_a_feature_map_as_large_as_the_image():
    network = generator(noise_planes=2)
    kinds = (torch.nn.Unflatten, torch.nn.ConvTranspose2d, torch.nn.Conv2d)
    assert network.noise_length == 100 + 2 * (16 * 16 + 32 * 32 + 64 * 64)
    assert shapes(network, kinds, noise(length=network.noise_length), LABELS) == [
        (256, 8, 8),
        (128, 16, 16), (128, 16, 16), (64, 32, 32), (64, 32, 32), (32, 64, 64), (32, 64, 64), (3, 64, 64),
    ]  # fmt: skip
    assert generator().noise_length == 100


def test_noise_of_a_size_changes_the_image_there_and_nowhere_else():
    network = generator((32, 48), base_channels=4, noise_planes=1).eval()
    rows = noise(2, network.noise_length)
    rows[1] = rows[0]
    rows[1, -1] += 5.0  # the last pixel of the noise that is as fine as the image
    first, second = network(rows, LABELS[:1].expand(2))
    differs = (first != second).any(dim=0).nonzero()
    assert len(differs) and differs.min(dim=0).values.tolist() == [30, 46]  # a 3 x 3 convolution reaches one pixel


@pytest.mark.parametrize("size", [(8, 8), (48, 48), (64, 100), (4, 64)])
def test_a_size_that_doubling_does_not_reach_is_refused(size):
    with pytest.raises(ValueError, match="the shorter side must be 16, 32, 64"):
        doublings(size)
    with pytest.raises(ValueError, match="the shorter side must be"):
        Options().check_size(size)


def test_images_lie_between_black_and_white_and_follow_class_and_noise():
    network = generator(base_channels=4).eval()
    same = noise(1).expand(3, -1)
    images = network(same, LABELS)
    assert -1 <= images.min() < images.max() <= 1
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])
    assert not torch.equal(network(noise(2), LABELS[:1].expand(2))[0], network(noise(2), LABELS[:1].expand(2))[1])
    torch.testing.assert_close(network(same, LABELS[[0, 0, 0]])[2], images[0])


def test_the_discriminator_looks_at_the_class():
    network = critic(base=4).eval()
    logits = network(torch.randn(1, 3, 64, 64).expand(3, -1, -1, -1), LABELS)
    assert len(logits.unique()) == 3


@pytest.mark.parametrize(("side", "where"), [(16, 8), (32, 16), (64, 32), (256, 32)])
def test_attention_sits_at_32_x_32_or_at_the_largest_features_of_a_smaller_network(side, where):
    size = (side, side)
    assert 8 << attention_level(size) == where
    images = torch.randn(2, 3, side, side)
    for network, inputs in (
        (generator(size, base_channels=2, self_attention=True), (noise(2), LABELS[:2])),
        (critic(size, 2, attends=True), (images, LABELS[:2])),
    ):
        assert [shape[1:] for shape in shapes(network, (SelfAttention,), *inputs)] == [(where, where)]


def test_attention_starts_as_the_identity_and_its_gate_learns():
    torch.manual_seed(0)
    layer, features = SelfAttention(16), torch.randn(2, 16, 4, 6)
    out = layer(features)
    assert torch.equal(out, features)
    (out * features).sum().backward()
    assert layer.gate.grad.abs() > 0


def test_attention_is_that_of_the_paper():
    """Eq. 2 and 3 of Zhang et al.: s = f(x)^T g(x), softmax, o = v(sum of beta h(x)), y = gamma o +
    x; place by place.
    """
    torch.manual_seed(0)
    layer, features = SelfAttention(16), torch.randn(1, 16, 3, 5)
    torch.nn.init.constant_(layer.gate, 0.7)
    query, key, value = (part(features)[0].flatten(1) for part in (layer.query, layer.key, layer.value))
    expected = torch.empty(16, 15)
    for place in range(15):
        beta = torch.softmax(torch.stack([query[:, place] @ key[:, other] for other in range(15)]), dim=0)
        expected[:, place] = layer.out.weight[:, :, 0, 0] @ (value @ beta) + layer.out.bias
    torch.testing.assert_close(layer(features)[0].flatten(1), features[0].flatten(1) + 0.7 * expected)
    assert layer.query.out_channels == 2  # an eighth


def test_phases_follow_the_samples_seen():
    """Three doublings: 8 x 8 is held, each further size fades in for 100 samples and is held for as
    many.
    """
    starts = [phase_at(seen, 100, 3) for seen in range(0, 700, 100)]
    assert starts == [
        Phase(0, 1.0), Phase(1, 0.0), Phase(1, 1.0), Phase(2, 0.0), Phase(2, 1.0), Phase(3, 0.0), Phase(3, 1.0),
    ]  # fmt: skip
    assert phase_at(125, 100, 3) == Phase(1, 0.25)
    assert phase_at(599, 100, 3) == Phase(3, 0.99)
    assert phase_at(10**9, 100, 3) == Phase(3, 1.0)
    phases = [phase_at(seen, 37, 3) for seen in range(300)]
    assert phases == sorted(phases, key=lambda phase: phase.level)
    assert all(0 <= phase.alpha <= 1 for phase in phases)


def test_without_growth_networks_are_at_full_size_from_the_start():
    assert phase_at(0, None, 3) == Phase(3, 1.0)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_size_starts_as_the_one_below_enlarged_and_takes_over(level):
    network = generator(base_channels=4, progressive_growing=True).eval()

    def drawn(at: int, alpha: float | None = None) -> Tensor:
        return network(noise(), LABELS, at, None if alpha is None else torch.tensor(alpha))

    below = functional.interpolate(drawn(level - 1), scale_factor=2, mode="nearest")
    assert drawn(level).shape == (3, 3, 8 << level, 8 << level)
    torch.testing.assert_close(drawn(level, 0.0), below)
    torch.testing.assert_close(drawn(level, 0.25), 0.75 * below + 0.25 * drawn(level))
    torch.testing.assert_close(drawn(level, 1.0), drawn(level))
    assert not torch.allclose(drawn(level), below)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_discriminator_starts_on_a_size_as_on_the_one_below_and_takes_over(level):
    network = critic(base=4, grows=True).eval()
    with torch.no_grad():  # a plane whose pooled values are the same at each level, as images of one grey level are
        network.class_planes.weight.copy_(torch.randn(9, 1).expand(-1, 64 * 64))
    images = torch.randn(3, 3, 8 << level, 8 << level)
    below = network(functional.avg_pool2d(images, 2), LABELS)
    torch.testing.assert_close(network(images, LABELS, torch.tensor(0.0)), below)
    torch.testing.assert_close(network(images, LABELS, torch.tensor(1.0)), network(images, LABELS))
    assert not torch.allclose(network(images, LABELS), below)


def test_heads_of_lower_sizes_do_not_touch_full_size():
    small = generator(base_channels=4).eval()
    grown = generator(base_channels=4, progressive_growing=True).eval()
    missing = grown.load_state_dict(small.state_dict(), strict=False).missing_keys
    assert missing and all(key.startswith("heads.") for key in missing)
    assert torch.equal(grown(noise(), LABELS), small(noise(), LABELS))


def test_a_saved_generator_draws_the_same_at_full_size(tmp_path):
    network = generator((16, 32), base_channels=4, self_attention=True, progressive_growing=True).eval()
    network.save_pretrained(tmp_path)
    read = ClassGenerator.from_pretrained(tmp_path).eval()
    assert torch.equal(read(noise(), LABELS), network(noise(), LABELS))
    assert tuple(read.config.sample_size) == (16, 32)


def batch(architecture) -> dict[str, Tensor]:
    rows = [architecture.rows[number] for number in range(4)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def test_a_growing_architecture_learns_at_the_size_of_its_phase_and_shows_samples_at_full_size(make_run):
    architecture = opened(make_run(), "class_gan", image_size=32, growth_samples=10, max_train_steps=100)
    rows = batch(architecture)
    for seen, side in ((0, 8), (10, 16), (20, 16), (30, 32), (40, 32)):
        list(architecture.losses(rows, Draws(0, range(seen, seen + 4), CPU)))
        real, drawn = (
            architecture.real_planes(rows),
            architecture.generated_planes(rows, Draws(0, range(seen, seen + 4), CPU)),
        )
        assert real.shape == drawn.shape == (4, 1, side, side)
        if seen == 20:
            torch.testing.assert_close(real, functional.avg_pool2d(rows["image"], 2))
        assert architecture.samples(rows["label"], None, 0).images.shape == (4, 1, 32, 32)
    assert torch.equal(architecture.real_planes(rows), rows["image"])


def test_real_images_fade_in_as_drawn_ones_do(make_run):
    architecture = opened(make_run(), "class_gan", image_size=32, growth_samples=10, max_train_steps=100)
    rows = batch(architecture)
    list(architecture.losses(rows, Draws(0, range(30, 34), CPU)))  # 32 x 32 has just begun
    below = functional.avg_pool2d(rows["image"], 2)
    torch.testing.assert_close(
        architecture.real_planes(rows), functional.interpolate(below, scale_factor=2, mode="nearest")
    )


def test_growth_that_the_training_does_not_finish_is_refused(make_run):
    run = make_run()
    with pytest.raises(MaskLoomError, match=r"growth_samples=3: 2 doublings .* ends after 12; give at most 2, or"):
        opened(run, "class_gan", image_size=32, growth_samples=3)
    opened(run, "class_gan", image_size=32, growth_samples=2)
    opened(run, "class_gan", image_size=32, growth_samples=2, max_train_steps=0)  # the networks as they start


def test_only_growth_leaves_weights_without_a_gradient():
    assert Options().trains_all_weights
    assert not Options(growth_samples=10).trains_all_weights


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"self_attention": True, "r1_gamma": 1.0, "diff_augment": ["brightness", "translation", "cutout"]},
        {"spectral_norm": True, "self_attention": True, "gan_loss": "hinge", "use_ema": True},
        {"growth_samples": 2, "image_size": 32, "self_attention": True, "spectral_norm": True, "r1_gamma": 1.0},
        {"channels_last": True, "random_flip": True, "mixed_precision": "bf16", "r1_gamma": 1.0},
        {
            "noise_planes": 2,
            "discriminator_norm": False,
            "batch_deviation": True,
            "r1_gamma": 1.0,
            "image_size": 32,
            "growth_samples": 2,
        },
    ],
    ids=lambda changes: ",".join(changes) or "defaults",
)
def test_every_option_trains(make_run, changes):
    run = make_run()
    trained(run, "class_gan", **changes)
    after = tensors(run, "class_gan")
    checkpoint = load_file(next((run / "baselines/class_gan/checkpoint-4/generator").glob("*.safetensors")))
    assert after.keys() == {f"generator/{key}" for key in checkpoint}
    assert all(value.isfinite().all() for value in after.values())
    learnt = [key for key in checkpoint if not torch.equal(after[f"generator/{key}"], checkpoint[key])]
    assert "start.0.weight" in learnt and "last.0.weight" in learnt


def test_a_training_that_was_cut_off_while_it_grew_ends_with_the_same_bytes(tmp_path, make_run):
    """The checkpoint of step 2 lies in the first fade-in.

    Layers of the last size have no optimizer state yet.
    """
    options = {
        "image_size": 32, "growth_samples": 2, "self_attention": True, "noise_planes": 1, "batch_deviation": True, "checkpoints_total_limit": None
    }  # fmt: skip
    whole = make_run("whole")
    expected = trained(whole, "class_gan", **options)
    resumed = cut_back(whole, tmp_path / "resumed", "class_gan", 2)
    assert trained(resumed, "class_gan", **options) == expected


def test_masks_are_not_needed_and_classes_neither(tmp_path):
    def drop(sample: Sample) -> None:
        sample.mask, sample.label = None, None

    about = tiny_description(labels=()).model_copy(update={"mask_classes": (), "palette": ()})
    write_tiny_run(tmp_path, {}, {"train": 6, "validation": 2, "test": 2}, description=about, change=drop)
    architecture = opened(tmp_path, "class_gan")
    assert architecture.generator.config.num_classes == 1
    losses = list(architecture.losses(batch(architecture), Draws(0, range(4), CPU)))
    assert [name for name, _ in losses] == ["discriminator", "generator"]
