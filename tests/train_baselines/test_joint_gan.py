"""`joint_gan`: the published layers and counts at 256 x 256, what its discriminator sees, and a
training at full size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskloom.generate.generate import open_generators
from maskloom.generate.generator import Condition, JointGenerator
from maskloom.models.joint_gan import JointImageMaskGenerator, doublings
from maskloom.models.mask_planes import encoded_masks
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.architectures.joint_gan import Architecture, JointCritic, Options, softened
from maskloom.train_baselines.train import architecture_options as checked_options
from maskloom.train_baselines.train import train_baselines
from tests.generate.workbench import ROOT, architecture_options
from tests.tiny_datasets import tiny_description, write_tiny_run
from tests.train_baselines.workbench import IN_STEPS, tensors

MakeRun = Callable[..., Path]
LAYERS = nn.Linear | nn.Conv2d | nn.ConvTranspose2d


def layers(network: nn.Module) -> list[tuple[str, int, int, int]]:
    """Return kind, what comes in and goes out, and the kernel of every layer with weights but norms
    and embeddings, in order.
    """
    return [
        (type(m).__name__, *((m.in_features, m.out_features, 1) if isinstance(m, nn.Linear) else (m.in_channels, m.out_channels, m.kernel_size[0])))
        for m in network.modules()
        if isinstance(m, LAYERS)
    ]  # fmt: skip


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_the_generator_is_the_published_one():
    """Noise and embedding to 4 x 4 x 512, five blocks to 128 x 128 x 16, and two heads of one block
    and a 3 x 3 convolution.
    """
    network = JointImageMaskGenerator().eval()
    head = [("ConvTranspose2d", 16, 8, 4), ("Conv2d", 8, 1, 3)]
    assert layers(network) == [
        ("Linear", 200, 512 * 4 * 4, 1),
        *(("ConvTranspose2d", a, b, 4) for a, b in ((512, 256), (256, 128), (128, 64), (64, 32), (32, 16))),
        *head,
        *head,
    ]
    dense = 2 * 100 + (200 * 8192 + 8192) + 2 * 8192  # embedding, linear layer, batch norm
    trunk = sum(4 * 4 * a * b + b + 2 * b for a, b in ((512, 256), (256, 128), (128, 64), (64, 32), (32, 16)))
    heads = 2 * ((4 * 4 * 16 * 8 + 8 + 2 * 8) + (3 * 3 * 8 + 1))
    assert count(network) == dense + trunk + heads == 4_462_426
    norms = [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert norms == [8192, 256, 128, 64, 32, 16, 8, 8]
    assert [type(head.last[-1]) for head in (network.image_head, network.mask_head)] == [nn.Tanh, nn.Tanh]
    sides: list[int] = []
    for block in network.trunk:
        block.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    with torch.no_grad():
        image, mask = network(torch.zeros(1, 100), torch.tensor([1]))
    assert sides == [8, 16, 32, 64, 128]
    assert image.shape == mask.shape == (1, 1, 256, 256)


def test_the_discriminator_is_the_published_one():
    """Image, mask and class plane through five halvings to 8 x 8 x 1024, then one logit.

    Batch norm from the second on.
    """
    network = JointCritic(2, 2, 64, (256, 256)).eval()
    widths = ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1024))
    assert layers(network) == [*(("Conv2d", a, b, 4) for a, b in widths), ("Conv2d", 1024, 1, 8)]
    expected = 2 * 256 * 256 + sum(16 * a * b + b for a, b in widths) + 2 * (128 + 256 + 512 + 1024) + (64 * 1024 + 1)
    assert count(network) == expected == 11_346_625
    assert [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [128, 256, 512, 1024]
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    with torch.no_grad():
        assert network(torch.zeros(1, 2, 256, 256), torch.tensor([0])).shape == (1, 1)


def test_the_defaults_are_the_published_settings():
    found = Options().model_dump()
    expected = {
        "image_size": (256, 256), "train_batch_size": 8, "num_train_epochs": 200, "learning_rate": 2e-4, "latent_dim": 100,
        "validation_epochs": 20, "checkpointing_epochs": 20, "logging_epochs": 1, "gan_loss": "bce", "r1_gamma": 0,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


def test_the_full_configuration_says_the_defaults_and_the_published_counts():
    config = load_experiment(ROOT / "configs/joint_gan_busi_as_published.yaml", [])
    free = {"checkpoints_total_limit": None, "dataloader_num_workers": 2}
    assert checked_options(config, "joint_gan") == Options(**free)
    assert config.generate.images_per_class == {"benign": 175, "malignant": 89}
    assert tuple(config.data.image_size or ()) == (256, 256)


@pytest.mark.parametrize(
    ("size", "times", "start", "left"),
    [((256, 256), 6, (4, 4), (8, 8)), ((64, 64), 4, (4, 4), (8, 8)), ((16, 16), 2, (4, 4), (8, 8)), ((96, 128), 4, (6, 8), (12, 16)),
     ((512, 256), 6, (8, 4), (16, 8))],
)  # fmt: skip
def test_depth_follows_from_the_size(size: tuple[int, int], times: int, start: tuple[int, int], left: tuple[int, int]):
    assert doublings(size) == times
    generator, critic = JointImageMaskGenerator(3, 3, 4, 7, 16, size).eval(), JointCritic(7, 3, 4, size).eval()
    assert generator.start[1:] == start
    assert critic.net[-2].kernel_size == left
    with torch.no_grad():
        images, planes = generator(torch.zeros(2, 7), torch.tensor([0, 2]))
        assert (images.shape, planes.shape) == ((2, 3, *size), (2, 4, *size))
        assert critic(torch.cat([images, planes], 1), torch.tensor([0, 2])).shape == (2, 1)


@pytest.mark.parametrize(("size", "factor"), [([100, 128], 16), ([8, 8], 4), ([24, 12], 4), ([250, 256], 32)])
def test_sizes_that_do_not_suit_the_layers_are_told(tmp_path: Path, size: list[int], factor: int):
    write_tiny_run(tmp_path, {}, {"train": 4})
    config = tiny_config(tmp_path, image_size=size)
    told = rf"baselines\.joint_gan\.image_size=\[{size[0]}, {size[1]}\]: both sides must be multiples of {factor}, and at least 16"
    with pytest.raises(MaskLoomError, match=told):
        train_baselines(config, force=False)


def tiny_config(run: Path, **options: Any) -> Any:
    overrides = [
        f"run_dir={run}",
        "data.dataset=tiny",
        *(f"baselines.joint_gan.{key}={value}" for key, value in options.items()),
    ]
    return load_experiment(ROOT / "configs/tiny/joint_gan.yaml", overrides)


def opened(run: Path, **changes: Any) -> Architecture:
    """Return the architecture before its training, over the run's dataset."""
    from maskloom.pipeline.dataset.dataset import MaskPromptDataset
    from maskloom.pipeline.training.setup import make_accelerator
    from maskloom.train_baselines.rows import Rows

    options = Options(**{**architecture_options("joint_gan"), **changes})
    rows = Rows(MaskPromptDataset.open(run / "dataset"), "train", (32, 32), with_mask=True)
    torch.manual_seed(0)
    return Architecture(options, rows, rows, 3, make_accelerator(options, run / "logs"))


