"""The objective against plain formulas, and its gradients against a plain reference step."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline.config import ExperimentConfig
from pipeline.contract import open_split, read_contract
from pipeline.errors import MaskLoomError
from pipeline.randomness import Draws
from pipeline.runs import Run
from tests.tiny_backbone import build_tiny_backbone
from train_controlnet.objective import denoising_losses, prediction_target, sample_latents, timestep_weights
from train_controlnet.task import DiffusionTask

CPU = torch.device("cpu")


def scheduler(prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
    )


def test_latents_follow_the_posterior() -> None:
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2 * np.log(0.5))], dim=1)
    noise = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(sample_latents(moments, noise, 0.2), (3 + 0.5 * noise) * 0.2)
    assert torch.isfinite(sample_latents(torch.full((1, 8, 2, 2), 1e3), noise, 0.2)).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(kind: str) -> None:
    schedule = scheduler(kind)
    timesteps = torch.tensor([10, 300, 900])
    prediction, target = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    found = denoising_losses(prediction, target) * timestep_weights(schedule, timesteps, 5.0, debiased=False)
    for i, t in enumerate(timesteps.tolist()):
        alpha = float(schedule.alphas_cumprod[t])
        snr = alpha / (1 - alpha)
        weight = min(snr, 5.0) / (snr + 1 if kind == "v_prediction" else snr)
        assert float(found[i]) == pytest.approx(weight * float((prediction[i] - target[i]).square().mean()), rel=1e-4)
    plain = denoising_losses(prediction, target) * timestep_weights(schedule, timesteps, None, debiased=False)
    torch.testing.assert_close(plain, (prediction - target).square().mean(dim=(1, 2, 3)))


def test_targets_are_noise_or_velocity() -> None:
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
    assert prediction_target(scheduler(), latents, noise, timesteps) is noise
    schedule = scheduler("v_prediction")
    alpha = schedule.alphas_cumprod[timesteps].reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        prediction_target(schedule, latents, noise, timesteps), alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    )


def test_another_prediction_type_is_an_error() -> None:
    with pytest.raises(MaskLoomError, match=r"train\.prediction_type"):
        prediction_target(scheduler("flow"), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def perturb_zero_convolutions(controlnet: ControlNetModel) -> None:
    """Zero convolutions stop nearly all gradients of a first step; give them something to pass on."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in (
            *controlnet.controlnet_down_blocks,
            controlnet.controlnet_mid_block,
            controlnet.controlnet_cond_embedding.conv_out,
        ):
            block.weight.normal_(std=0.1, generator=generator)


def reference_gradients(
    folder: str, rows: list[dict], draws: Draws, controlnet: ControlNetModel, snr_gamma: float | None
) -> dict[str, Tensor]:
    """Return the gradients of a plain step written after diffusers' examples/controlnet: nothing cached, nothing shared."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    pixels = (
        torch.stack([torch.from_numpy(np.array(r["image"].convert("RGB"))).permute(2, 0, 1) for r in rows]) / 255.0 * 2
        - 1
    )
    condition = (
        torch.stack([torch.from_numpy(np.array(r["conditioning_image"])).permute(2, 0, 1) for r in rows]) / 255.0
    )
    with torch.no_grad():
        posterior: DiagonalGaussianDistribution = vae.encode(pixels).latent_dist
        latents = (
            posterior.mean + posterior.std * draws.normal("posterior", posterior.mean.shape[1:])
        ) * vae.config.scaling_factor
        ids = tokenizer(
            [r["text"] for r in rows],
            max_length=tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        states = text_encoder(ids.input_ids, return_dict=False)[0]
    noise = draws.normal("noise", latents.shape[1:])
    timesteps = draws.integers("timestep", schedule.config.num_train_timesteps)
    noisy = schedule.add_noise(latents, noise, timesteps)
    down, mid = controlnet(noisy, timesteps, encoder_hidden_states=states, controlnet_cond=condition, return_dict=False)
    prediction = unet(
        noisy,
        timesteps,
        encoder_hidden_states=states,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
    target = noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
    if snr_gamma is None:
        loss = functional.mse_loss(prediction, target, reduction="mean")
    else:
        alpha = schedule.alphas_cumprod[timesteps]
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=snr_gamma) / (snr + 1 if schedule.config.prediction_type == "v_prediction" else snr)
        loss = (functional.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3)) * weight).mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in controlnet.named_parameters()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_a_plain_step(
    config: ExperimentConfig,
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    cached: bool,
    snr_gamma: float | None,
    checkpointing: bool,
) -> None:
    folder = str(build_tiny_backbone(tmp_path_factory.mktemp(kind), prediction_type=kind))
    changes = {
        "cache_latents": cached, "snr_gamma": snr_gamma, "proportion_empty_prompts": 0.0, "gradient_checkpointing": checkpointing,
        "unet_gradient_checkpointing": checkpointing, "pretrained_model_name_or_path": folder,
    }  # fmt: skip
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    run = Run(config.run_folder)
    torch.manual_seed(0)
    task = DiffusionTask(config, run, read_contract(run.dataset), Accelerator(cpu=True))
    controlnet = task.networks["controlnet"]
    assert isinstance(controlnet, ControlNetModel)
    perturb_zero_convolutions(controlnet)
    positions = [3, 1, 7]
    batch = default_collate([task.dataset[p] for p in positions])
    ((name, loss),) = task.losses(batch, Draws(0, positions, CPU))
    assert name == "denoiser"
    loss.backward()
    found = {name: p.grad.clone() for name, p in controlnet.named_parameters()}
    controlnet.zero_grad()
    split = open_split(run.dataset, "train")
    expected = reference_gradients(
        folder, [split[p] for p in positions], Draws(0, positions, CPU), controlnet, snr_gamma
    )
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert float(gradient.norm()) > 0 or "conv_shortcut" in key or "attn1" in key, (
            f"{key}: the reference gradient is zero"
        )
        assert float((found[key] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-12, key


def test_the_backbone_stays_frozen(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    task = DiffusionTask(config, run, read_contract(run.dataset), Accelerator(cpu=True))
    ((_, loss),) = task.losses(default_collate([task.dataset[0]]), Draws(0, [0], CPU))
    loss.backward()
    assert all(p.grad is None for part in (task.parts.unet, task.parts.vae, task.parts.text_encoder) for p in part.parameters())
