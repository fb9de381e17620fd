"""`pix2pix`: the published network's shapes and counts, its loss by hand, and images whose noise is
dropout.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from maskloom.generate.generate import open_generators
from maskloom.generate.generator import Condition
from maskloom.models.pix2pix import MaskToImageUNet
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.architectures.pix2pix import Options, PatchCritic
from maskloom.train_baselines.train import train_baselines
from tests.tiny_datasets import tiny_description, tiny_picture, write_tiny_run
from tests.train_baselines.workbench import opened, tiny_config, trained

MakeRun = Callable[..., Path]


def shapes(network: nn.Module) -> list[tuple[str, int, int, int, int]]:
    """Return kind, channels in, channels out, kernel and stride of every convolution in order."""
    return [
        (type(m).__name__, m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0])
        for m in network.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]


def test_the_generator_is_the_published_one() -> None:
    """1-64-128-256-512-512-512 down by 4 x 4 kernels of stride 2, five blocks up whose skips double
    their inputs, and the last layer.
    """
    network = MaskToImageUNet()
    assert shapes(network) == [
        *(("Conv2d", a, b, 4, 2) for a, b in ((1, 64), (64, 128), (128, 256), (256, 512), (512, 512), (512, 512))),
        *(
            ("ConvTranspose2d", a, b, 4, 2)
            for a, b in ((512, 512), (1024, 512), (1024, 256), (512, 128), (256, 64), (128, 1))
        ),
    ]
    assert sum(p.numel() for p in network.parameters()) == 29_235_585
    assert [[type(m) for m in block].count(nn.InstanceNorm2d) for block in network.down] == [0, 1, 1, 1, 1, 1]
    rates = [[m.p for m in block if isinstance(m, nn.Dropout)] for block in network.up]
    assert rates == [[0.5], [0.5], [0.5], [], []]
    slopes = {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.2}


def test_the_innermost_level_is_two_by_two_and_the_image_as_large_as_the_mask() -> None:
    network, sides = MaskToImageUNet().eval(), []
    for block in network.down:
        block.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    with torch.no_grad():
        image = network(torch.zeros(1, 1, 128, 128))
    assert sides == [64, 32, 16, 8, 4, 2]
    assert image.shape == (1, 1, 128, 128)
    assert float(image.abs().max()) <= 1


def test_the_critic_is_the_published_one() -> None:
    """2-64-128-256-512-1: three layers of stride 2, two of stride 1; it judges patches."""
    critic = PatchCritic(2, 64)
    expected = [(2, 64, 2), (64, 128, 2), (128, 256, 2), (256, 512, 1), (512, 1, 1)]
    assert shapes(critic) == [("Conv2d", a, b, 4, stride) for a, b, stride in expected]
    assert sum(p.numel() for p in critic.parameters()) == 2_763_713
    assert {m.negative_slope for m in critic.modules() if isinstance(m, nn.LeakyReLU)} == {0.2}
    assert critic(torch.zeros(1, 2, 128, 128)).shape == (1, 1, 14, 14)


def test_the_defaults_are_the_published_settings() -> None:
    found = Options().model_dump()
    expected = {
        "train_batch_size": 64, "num_train_epochs": 200, "learning_rate": 2e-4, "adam_beta1": 0.5, "adam_beta2": 0.999, "l1_weight": 100,
        "ssim_weight": 5, "lr_scheduler": "constant_then_linear", "lr_decay_start": 0.5, "logging_epochs": 1, "validation_epochs": 10,
        "checkpointing_epochs": 10, "gan_loss": "bce", "adam_weight_decay": 0,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


def test_ssim_is_scikit_images(make_run: MakeRun) -> None:
    architecture = opened(make_run(), "pix2pix")
    one, two = (tiny_picture(n, 32, n, seed=4)[0].astype(np.float32) / 127.5 - 1 for n in (0, 1))
    found = 1 - float(architecture.similarity(torch.from_numpy(one)[None, None], torch.from_numpy(two)[None, None]))
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2.0}
    assert found == pytest.approx(structural_similarity(one, two, **how), abs=1e-4)


@pytest.mark.parametrize("weights", [(100.0, 5.0), (10.0, 0.0), (0.0, 1.0)])
def test_the_losses_are_those_of_the_paper_with_ssim(make_run: MakeRun, weights: tuple[float, float]) -> None:
    """L_G = BCE(D(mask, drawn), 1) + a |drawn - real| + b (1 - SSIM).

    L_D = (BCE(real, 1) + BCE(drawn, 0)) / 2.
    """
    architecture = opened(make_run(), "pix2pix", l1_weight=weights[0], ssim_weight=weights[1], dropout=0)
    rows = [architecture.rows[n] for n in (0, 1)]
    image = torch.stack([row["image"] for row in rows])
    mask = torch.stack([row["mask"] for row in rows])
    batch = {"image": image, "mask": mask, "label": torch.tensor([0, 1])}
    found = {
        name: float(loss.detach()) for name, loss in architecture.losses(batch, Draws(0, [0, 1], torch.device("cpu")))
    }
    grey = mask[:, None].float() * 2 - 1  # background -1, lesion 1
    with torch.no_grad():
        drawn = architecture.generator(grey)
        on_drawn = architecture.discriminator(torch.cat([drawn, grey], 1)).numpy()
        on_real = architecture.discriminator(torch.cat([image, grey], 1)).numpy()
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2.0}
    similar = np.mean(
        [structural_similarity(d[0].numpy(), r[0].numpy(), **how) for d, r in zip(drawn, image, strict=True)]
    )
    l1 = float((drawn - image).abs().mean())
    assert found["discriminator"] == pytest.approx(
        (np.log1p(np.exp(-on_real)).mean() + np.log1p(np.exp(on_drawn)).mean()) / 2, rel=1e-4
    )
    expected = np.log1p(np.exp(-on_drawn)).mean() + weights[0] * l1 + weights[1] * (1 - similar)
    assert found["generator"] == pytest.approx(expected, rel=1e-3)
    notes = {key: float(value) for key, value in architecture.extra_metrics().items()}
    assert notes["ssim"] == pytest.approx(similar, abs=1e-3)
    assert notes["l1"] == pytest.approx(weights[0] * l1, rel=1e-4)


def test_masks_may_be_given_a_plane_a_class(make_run: MakeRun) -> None:
    architecture = opened(make_run(), "pix2pix", mask_encoding="one_hot")
    mask = architecture.rows[0]["mask"][None]
    planes = architecture.encoded_planes(mask)
    assert planes.shape == (1, 2, 32, 32)
    assert torch.equal(planes[:, 1] > 0, mask == 1)
    assert torch.equal(planes[:, 0], -planes[:, 1])
    assert (architecture.generator.config.in_channels, architecture.discriminator.net[0].conv.in_channels) == (2, 3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, r"baselines\.pix2pix\.image_size=\[32, 32\] \(the dataset's\): both sides must be multiples of 64 for 6 levels, and at least 128"),
        ({"image_size": [128, 96]}, r"baselines\.pix2pix\.image_size=\[128, 96\]: both sides must be multiples of 64 for 6 levels"),
        ({"channels": [4, 8, 8, 8, 8]}, r"image_size=\[32, 32\] \(the dataset's\): .* multiples of 32 for 5 levels, and at least 64; change it"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_suit_the_levels_are_told(make_run: MakeRun, changes: dict[str, Any], told: str) -> None:
    config = tiny_config(make_run(), {"pix2pix": {"channels": [4, 8, 8, 8, 8, 8], **changes}})
    with pytest.raises(MaskLoomError, match=told):
        train_baselines(config, force=False)


def conditions(seeds: list[int], side: int = 32) -> list[Condition]:
    """Return conditions of one mask."""
    mask = np.zeros((side, side), np.uint8)
    mask[side // 4 : side // 2, side // 4 : side // 2] = 1
    return [Condition("a disc", mask, np.repeat(mask[..., None] * 255, 3, 2), 0, seed) for seed in seeds]


def generator(run: Path, **options: Any) -> Any:
    config = tiny_config(run, {"pix2pix": {}}, generate={"generators": {"pix2pix": options}})
    found = open_generators(config, Run(run))["pix2pix"]
    found.check()
    found.load(torch.device("cpu"), tiny_description())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run whose pix2pix has trained for six steps."""
    run = tmp_path_factory.mktemp("finished")
    (run / "dataset").symlink_to(dataset)
    trained(run, "pix2pix", channels=[8, 16, 32, 64])
    return run


