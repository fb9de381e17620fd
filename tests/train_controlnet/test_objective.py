"""The objective against plain formulas, sd-scripts' and diffusers' own.

And what condition dropout leaves out of prompts and conditioning images.
"""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate

from maskloom.models.stable_diffusion.objective import (
    denoising_losses,
    lesion_weights,
    prediction_target,
    sample_latents,
    timestep_weights,
)
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws, keyed_generator
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task

CPU = torch.device("cpu")


def scheduler(prediction_type: str = "epsilon", **settings: bool) -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type, **settings
    )


def made_task(config: ExperimentConfig, **train: object) -> DiffusionTask:
    values = {**config.train.model_dump(), "proportion_empty_prompts": 0.0, **train}
    config = config.model_copy(update={"train": TrainConfig.model_validate(values)})
    run = Run(config.run_folder)
    torch.manual_seed(0)
    return build_task(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))


def test_latents_follow_the_posterior() -> None:
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2 * np.log(0.5))], dim=1)
    noise = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(sample_latents(moments, noise, 0.2), (3 + 0.5 * noise) * 0.2)
    assert torch.isfinite(sample_latents(torch.full((1, 8, 2, 2), 1e3), noise, 0.2)).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_the_paper(kind: str) -> None:
    schedule = scheduler(kind)
    timesteps = torch.tensor([10, 300, 900])
    prediction, target = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    found = denoising_losses(prediction, target) * timestep_weights(schedule, timesteps, 5.0, debiased=False)
    for i, t in enumerate(timesteps.tolist()):
        alpha = float(schedule.alphas_cumprod[t])
        snr = alpha / (1 - alpha)
        weight = min(snr, 5.0) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
        assert float(found[i]) == pytest.approx(weight * float((prediction[i] - target[i]).square().mean()), rel=1e-4)
    plain = denoising_losses(prediction, target) * timestep_weights(schedule, timesteps, None, debiased=False)
    torch.testing.assert_close(plain, (prediction - target).square().mean(dim=(1, 2, 3)))


def test_min_snr_weighs_the_same_error_of_the_latents_alike_whatever_is_predicted() -> None:
    """The paper's point: one weighting, three parametrisations.

    A latents' error e is e sqrt(SNR) of the noise, e sqrt(SNR + 1) of v.
    """
    timesteps = torch.tensor([1, 100, 500, 990])
    alpha = scheduler().alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    of_latents = timestep_weights(scheduler("sample"), timesteps, 5.0, debiased=False)
    torch.testing.assert_close(timestep_weights(scheduler(), timesteps, 5.0, debiased=False) * snr, of_latents)
    torch.testing.assert_close(
        timestep_weights(scheduler("v_prediction"), timesteps, 5.0, debiased=False) * (snr + 1), of_latents
    )


@pytest.mark.parametrize("v_prediction", [False, True])
def test_debiased_weights_are_those_of_sd_scripts(v_prediction: bool) -> None:
    """library/custom_train_functions.py: prepare_scheduler_for_custom_training,
    apply_debiased_estimation.
    """
    schedule = scheduler("v_prediction" if v_prediction else "epsilon")
    timesteps = torch.tensor([0, 1, 10, 300, 999])
    signal, noise = schedule.alphas_cumprod.sqrt(), (1 - schedule.alphas_cumprod).sqrt()
    snr = torch.minimum(((signal / noise) ** 2)[timesteps], torch.full((5,), 1000.0))
    assert float(snr[0]) == 1000  # the bound is felt at the first timestep
    expected = 1 / (snr + 1) if v_prediction else 1 / torch.sqrt(snr)
    torch.testing.assert_close(timestep_weights(schedule, timesteps, None, debiased=True), expected, rtol=1e-5, atol=0)


def test_predicted_latents_have_no_debiased_weights() -> None:
    found = timestep_weights(scheduler("sample"), torch.tensor([0, 500, 999]), None, debiased=True)
    assert found.tolist() == [1, 1, 1]


def test_targets_are_noise_velocity_or_latents() -> None:
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
    assert prediction_target(scheduler(), latents, noise, timesteps) is noise
    assert prediction_target(scheduler("sample"), latents, noise, timesteps) is latents
    schedule = scheduler("v_prediction")
    alpha = schedule.alphas_cumprod[timesteps].reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        prediction_target(schedule, latents, noise, timesteps), alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    )


