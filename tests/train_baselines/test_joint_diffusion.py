"""`joint_diffusion`: a plain DDPM by hand, guidance, sampling with nothing but diffusers, early
stopping.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from maskloom.generate.generate import open_generators
from maskloom.generate.generator import Condition
from maskloom.models.joint_diffusion import guided, sampled
from maskloom.pipeline.config.generate import SchedulerName
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.architectures.joint_diffusion import Options, denoiser, noise_schedule
from maskloom.train_baselines.train import train_baselines
from tests.tiny_datasets import tiny_description, write_tiny_run
from tests.train_baselines.workbench import COUNTS, TINY, opened, tiny_config, trained

MakeRun = Callable[..., Path]
CPU = torch.device("cpu")
NO_CLASS = 2


def batch_of(architecture: Any, count: int = 2) -> dict[str, Tensor]:
    rows = [architecture.rows[n % len(architecture.rows)] for n in range(count)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def calls_of(network: Any) -> list[dict[str, Tensor]]:
    """Return what a network is called with from now on."""
    calls: list[dict[str, Tensor]] = []

    def see(module: Any, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        calls.append({**dict(zip(("noisy", "timesteps", "tokens"), inputs, strict=True)), **named})

    network.register_forward_pre_hook(see, with_kwargs=True)
    return calls


def test_the_defaults_are_the_published_settings() -> None:
    found = Options().model_dump()
    expected = {
        "train_batch_size": 8, "num_train_epochs": 100, "learning_rate": 1e-4, "lr_scheduler": "cosine", "model_channels": 128,
        "transformer_depth": 6, "num_heads": 8, "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    betas = noise_schedule(Options()).betas
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000))


def test_transformers_of_the_published_depth_stand_at_32_and_16() -> None:
    with torch.device("meta"):
        network = denoiser(Options(), 2, 2, (256, 256))
    places = [hasattr(block, "attentions") for block in network.down_blocks]
    assert places == [False, False, False, True, True]  # of 256, 128, 64, 32, 16
    assert [hasattr(block, "attentions") for block in network.up_blocks] == places[::-1]
    transformers = [
        t for block in (*network.down_blocks[3:], network.mid_block, *network.up_blocks[:2]) for t in block.attentions
    ]
    assert len(transformers) == 2 + 2 + 1 + 3 + 3
    assert {len(t.transformer_blocks) for t in transformers} == {6}
    assert {b.attn1.heads for t in transformers for b in t.transformer_blocks} == {8}
    assert network.config.num_class_embeds == network.config.cross_attention_dim == 2 + 1
    assert sum(p.numel() for p in network.parameters()) == 116_505_602


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_a_plain_ddpm(make_run: MakeRun, prediction_type: str) -> None:
    """Ho et al. 2020, equation 14, on images and masks side by side, or with the velocity of
    Salimans and Ho 2022 as target.
    """
    architecture = opened(make_run(), "joint_diffusion", prediction_type=prediction_type)
    calls = calls_of(architecture.unet)
    batch, draws = batch_of(architecture, 4), Draws(0, range(4), CPU)
    ((name, loss),) = architecture.losses(batch, draws)
    assert name == "unet"
    clean = np.stack([batch["image"][:, 0].numpy(), batch["mask"].numpy() * 2.0 - 1], axis=1)
    timesteps = draws.integers("timestep", 1000).numpy()
    noise = draws.normal("noise", (2, 32, 32)).numpy()
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timesteps].reshape(-1, 1, 1, 1)
    noisy = np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise
    target = noise if prediction_type == "epsilon" else np.sqrt(kept) * noise - np.sqrt(1 - kept) * clean
    (call,) = calls
    np.testing.assert_array_equal(call["timesteps"], timesteps)
    np.testing.assert_allclose(call["noisy"], noisy, atol=1e-4)
    with torch.no_grad():
        found = architecture.unet(
            call["noisy"], call["timesteps"], call["tokens"], class_labels=call["class_labels"]
        ).sample
    assert float(loss.detach()) == pytest.approx(float(((found.numpy() - target) ** 2).mean()), rel=1e-4)


def test_a_share_of_the_samples_is_trained_on_without_its_class(make_run: MakeRun) -> None:
    architecture = opened(make_run(), "joint_diffusion", class_dropout=0.25, image_size=[4, 4])
    calls, count = calls_of(architecture.unet), 400
    batch = batch_of(architecture, count)
    with torch.no_grad():
        list(architecture.losses(batch, Draws(0, range(count), CPU)))
    (call,) = calls
    dropped = call["class_labels"] == NO_CLASS
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.06)
    assert torch.equal(call["class_labels"][~dropped], batch["label"][~dropped])
    assert torch.equal(call["tokens"][:, 0].argmax(-1), call["class_labels"])
    assert call["tokens"].shape == (count, 1, NO_CLASS + 1)
    assert torch.equal(call["tokens"].sum(-1), torch.ones(count, 1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A run whose joint diffusion has trained for some steps."""
    run = tmp_path_factory.mktemp("finished")
    (run / "dataset").symlink_to(dataset)
    trained(run, "joint_diffusion", max_train_steps=20, learning_rate=3e-3, validation_steps=20, checkpointing_steps=20)
    return run