def test_dropout_by_the_images_seed_makes_different_images_of_one_mask(finished: Path) -> None:
    noisy = generator(finished)
    images = noisy.images(conditions([1, 2, 1]))
    assert images.shape == (3, 32, 32)
    assert (images[0] != images[1]).mean() > 0.5
    np.testing.assert_array_equal(images[0], images[2])
    alone = noisy.images(conditions([2]))
    np.testing.assert_allclose(alone[0], images[1], atol=1e-5)  # whatever else is in the batch


def test_without_dropout_one_mask_gives_one_image(finished: Path) -> None:
    images = generator(finished, dropout_noise=False).images(conditions([1, 2]))
    np.testing.assert_array_equal(images[0], images[1])


def test_the_dropout_is_that_of_the_training(finished: Path) -> None:
    """The same share is blanked, and what is left weighs as much more, as in `nn.Dropout`."""
    noisy = generator(finished)
    noisy.noise = [torch.Generator().manual_seed(seed) for seed in range(4)]
    layer = next(m for m in noisy.network.modules() if isinstance(m, nn.Dropout))
    found = noisy._dropped(layer, (), torch.ones(4, 64, 16, 16))
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert float(found.mean()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(found[0], found[1])


def test_the_published_size_trains_and_draws(tmp_path: Path) -> None:
    """128 x 128 and all six levels, for two steps."""
    write_tiny_run(tmp_path, {}, {"train": 4, "validation": 2, "test": 2}, size=128)
    changes = {
        "channels": (64, 128, 256, 512, 512, 512),
        "max_train_steps": 2,
        "validation_steps": 2,
        "checkpointing_steps": 2,
    }
    config = tiny_config(tmp_path, {"pix2pix": changes}, data={"dataset": "tiny", "image_size": 128})
    train_baselines(config, force=False)
    found = open_generators(config, Run(tmp_path))["pix2pix"]
    found.load(torch.device("cpu"), tiny_description(128))
    images = found.images(conditions([1, 2], 128))
    assert images.shape == (2, 128, 128)
    assert np.isfinite(images).all()
    assert sum(p.numel() for p in found.network.parameters()) == 29_235_585
