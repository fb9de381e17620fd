"""A training step against a plain one, written after diffusers'
examples/controlnet/train_controlnet.py: equal gradients under every switch.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import CLIPTextModel, CLIPTokenizer

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.setup import make_optimizer
from maskloom.train_controlnet.networks import compile_repeated_blocks
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task
from tests.tiny_datasets import write_tiny_run
from tests.train_controlnet.conftest import tiny_config

CPU = torch.device("cpu")
POSITIONS = [3, 1, 7, 4]
TOLERANCE = 1e-5  # of a gradient's norm

# Each names what is switched against the plain step; what the plain step must do alike is read from
# the same configuration.
CASES: dict[str, dict[str, Any]] = {
    "cached moments": {"cache_latents": True},
    "moments encoded anew": {"cache_latents": False},
    "recomputed activations": {"gradient_checkpointing": True},
    "recomputed activations of the UNet": {"unet_gradient_checkpointing": True},
    "recomputed activations of both": {"gradient_checkpointing": True, "unet_gradient_checkpointing": True},
    "channels last": {"channels_last": True},
    "velocities": {"prediction_type": "v_prediction"},
    "latents predicted": {"prediction_type": "sample"},
    "min-SNR": {"snr_gamma": 5.0},
    "min-SNR, velocities": {"snr_gamma": 5.0, "prediction_type": "v_prediction"},
    "min-SNR, latents predicted": {"snr_gamma": 5.0, "prediction_type": "sample"},
    "debiased": {"debiased_estimation_loss": True},
    "debiased, velocities": {"debiased_estimation_loss": True, "prediction_type": "v_prediction"},
    "noise offset": {"noise_offset": 0.1},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "lesion weights": {"lesion_loss_weight": 5.0},
    "some prompts left out": {"proportion_empty_prompts": 0.5},
    "masks only": {"proportion_empty_prompts": 1.0},
    "some conditioning left out": {"proportion_empty_conditioning": 0.5},
    "prompts only": {"proportion_empty_conditioning": 1.0},
    "neither": {"proportion_empty_prompts": 1.0, "proportion_empty_conditioning": 1.0},
    "all at once": {
        "cache_latents": True, "gradient_checkpointing": True, "unet_gradient_checkpointing": True, "channels_last": True, "noise_offset": 0.05,
        "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "snr_gamma": 5.0, "lesion_loss_weight": 3.0,
        "proportion_empty_prompts": 0.5, "proportion_empty_conditioning": 0.5,
    },
}  # fmt: skip


def changed(config: ExperimentConfig, **train: Any) -> ExperimentConfig:
    values = {**config.train.model_dump(), "proportion_empty_prompts": 0.0, **train}
    return config.model_copy(update={"train": TrainConfig.model_validate(values)})


def made_task(config: ExperimentConfig) -> tuple[DiffusionTask, ControlNetModel]:
    """Return a task and its ControlNet, whose zero convolutions pass something on: they stop nearly
    all gradients of a first step.
    """
    torch.manual_seed(0)
    run = Run(config.run_folder)
    task = build_task(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    controlnet = task.networks["controlnet"]
    assert isinstance(controlnet, ControlNetModel)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in (
            *controlnet.controlnet_down_blocks,
            controlnet.controlnet_mid_block,
            controlnet.controlnet_cond_embedding.conv_out,
        ):
            block.weight.normal_(std=0.1, generator=generator)
    return task, controlnet


def gradients(task: DiffusionTask, controlnet: ControlNetModel) -> dict[str, Tensor]:
    """Return the task's gradients of one batch."""
    ((name, loss),) = task.losses(default_collate([task.dataset[p] for p in POSITIONS]), Draws(0, POSITIONS, CPU))
    assert name == "denoiser"
    loss.backward()
    found = {key: p.grad.clone() for key, p in controlnet.named_parameters()}
    controlnet.zero_grad()
    return found


def plain_gradients(config: ExperimentConfig, controlnet: ControlNetModel) -> dict[str, Tensor]:
    """Return those of a step with nothing cached, nothing shared and every formula written out, on
    a copy of the ControlNet.
    """
    plain = ControlNetModel.from_config(controlnet.config)
    plain.load_state_dict(controlnet.state_dict())
    plain_loss(config, plain).backward()
    return {name: p.grad for name, p in plain.named_parameters()}