def unet_of(run: Path) -> Any:
    folder = run / "baselines" / "joint_diffusion" / "weights" / "unet"
    return UNet2DConditionModel.from_pretrained(folder, local_files_only=True).eval()


def test_guidance_of_0_and_1_is_no_class_and_the_class(finished: Path) -> None:
    unet, planes, labels = unet_of(finished), torch.randn(2, 2, 32, 32), torch.tensor([0, 1])
    timestep = torch.tensor(600)

    def predicted(classes: Tensor) -> Tensor:
        tokens = torch.eye(3)[classes][:, None]
        return unet(planes, timestep, tokens, class_labels=classes).sample

    with torch.no_grad():
        with_class, without = predicted(labels), predicted(torch.full_like(labels, NO_CLASS))
        assert float((with_class - without).abs().max()) > 1e-3
        torch.testing.assert_close(guided(unet, planes, timestep, labels, 1), with_class)
        torch.testing.assert_close(guided(unet, planes, timestep, labels, 0), without, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            guided(unet, planes, timestep, labels, 3), without + 3 * (with_class - without), atol=1e-5, rtol=1e-4
        )
        calls = calls_of(unet)
        guided(unet, planes, timestep, labels, 1)
        guided(unet, planes, timestep, labels, 2)
    assert [len(call["noisy"]) for call in calls] == [2, 4]


def condition(label: int | None, seed: int) -> Condition:
    return Condition("", None, np.zeros((32, 32, 3), np.uint8), label, seed)


def generator(run: Path, size: int = 32, **generate: Any) -> Any:
    settings = {"generators": {"joint_diffusion": {}}, "num_inference_steps": 4, **generate}
    found = open_generators(tiny_config(run, {"joint_diffusion": {}}, generate=settings), Run(run))["joint_diffusion"]
    found.check()
    found.load(CPU, tiny_description(size))
    return found


@pytest.mark.parametrize("solver", get_args(SchedulerName))
def test_pairs_follow_the_seed_and_the_class_and_not_the_batch(finished: Path, solver: str) -> None:
    found = generator(finished, scheduler=solver)
    images, masks = found.pairs([condition(0, 1), condition(0, 2), condition(1, 1)])
    assert (images.shape, images.dtype) == ((3, 32, 32), np.float32)
    assert (masks.shape, masks.dtype) == ((3, 32, 32), np.uint8)
    assert set(np.unique(masks)) <= {0, 1}
    assert 0 <= images.min() < images.max() <= 1
    again = found.pairs([condition(0, 1), condition(0, 2), condition(1, 1)])
    np.testing.assert_array_equal(images, again[0])
    np.testing.assert_array_equal(masks, again[1])
    np.testing.assert_allclose(found.pairs([condition(1, 1)])[0][0], images[2], atol=1e-4)
    assert (images[0] != images[1]).mean() > 0.2
    assert (images[0] != images[2]).mean() > 0.2
    np.testing.assert_array_equal(found.images([condition(0, 1)]), found.pairs([condition(0, 1)])[0])


def test_nothing_but_diffusers_draws_the_same_pictures(finished: Path) -> None:
    """DDIM with guidance by hand, from the exported folders."""
    folder = finished / "baselines" / "joint_diffusion" / "weights"
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDPMScheduler"
    assert DDPMScheduler.from_pretrained(folder / "scheduler").config.beta_end == 0.02
    unet, scheduler = unet_of(finished), DDIMScheduler.from_pretrained(folder / "scheduler")
    planes = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(11))[None]
    scheduler.set_timesteps(4)
    assert int(scheduler.timesteps[0]) == 999  # full noise, which samples start from
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            one, none = (
                unet(planes, timestep, torch.eye(3)[[label]][None], class_labels=torch.tensor([label])).sample
                for label in (1, 2)
            )
            planes = scheduler.step(none + 1.5 * (one - none), timestep, planes).prev_sample
    images, masks = generator(finished, scheduler="ddim").pairs([condition(1, 11)])
    np.testing.assert_allclose(images[0], (planes[0, 0].clamp(-1, 1) + 1) / 2, atol=1e-4)
    assert (masks[0] == (planes[0, 1] > 0).numpy()).mean() > 0.999


def test_pairs_are_brought_to_the_datasets_size(finished: Path) -> None:
    images, masks = generator(finished, size=48).pairs([condition(0, 1)])
    assert images.shape == masks.shape == (1, 48, 48)


def test_patches_are_folded_into_channels_and_back(make_run: MakeRun) -> None:
    run = make_run()
    plain, folded = (opened(run, "joint_diffusion", patch_size=patch) for patch in (1, 2))
    batch = batch_of(plain)
    assert folded._planes(batch).shape == (2, 8, 16, 16)
    assert torch.equal(torch.nn.functional.pixel_shuffle(folded._planes(batch), 2), plain._planes(batch))
    assert folded.unet.config.sample_size == (16, 16)
    trained(run, "joint_diffusion", patch_size=2, max_train_steps=2)
    images, masks = generator(run).pairs([condition(0, 1), condition(1, 2)])
    assert images.shape == masks.shape == (2, 32, 32)