def test_another_prediction_type_is_an_error() -> None:
    with pytest.raises(MaskLoomError, match=r"train\.prediction_type"):
        prediction_target(scheduler("flow"), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def random_foreground() -> Tensor:
    """Three masks of 32 x 48 pixels: a blob that crosses latent cells, none, all."""
    foreground = torch.zeros(3, 32, 48, dtype=torch.uint8)
    foreground[0, 5:19, 11:30] = 1
    foreground[2] = 1
    return foreground


def test_lesion_weights_are_a_cells_share_of_foreground() -> None:
    foreground, weight = random_foreground(), 5.0
    found = lesion_weights(foreground, weight, (4, 6))
    assert found.shape == (3, 1, 4, 6)
    for i in range(3):
        cells = np.empty((4, 6))
        for y in range(4):
            for x in range(6):
                share = float(foreground[i, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].float().mean())
                cells[y, x] = share * weight + (1 - share)
        np.testing.assert_allclose(found[i, 0].numpy(), cells / cells.mean(), rtol=1e-6)
    torch.testing.assert_close(found.mean(dim=(1, 2, 3)), torch.ones(3))
    assert found[1].unique().tolist() == found[2].unique().tolist() == [1.0]  # one kind of cell: all count alike


def test_lesion_weights_mix_the_plain_loss_with_sd_scripts_masked_loss() -> None:
    """library/custom_train_functions.py, apply_masked_loss: the error times the mask, resized to
    the latents by `area`.
    """
    foreground, weight = random_foreground()[:1], 5.0
    prediction, target = torch.randn(1, 4, 4, 6), torch.randn(1, 4, 4, 6)
    errors = functional.mse_loss(prediction, target, reduction="none")
    mask = functional.interpolate(foreground.unsqueeze(1).float(), size=(4, 6), mode="area")
    masked, share = (errors * mask).mean(), mask.mean()
    expected = (errors.mean() + (weight - 1) * masked) / (1 + (weight - 1) * share)
    found = denoising_losses(prediction, target, lesion_weights(foreground, weight, (4, 6)))
    assert float(found[0]) == pytest.approx(float(expected), rel=1e-5)
    only = denoising_losses(prediction, target, lesion_weights(foreground, 1e7, (4, 6)))
    assert float(only[0]) == pytest.approx(float(masked / share), rel=1e-4)


def test_a_weight_of_one_changes_nothing() -> None:
    assert torch.equal(lesion_weights(random_foreground(), 1.0, (4, 6)), torch.ones(3, 1, 4, 6))


def test_zero_terminal_snr_is_diffusers(config: ExperimentConfig) -> None:
    schedule = made_task(config, rescale_betas_zero_snr=True, prediction_type="v_prediction").scheduler
    plain = scheduler()
    assert float(schedule.alphas_cumprod[-1]) == 0
    assert float(plain.alphas_cumprod[-1]) > 1e-3
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(plain.betas), dim=0)
    assert torch.equal(schedule.alphas_cumprod, expected)
    assert float(schedule.alphas_cumprod[0]) == pytest.approx(float(plain.alphas_cumprod[0]), rel=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("weights", [{}, {"snr_gamma": 5.0}, {"debiased_estimation_loss": True}])
def test_the_last_timestep_of_zero_terminal_snr_is_finite(
    config: ExperimentConfig, kind: str, weights: dict[str, object]
) -> None:
    task = made_task(config, rescale_betas_zero_snr=True, prediction_type=kind, **weights)
    batch = default_collate([task.dataset[0], task.dataset[1]])
    draws = Draws(0, [0, 1], CPU)
    latents = task.latents(batch, draws)
    noise, last = draws.normal("noise", latents.shape[1:]), torch.full((2,), 999)
    assert torch.equal(task.scheduler.add_noise(latents, noise, last), noise)  # no signal is left
    losses = task.sample_losses(latents, noise, last, batch["prompt"], batch["conditioning"])
    settings = task.config
    weighed = losses * timestep_weights(task.scheduler, last, settings.snr_gamma, settings.debiased_estimation_loss)
    assert torch.isfinite(weighed).all()
    weighed.mean().backward()
    gradients = [p.grad for p in task.networks["controlnet"].parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(("prompts", "conditioning"), [(0.0, 0.0), (0.3, 0.1), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_what_is_left_out_is_keyed_by_position(config: ExperimentConfig, prompts: float, conditioning: float) -> None:
    task = made_task(config, proportion_empty_prompts=prompts, proportion_empty_conditioning=conditioning)
    positions = list(range(300, 900))
    batch = {
        "prompt": torch.arange(1, 601),
        "conditioning": torch.full((600, 3, 2, 2), 7, dtype=torch.uint8),
    }
    seen, conditioned_by = task.drop_conditions(batch, Draws(4, positions, CPU))
    assert conditioned_by is not None
    assert conditioned_by.dtype == torch.uint8
    dropped = {}
    for purpose, share in (("empty prompt", prompts), ("empty conditioning", conditioning)):
        draws = [float(torch.rand((), generator=keyed_generator(4, purpose, p))) for p in positions]
        dropped[purpose] = torch.tensor([draw < share for draw in draws])
        assert float(dropped[purpose].float().mean()) == pytest.approx(share, abs=0.05)
    assert torch.equal(seen == 0, dropped["empty prompt"])
    assert torch.equal(seen[seen > 0], batch["prompt"][~dropped["empty prompt"]])
    assert torch.equal((conditioned_by == 0).all(dim=(1, 2, 3)), dropped["empty conditioning"])
    assert torch.equal(
        conditioned_by[~dropped["empty conditioning"]], batch["conditioning"][~dropped["empty conditioning"]]
    )
    both = float((dropped["empty prompt"] & dropped["empty conditioning"]).float().mean())
    assert both == pytest.approx(prompts * conditioning, abs=0.05)  # drawn independently
    halves = [
        task.drop_conditions({k: v[i::2] for k, v in batch.items()}, Draws(4, positions[i::2], CPU)) for i in range(2)
    ]
    for i, (text, picture) in enumerate(halves):  # another split into batches leaves out the same
        assert picture is not None
        assert torch.equal(text, seen[i::2])
        assert torch.equal(picture, conditioned_by[i::2])


def test_the_backbone_stays_frozen(config: ExperimentConfig) -> None:
    task = made_task(config)
    ((_, loss),) = task.losses(default_collate([task.dataset[0]]), Draws(0, [0], CPU))
    loss.backward()
    assert all(
        p.grad is None for part in (task.parts.unet, task.parts.vae, task.parts.text_encoder) for p in part.parameters()
    )
