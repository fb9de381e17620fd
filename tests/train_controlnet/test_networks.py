"""What is trained: for every setting the documented weights change, in float32, and all others keep
their bytes.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import CLIPTextModel

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.train_controlnet.networks import LORA_TARGETS, Networks, load_networks
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task
from tests.tiny_backbone import build_tiny_backbone, build_tiny_controlnet
from tests.train_controlnet.conftest import tiny_config

CPU = torch.device("cpu")
CONNECTIONS = r"controlnet_cond_embedding\.|controlnet_down_blocks\.|controlnet_mid_block\."
ATTENTION_ADAPTERS = r".*\.attn[12]\.to_(q|k|v|out\.0)\.lora_[AB]\."
TEXT_ADAPTERS = r".*\.self_attn\.(q|k|v|out)_proj\.lora_[AB]\."
DECODER = r"up_blocks\.|conv_norm_out\.|conv_out\."

# Settings -> by network, the names of what is trained; a ControlNet that is not named here has
# nothing trained.
DEPTHS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "full": ({}, {"controlnet": ""}),
    "shallow 1": (
        {"controlnet": "shallow", "controlnet_blocks": 1},
        {"controlnet": rf"{CONNECTIONS}|conv_in\.|down_blocks\.0\."},
    ),
    "shallow 2": (
        {"controlnet": "shallow", "controlnet_blocks": 2},
        {"controlnet": rf"{CONNECTIONS}|conv_in\.|down_blocks\.[01]\."},
    ),
    "zero_convs": ({"controlnet": "zero_convs"}, {"controlnet": CONNECTIONS}),
    "full, UNet's decoder": ({"sd_locked": False}, {"controlnet": "", "unet": DECODER}),
    "frozen, UNet's decoder": ({"controlnet": "frozen", "sd_locked": False}, {"unet": DECODER}),
    "none, UNet's decoder": ({"controlnet": "none", "sd_locked": False}, {"unet": DECODER}),
    "none, LoRA on both": (
        {"controlnet": "none", "lora": ["unet", "text_encoder"]},
        {"unet": ATTENTION_ADAPTERS, "text_encoder": TEXT_ADAPTERS},
    ),
    "full, LoRA on the UNet": ({"lora": ["unet"]}, {"controlnet": "", "unet": ATTENTION_ADAPTERS}),
    "full, UNet's decoder, LoRA on the text": (
        {"sd_locked": False, "lora": ["text_encoder"]},
        {"controlnet": "", "unet": DECODER, "text_encoder": TEXT_ADAPTERS},
    ),
    "frozen, LoRA on the UNet": ({"controlnet": "frozen", "lora": ["unet"]}, {"unet": ATTENTION_ADAPTERS}),
    "frozen, LoRA on it": ({"controlnet": "frozen", "lora": ["controlnet"]}, {"controlnet": ATTENTION_ADAPTERS}),
    "zero_convs, LoRA on all": (
        {"controlnet": "zero_convs", "lora": ["controlnet", "unet", "text_encoder"]},
        {
            "controlnet": f"{CONNECTIONS}|{ATTENTION_ADAPTERS}",
            "unet": ATTENTION_ADAPTERS,
            "text_encoder": TEXT_ADAPTERS,
        },
    ),
}
PARTS = ("controlnet", "unet", "text_encoder", "vae")


@pytest.fixture(scope="session")
def controlnet(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_controlnet(backbone, tmp_path_factory.mktemp("controlnet"))


def deepened(config: ExperimentConfig, settings: dict[str, Any], controlnet: Path) -> ExperimentConfig:
    """Return the tiny experiment with these settings, checked as a user's.

    A frozen ControlNet gets weights.
    """
    given = {"controlnet_model_name_or_path": str(controlnet)} if settings.get("controlnet") == "frozen" else {}
    backbone = Path(config.train.pretrained_model_name_or_path)
    shared = {"num_validation_images": 0, "validation_samples": 1, "validation_timestep_bins": 1, "use_ema": False}
    return tiny_config(config.run_folder, backbone, **shared, **given, **settings)


def new_task(config: ExperimentConfig) -> DiffusionTask:
    run = Run(config.run_folder)
    torch.manual_seed(0)
    accelerator = make_accelerator(config.train, run.logs("train"))
    return build_task(config, run, MaskPromptDataset.open(run.dataset), accelerator)


def named_weights(parts: Networks) -> dict[tuple[str, str], nn.Parameter]:
    networks = {name: getattr(parts, name) for name in PARTS if getattr(parts, name) is not None}
    return {(name, key): weight for name, network in networks.items() for key, weight in network.named_parameters()}


def documented(names: Any, patterns: dict[str, str]) -> set[tuple[str, str]]:
    """Return which (network, weight) a setting is documented to train."""
    return {(network, key) for network, key in names if network in patterns and re.match(patterns[network], key)}


@pytest.mark.parametrize("case", DEPTHS)
def test_exactly_the_documented_weights_change(config: ExperimentConfig, controlnet: Path, case: str) -> None:
    settings, patterns = DEPTHS[case]
    # No weight decay: it would move weights that no gradient reaches. A fresh ControlNet's
    # embedding moves last, in the third step.
    config = deepened(config, {**settings, "adam_weight_decay": 0.0, "max_train_steps": 5}, controlnet)
    task = new_task(config)
    before = {key: weight.detach().clone() for key, weight in named_weights(task.parts).items()}
    expected = documented(before, patterns)
    assert {key for key, weight in named_weights(task.parts).items() if weight.requires_grad} == expected
    assert {network for network, _ in expected} == set(patterns)
    assert task.trained_parameters == sum(before[key].numel() for key in expected)
    accelerator = make_accelerator(config.train, config.run_folder / "logs")
    TrainingLoop(task, config.train, accelerator, config.run_folder / "generator", config.seed, {}).run()
    after = named_weights(task.parts)
    assert {key for key in before if not torch.equal(after[key], before[key])} == expected


@pytest.mark.parametrize("case", DEPTHS)
def test_trained_weights_are_float32_and_frozen_ones_of_the_precision(
    config: ExperimentConfig, controlnet: Path, case: str
) -> None:
    settings, patterns = DEPTHS[case]
    train_config = deepened(config, {**settings, "mixed_precision": "bf16"}, controlnet).train
    weights = named_weights(load_networks(train_config, CPU))
    expected = documented(weights, patterns)
    for key, weight in weights.items():
        assert weight.dtype == (torch.float32 if key in expected else torch.bfloat16), key


def test_weights_that_go_on_to_be_trained_are_not_rounded(config: ExperimentConfig, backbone: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(backbone, subfolder="unet").state_dict()
    settings = {"mixed_precision": "bf16", "sd_locked": False}
    parts = load_networks(config.train.model_copy(update=settings), CPU)
    assert torch.equal(parts.unet.conv_out.weight, unet["conv_out.weight"])
    assert torch.equal(parts.unet.conv_in.weight, unet["conv_in.weight"].to(torch.bfloat16))
    assert parts.controlnet is not None
    assert torch.equal(parts.controlnet.conv_in.weight, unet["conv_in.weight"])


@pytest.mark.parametrize(
    "case", ["shallow 1", "full, UNet's decoder, LoRA on the text", "zero_convs, LoRA on all", "frozen, LoRA on it"]
)
def test_bf16_trains_the_same_weights(config: ExperimentConfig, controlnet: Path, case: str) -> None:
    settings, patterns = DEPTHS[case]
    bf16 = {"mixed_precision": "bf16", "adam_weight_decay": 0.0, "max_train_steps": 5}
    config = deepened(config, {**settings, **bf16}, controlnet)
    task = new_task(config)
    before = {key: weight.detach().clone() for key, weight in named_weights(task.parts).items()}
    accelerator = make_accelerator(config.train, config.run_folder / "logs")
    TrainingLoop(task, config.train, accelerator, config.run_folder / "generator", config.seed, {}).run()
    changed = {key for key, weight in named_weights(task.parts).items() if not torch.equal(weight, before[key])}
    assert changed == documented(before, patterns)


def test_adapters_start_without_effect(config: ExperimentConfig, controlnet: Path) -> None:
    adapted = deepened(config, DEPTHS["zero_convs, LoRA on all"][0], controlnet).train
    plain = deepened(config, {"controlnet": "zero_convs"}, controlnet).train
    noisy, steps = torch.randn(2, 4, 4, 4), torch.tensor([10, 700])
    outputs = []
    for settings in (adapted, plain):
        parts = load_networks(settings, CPU)
        with torch.no_grad():
            text = parts.text_encoder(torch.arange(96).reshape(2, 48))[0]
            outputs.append(parts.unet(noisy, steps, encoder_hidden_states=text, return_dict=False)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_adapters_gradients_equal_those_of_a_plain_peft_step(
    config: ExperimentConfig, backbone: Path, alpha: float | None
) -> None:
    """The reference is PEFT's own wrapper around untouched networks, and a loss written after
    diffusers' LoRA script.
    """
    settings = {
        "controlnet": "none", "lora": ["unet", "text_encoder"], "rank": 2, "lora_alpha": alpha, "proportion_empty_prompts": 0.0
    }  # fmt: skip
    task = new_task(tiny_config(config.run_folder, backbone, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a second matrix of zeros would leave the first one without a gradient
        for weight in task.parameters()["denoiser"]:
            weight.normal_(std=0.2, generator=generator)
    positions = [3, 1, 7]
    batch = default_collate([task.dataset[p] for p in positions])
    ((_, loss),) = task.losses(batch, Draws(0, positions, CPU))
    loss.backward()
    references = {
        "unet": UNet2DConditionModel.from_pretrained(backbone, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(backbone, subfolder="text_encoder"),
    }
    for name, reference in references.items():
        adapters = LoraConfig(r=2, lora_alpha=alpha or 2, target_modules=LORA_TARGETS[name])
        references[name] = get_peft_model(reference, adapters)
        own = {f"base_model.model.{key}": value for key, value in getattr(task.parts, name).state_dict().items()}
        references[name].load_state_dict(own)
    _reference_loss(task, batch, references, Draws(0, positions, CPU)).backward()
    for name, reference in references.items():
        found = {key: p.grad for key, p in getattr(task.parts, name).named_parameters() if p.requires_grad}
        expected = {
            key.removeprefix("base_model.model."): p.grad for key, p in reference.named_parameters() if p.requires_grad
        }
        assert found.keys() == expected.keys()
        assert len(found) == {"unet": 2 * 4 * 2 * 4, "text_encoder": 2 * 2 * 4}[name]
        for key, gradient in expected.items():
            assert float((found[key] - gradient).norm()) <= 1e-5 * float(gradient.norm()), key
            assert float(gradient.norm()) > 0, key


def _reference_loss(
    task: DiffusionTask, batch: dict[str, Tensor], networks: dict[str, nn.Module], draws: Draws
) -> Tensor:
    schedule: DDPMScheduler = task.scheduler
    mean, log_variance = batch["moments"].chunk(2, dim=1)
    posterior = draws.normal("posterior", mean.shape[1:])
    latents = (mean + torch.exp(0.5 * log_variance) * posterior) * task.parts.vae.config.scaling_factor
    noise = draws.normal("noise", latents.shape[1:])
    timesteps = draws.integers("timestep", schedule.config.num_train_timesteps)
    states = networks["text_encoder"](task.text[batch["prompt"]], return_dict=False)[0]
    noisy = schedule.add_noise(latents, noise, timesteps)
    return functional.mse_loss(networks["unet"](noisy, timesteps, states, return_dict=False)[0], noise)


def test_more_blocks_than_there_are_is_told(config: ExperimentConfig) -> None:
    settings = config.train.model_copy(update={"controlnet": "shallow", "controlnet_blocks": 3})
    with pytest.raises(MaskLoomError, match=r"train\.controlnet_blocks=3: .* has 2 blocks; .*train\.controlnet=full"):
        load_networks(settings, CPU)


def test_a_controlnet_of_another_backbone_is_told(config: ExperimentConfig, tmp_path: Path) -> None:
    from_unet = UNet2DConditionModel.from_pretrained(config.train.pretrained_model_name_or_path, subfolder="unet")
    ControlNetModel.from_config(
        {**ControlNetModel.from_unet(from_unet).config, "cross_attention_dim": 24}
    ).save_pretrained(tmp_path / "other")
    settings = config.train.model_copy(update={"controlnet_model_name_or_path": str(tmp_path / "other")})
    with pytest.raises(
        MaskLoomError,
        match=r"train\.controlnet_model_name_or_path=.*other: made for another backbone .*cross_attention_dim 24, not 32\); give",
    ):
        load_networks(settings, CPU)


def test_zero_terminal_snr_of_a_backbone_that_predicts_noise_is_told(config: ExperimentConfig) -> None:
    settings = config.train.model_copy(update={"rescale_betas_zero_snr": True})
    with pytest.raises(
        MaskLoomError, match=r"train\.rescale_betas_zero_snr: .*set train\.prediction_type=v_prediction"
    ):
        load_networks(settings, CPU)


def test_the_noise_schedule_follows_the_configuration(config: ExperimentConfig, tmp_path: Path) -> None:
    plain = load_networks(config.train, CPU).scheduler
    assert plain.config.prediction_type == "epsilon"
    assert float(plain.alphas_cumprod[-1]) > 1e-3
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    changed = load_networks(config.train.model_copy(update=settings), CPU).scheduler
    assert changed.config.prediction_type == "v_prediction"
    assert float(changed.alphas_cumprod[-1]) == 0
    own = str(build_tiny_backbone(tmp_path / "v", prediction_type="v_prediction"))
    kept = load_networks(config.train.model_copy(update={"pretrained_model_name_or_path": own}), CPU).scheduler
    assert kept.config.prediction_type == "v_prediction"


def test_a_tokenizer_of_its_own_is_used_and_a_missing_one_told(config: ExperimentConfig, tmp_path: Path) -> None:
    folder = tmp_path / "words"
    shutil.copytree(Path(config.train.pretrained_model_name_or_path) / "tokenizer", folder)
    found = load_networks(config.train.model_copy(update={"tokenizer_name": str(folder)}), CPU)
    assert found.tokenizer.name_or_path == str(folder)
    with pytest.raises(
        MaskLoomError, match=r"train\.tokenizer_name=.*absent: no such folder; give a local folder or a Hub id"
    ):
        load_networks(config.train.model_copy(update={"tokenizer_name": str(tmp_path / "absent")}), CPU)


def test_activation_checkpointing_is_switched_on_where_asked(config: ExperimentConfig) -> None:
    both = {"gradient_checkpointing": True, "unet_gradient_checkpointing": True}
    alone = {"controlnet": "none", "lora": ["unet"]}
    for settings in (
        {},
        both,
        {"unet_gradient_checkpointing": True, **alone},
        {"gradient_checkpointing": True, **alone},
    ):
        parts = load_networks(config.train.model_copy(update=settings), CPU)
        assert parts.unet.is_gradient_checkpointing == bool(settings)
        if parts.controlnet is not None:
            assert parts.controlnet.is_gradient_checkpointing == bool(settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"controlnet": "none"}, r"controlnet=none with sd_locked=true and no lora trains nothing; set lora=\[unet\]"),
        (
            {"controlnet": "frozen", "controlnet_model_name_or_path": "x"},
            r"controlnet=frozen with sd_locked=true and no lora trains nothing",
        ),
        ({"lora": ["unet", "unet"]}, r"lora=\['unet', 'unet'\]: name each network once"),
        ({"lora": ["controlnet"]}, r"lora=\[controlnet\] .*set controlnet=zero_convs \(or frozen\), not full"),
        ({"controlnet": "shallow", "lora": ["controlnet"]}, r"set controlnet=zero_convs \(or frozen\), not shallow"),
        ({"controlnet": "none", "lora": ["controlnet"]}, r"set controlnet=zero_convs \(or frozen\), not none"),
        ({"controlnet": "frozen", "lora": ["unet"]}, r"controlnet=frozen needs controlnet_model_name_or_path"),
        ({"lora": ["unet"], "sd_locked": False}, r"lora=\[unet\] with sd_locked=false .*choose one"),
        ({"lora": ["vae"]}, r"lora\.0\n.*'unet', 'text_encoder' or 'controlnet'"),
        ({"rank": 0}, r"rank\n.*greater than or equal to 1"),
        ({"lora_alpha": 0}, r"lora_alpha\n.*greater than 0"),
        ({"controlnet_blocks": 0}, r"controlnet_blocks\n.*greater than or equal to 1"),
        ({"snr_gamma": 5, "debiased_estimation_loss": True}, "snr_gamma and debiased_estimation_loss .*choose one"),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
            r"rescale_betas_zero_snr .*set prediction_type=v_prediction",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        TrainConfig(pretrained_model_name_or_path="x", **settings)