def test_the_discriminator_sees_image_mask_and_class_of_both_sides_alike(make_run: MakeRun):
    architecture = opened(make_run(), diff_augment=[], soft_edges=0)
    rows = [architecture.rows[n] for n in (0, 1)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("image", "mask", "label")}
    real = architecture.real_planes(batch)
    torch.testing.assert_close(real[:, :1], batch["image"])
    torch.testing.assert_close(real[:, 1:], encoded_masks(batch["mask"], 2, 1))
    drawn = architecture.generated_planes(batch, Draws(0, [0, 1], torch.device("cpu")))
    assert drawn.shape == real.shape
    assert drawn.requires_grad
    first, second = (
        architecture.discriminate(architecture.discriminator.eval(), real, torch.full((2,), label)) for label in (0, 1)
    )
    assert (first != second).all()
    other = architecture.generated_planes(batch, Draws(0, [2, 3], torch.device("cpu")))
    assert (other != drawn).any()


def test_each_class_and_each_noise_draws_another_pair(make_run: MakeRun):
    architecture = opened(make_run())
    architecture.generator.eval()
    with torch.no_grad():
        found = [
            architecture.samples(torch.tensor([label]), None, seed) for label, seed in ((0, 1), (1, 1), (0, 2), (0, 1))
        ]
    torch.testing.assert_close(found[0].images, found[3].images, rtol=0, atol=0)
    assert all((found[0].images != one.images).any() for one in found[1:3])
    assert found[0].masks is not None
    assert (found[0].masks.dtype, found[0].masks.shape) == (torch.uint8, (1, 32, 32))