def test_half_precision_draws_nearly_the_same(finished: Path) -> None:
    full, half = (generator(finished, mixed_precision=kind).pairs([condition(0, 1)])[0] for kind in ("no", "bf16"))
    assert 0 < np.abs(full - half).mean() < 0.02


def test_samples_start_from_the_noise_that_they_are_given(finished: Path) -> None:
    unet, scheduler, labels = (
        unet_of(finished),
        DDIMScheduler.from_config(noise_schedule(Options()).config),
        torch.tensor([0]),
    )
    noise = torch.randn(1, 2, 32, 32)
    with torch.no_grad():
        first, same, other = (sampled(unet, scheduler, start, labels, 3, 1) for start in (noise, noise, -noise))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)


def test_the_held_out_loss_is_the_mean_over_spread_timesteps(make_run: MakeRun) -> None:
    architecture = opened(make_run(), "joint_diffusion")
    figures = architecture.validate(0)
    count = COUNTS["validation"]
    timesteps = torch.tensor([83, 250, 416, 583, 750, 916])  # middles of sixths of a thousand
    rows = [architecture.previews[n] for n in range(count)]
    clean = torch.stack([torch.cat([row["image"], row["mask"][None] * 2.0 - 1]) for row in rows])
    noise = Draws(3, range(count), CPU).normal("validation noise", (2, 32, 32))
    labels = torch.tensor([int(row["label"]) for row in rows])
    noisy = DDPMScheduler(beta_start=1e-4, beta_end=0.02).add_noise(clean, noise, timesteps)
    with torch.no_grad():
        found = architecture.unet(noisy, timesteps, torch.eye(3)[labels][:, None], class_labels=labels).sample
    assert figures["loss"] == pytest.approx(float((found - noise).square().mean()), rel=1e-4)
    assert figures == architecture.validate(1)
    assert architecture.unet.training


def test_early_stopping_waits_for_the_held_out_loss(make_run: MakeRun) -> None:
    run = make_run()
    trained(
        run,
        "joint_diffusion",
        early_stopping_patience=1,
        validation_steps=1,
        learning_rate=0.5,
        use_ema=False,
        max_train_steps=30,
    )
    rows = [
        json.loads(line)
        for line in (run / "logs" / "baselines" / "joint_diffusion" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["validation/loss"] for row in rows if "validation/loss" in row]
    assert len(losses) < 30
    assert losses[-1] >= min(losses[:-1])


def test_without_a_validation_split_there_is_no_held_out_loss(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 8, "test": 2})
    assert trained(tmp_path, "joint_diffusion", max_train_steps=2)
    config = tiny_config(tmp_path, {"joint_diffusion": {"max_train_steps": 2, "early_stopping_patience": 1}})
    with pytest.raises(MaskLoomError, match="early_stopping_patience needs a validation split"):
        train_baselines(config, force=True)


def test_a_dataset_without_labels_is_one_class(tmp_path: Path) -> None:
    write_tiny_run(
        tmp_path,
        {},
        COUNTS,
        description=tiny_description(labels=()),
        change=lambda sample: setattr(sample, "label", None),
    )
    trained(tmp_path, "joint_diffusion", max_train_steps=2)
    assert unet_of(tmp_path).config.num_class_embeds == 2
    settings = {"generators": {"joint_diffusion": {"guidance_scale": 2.0}}, "num_inference_steps": 2}
    found = open_generators(tiny_config(tmp_path, {"joint_diffusion": {}}, generate=settings), Run(tmp_path))[
        "joint_diffusion"
    ]
    found.load(CPU, tiny_description(labels=()))
    images, _ = found.pairs([condition(None, 1)])
    assert images.shape == (1, 32, 32)


def test_recomputed_activations_change_no_gradient(make_run: MakeRun) -> None:
    gradients = []
    for name, recomputed in (("plain", False), ("recomputed", True)):
        architecture = opened(make_run(name), "joint_diffusion", gradient_checkpointing=recomputed)
        ((_, loss),) = architecture.losses(batch_of(architecture), Draws(0, [0, 1], CPU))
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in architecture.unet.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_a_size_that_does_not_suit_the_levels_is_told(make_run: MakeRun) -> None:
    config = tiny_config(make_run(), {"joint_diffusion": {"image_size": [30, 32], "channel_multipliers": [1, 1, 2]}})
    told = r"baselines\.joint_diffusion\.image_size=\[30, 32\]: both sides must be multiples of 4 for 3 levels and patch_size=1; give fewer channel_multipliers"
    with pytest.raises(MaskLoomError, match=told):
        train_baselines(config, force=False)


def test_heads_that_do_not_divide_the_channels_are_told() -> None:
    values = {**TINY["joint_diffusion"], "num_heads": 3}
    with pytest.raises(
        MaskLoomError,
        match=r"num_heads=3 does not divide the 8 channels of a level; change num_heads or model_channels",
    ):
        validated(values, Options, "baselines.joint_diffusion")