def plain_loss(config: ExperimentConfig, controlnet: ControlNetModel) -> Tensor:
    settings, folder = config.train, config.train.pretrained_model_name_or_path
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    kind = settings.prediction_type or "epsilon"
    schedule = DDPMScheduler.from_pretrained(
        folder, subfolder="scheduler", prediction_type=kind, rescale_betas_zero_snr=settings.rescale_betas_zero_snr
    )
    split, draws = MaskPromptDataset.open(Run(config.run_folder).dataset).split("train"), Draws(0, POSITIONS, CPU)
    rows = [split[p] for p in POSITIONS]
    pixels = torch.stack([unit_tensor(row["image"]) for row in rows]) * 2 - 1
    conditioning = torch.stack([unit_tensor(row["conditioning_image"]) for row in rows])
    prompts = [row["text"] for row in rows]
    for i in range(len(rows)):
        if float(draws.uniform("empty prompt")[i]) < settings.proportion_empty_prompts:
            prompts[i] = ""
        if float(draws.uniform("empty conditioning")[i]) < settings.proportion_empty_conditioning:
            conditioning[i] = 0
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * draws.normal("posterior", posterior.mean.shape[1:])
        latents = latents * vae.config.scaling_factor
        tokens = tokenizer(
            prompts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        states = text_encoder(tokens.input_ids, return_dict=False)[0]
    noise = draws.normal("noise", latents.shape[1:])
    noise = noise + settings.noise_offset * draws.normal("noise offset", (latents.shape[1], 1, 1))
    timesteps = draws.integers("timestep", schedule.config.num_train_timesteps)
    noisy = schedule.add_noise(latents, noise, timesteps)
    down, mid = controlnet(
        noisy, timesteps, encoder_hidden_states=states, controlnet_cond=conditioning, return_dict=False
    )
    prediction = unet(
        noisy,
        timesteps,
        encoder_hidden_states=states,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]
    targets = {"epsilon": noise, "v_prediction": schedule.get_velocity(latents, noise, timesteps), "sample": latents}
    errors = functional.mse_loss(prediction, targets[kind], reduction="none")
    total = torch.zeros(())
    for i, row in enumerate(rows):
        cells = torch.tensor(plain_cell_weights(np.asarray(row["mask"]), settings.lesion_loss_weight))
        alpha = float(schedule.alphas_cumprod[timesteps[i]])
        total = total + plain_timestep_weight(alpha / (1 - alpha), kind, settings) * (errors[i] * cells).mean()
    return total / len(rows)


def unit_tensor(image: Image.Image) -> Tensor:
    """What torchvision's ToTensor returns."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255.0


def plain_cell_weights(mask: np.ndarray, weight: float) -> np.ndarray:
    """Return a latent cell's weight from the 8 x 8 pixels that it stands for."""
    height, width = (side // 8 for side in mask.shape)
    cells = np.empty((height, width), np.float32)
    for y in range(height):
        for x in range(width):
            share = (mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] > 0).mean()
            cells[y, x] = (1 - share) * 1 + share * weight
    return cells / cells.mean()


def plain_timestep_weight(snr: float, kind: str, settings: TrainConfig) -> float:
    """Return a sample's weight: sd-scripts' (library/custom_train_functions.py), and min-SNR's own
    for predicted latents.
    """
    if settings.snr_gamma is not None:
        smaller = min(snr, settings.snr_gamma)
        return smaller / (snr + 1) if kind == "v_prediction" else smaller / snr if kind == "epsilon" else smaller
    if settings.debiased_estimation_loss:
        snr = min(snr, 1000)
        return 1 / (snr + 1) if kind == "v_prediction" else 1 / snr**0.5
    return 1.0


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        # One text token too few, one latent cell: attention to a single thing has no gradient of
        # its own.
        assert float(gradient.norm()) > 0 or "attn1" in key, f"{key}: the plain step's gradient is zero"
        assert float((found[key] - gradient).norm()) <= tolerance * float(gradient.norm()) + 1e-10, key


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_of_a_plain_step(config: ExperimentConfig, case: str) -> None:
    config = changed(config, **CASES[case])
    task, controlnet = made_task(config)
    found, expected = gradients(task, controlnet), plain_gradients(config, controlnet)
    if case in ("prompts only", "neither"):  # a black image: nothing to learn about how colours are read
        first = "controlnet_cond_embedding.conv_in.weight"
        assert not found[first].any()
        assert not expected.pop(first).any()
        del found[first]
    assert_same_gradients(found, expected)


def test_compiled_blocks_have_the_same_gradients() -> None:
    """One block of each compiled kind: compiling all of a network takes minutes on a CPU."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    torch.manual_seed(0)
    plain = torch.nn.ModuleList(
        [
            ResnetBlock2D(in_channels=8, temb_channels=8, groups=4),
            BasicTransformerBlock(8, 2, 4, cross_attention_dim=6),
        ]
    )
    compiled = copy.deepcopy(plain)
    compile_repeated_blocks(compiled)
    pixels, time = torch.randn(2, 8, 4, 4), torch.randn(2, 8)
    tokens, text = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    found = []
    for resnet, transformer in (plain, compiled):
        (
            resnet(pixels, time).square().mean() + transformer(tokens, encoder_hidden_states=text).square().mean()
        ).backward()
        found.append({name: p.grad for part in (resnet, transformer) for name, p in part.named_parameters()})
    assert compiled[0]._compiled_call_impl is not None
    assert_same_gradients(found[1], found[0])


def test_looked_up_embeddings_are_those_of_a_fresh_text_encoder(config: ExperimentConfig, backbone: Path) -> None:
    task, _ = made_task(config)
    encoder = CLIPTextModel.from_pretrained(backbone, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(backbone, subfolder="tokenizer")
    split = MaskPromptDataset.open(Run(config.run_folder).dataset).split("train")
    for index in range(len(split)):
        ids = tokenizer(
            split[index]["text"], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            expected = encoder(ids)[0]
        torch.testing.assert_close(task.text[task.dataset[index]["prompt"]], expected[0], rtol=1e-5, atol=1e-6)


def test_the_fused_optimizer_is_plain_adamw(config: ExperimentConfig) -> None:
    """Three steps with the same gradients."""
    settings = changed(config, adam_weight_decay=0.05, adam_beta1=0.8).train
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(50, 7, generator=generator), torch.randn(3, generator=generator)]
    ours, plain = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    optimizers = [
        make_optimizer(ours, settings, 1e-2),
        torch.optim.AdamW(
            plain, lr=1e-2, betas=(0.8, settings.adam_beta2), weight_decay=0.05, eps=settings.adam_epsilon, foreach=False, fused=False
        ),
    ]  # fmt: skip
    assert optimizers[0].defaults["fused"]
    for _ in range(3):
        for one, other in zip(ours, plain, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, value in zip(ours, plain, values, strict=True):
        assert float((one - value).detach().abs().mean()) > 1e-2
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_micro_batches_add_up_to_one_big_batch(tmp_path: Path, backbone: Path) -> None:
    """Through the loop: three micro-batches of two against one batch of six, two steps."""
    write_tiny_run(tmp_path, {}, {"train": 12})
    weights = {}
    for name, batch, micro in (("whole", 6, 1), ("parts", 2, 3)):
        # With so large an epsilon a step is nearly linear in the gradient, so that small
        # differences stay small.
        config = tiny_config(
            tmp_path, backbone, train_batch_size=batch, gradient_accumulation_steps=micro, max_train_steps=2, learning_rate=0.1,
            adam_epsilon=1.0, max_grad_norm=1e6, use_ema=False, num_validation_images=0, checkpointing_steps=100,
        )  # fmt: skip
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=micro, step_scheduler_with_optimizer=False, project_dir=str(tmp_path)
        )
        torch.manual_seed(0)
        task = build_task(config, Run(tmp_path), MaskPromptDataset.open(tmp_path / "dataset"), accelerator)
        weights["start"] = flat(task)
        TrainingLoop(task, config.train, accelerator, tmp_path / name, config.seed, {}).run()
        weights[name] = flat(task)
    moved = (weights["whole"] - weights["start"]).norm()
    assert float(moved) > 1e-3
    assert float((weights["whole"] - weights["parts"]).norm()) <= 1e-5 * float(moved)


def flat(task: DiffusionTask) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for group in task.parameters().values() for p in group])