def test_planes_of_noise_reach_the_image_at_its_finest_and_not_the_mask(make_run: MakeRun):
    network = JointImageMaskGenerator(2, 1, 1, 5, 16, (32, 48), noise_planes=3).eval()
    assert network.noise_length == 5 + 3 * (8 * 12 + 16 * 24 + 32 * 48)
    rows = torch.randn(1, network.noise_length).expand(2, -1).clone()
    rows[1, -3 * 32 * 48 :] += 1.0
    with torch.no_grad():
        images, masks = network(rows, torch.tensor([1, 1]))
    assert (images[0] != images[1]).any()
    torch.testing.assert_close(masks[0], masks[1])
    architecture = opened(make_run(), noise_planes=2, discriminator_norm=False, batch_deviation=True)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in architecture.discriminator.modules())
    assert architecture.samples(torch.tensor([0, 1]), None, 0).images.shape == (2, 1, 32, 32)


def test_it_trains_and_samples_at_full_size(tmp_path: Path):
    """256 x 256 with all channels, two steps of two rows."""
    write_tiny_run(tmp_path, {}, {"train": 4}, size=256, description=tiny_description(256))
    steps = {
        **IN_STEPS,
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "preview_images_per_class": 1,
        "learning_rate": 2e-4,
    }
    values = {"baselines": {"joint_gan": steps}, "generate": {"generators": {"joint_gan": {}}}}
    about = {"experiment": "full", "run_dir": str(tmp_path), "data": {"dataset": "tiny", "image_size": 256}}
    config = load_experiment(ROOT / "configs/tiny/dataset.yaml", []).model_validate({**about, **values})
    train_baselines(config, force=False)
    trained = tensors(tmp_path, "joint_gan")
    assert trained["generator/trunk.0.up.weight"].shape == (512, 256, 4, 4)
    generator = open_generators(config, Run(tmp_path))["joint_gan"]
    assert isinstance(generator, JointGenerator)
    generator.load(torch.device("cpu"), tiny_description(256))
    blank = np.zeros((256, 256, 3), np.uint8)
    images, masks = generator.pairs([Condition("", None, blank, label, seed=label) for label in (0, 1)])
    assert images.shape == masks.shape == (2, 256, 256)
    assert images.min() < images.max()


def test_soft_edges_run_over_so_many_pixels_and_leave_a_straight_edge_where_it_was():
    mask = torch.full((1, 1, 12, 12), -1.0)
    mask[..., 6:] = 1.0
    soft = softened(mask, 5)
    np.testing.assert_allclose(soft[0, 0, 6].numpy(), [-1, -1, -1, -1, -0.6, -0.2, 0.2, 0.6, 1, 1, 1, 1], atol=1e-6)
    assert ((soft > 0) == (mask > 0)).all()
    assert torch.equal(softened(mask, 0), mask)
    noise = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    corner = noise[1, 2, :3, :3].mean()  # of the 5 x 5 around it, what lies in the image
    assert torch.isclose(softened(noise, 5)[1, 2, 0, 0], corner)


def test_the_discriminator_sees_soft_edges_of_real_masks_alone(make_run: MakeRun):
    run = make_run()
    hard, soft = (opened(run, soft_edges=pixels) for pixels in (0, 3))
    batch = {"image": torch.zeros(1, 1, 32, 32), "mask": torch.zeros(1, 32, 32, dtype=torch.uint8)}
    batch["mask"][0, 8:20, 8:20] = 1
    planes = hard.real_planes(batch)[:, 1:]
    assert set(planes.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(soft.real_planes(batch)[:, 1:], softened(planes, 3))
