"""What lies in `generator/` after a training is what was trained, as diffusers' own classes load
it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from maskloom.models.stable_diffusion.trained_parts import exported_names
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.train_controlnet.export import export
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task
from tests.tiny_backbone import build_tiny_controlnet
from tests.train_controlnet.conftest import tiny_config

LORA_FILE = "pytorch_lora_weights.safetensors"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def exported(config: ExperimentConfig, spread: float = 0.2, **settings: Any) -> tuple[DiffusionTask, Path]:
    """Return a task and the folder that it was exported to.

    Two steps of training, then all trained weights are moved by `spread`.
    """
    plain = {"num_validation_images": 0, "validation_samples": 1, "validation_timestep_bins": 1, "max_train_steps": 2}
    backbone = Path(config.train.pretrained_model_name_or_path)
    config = tiny_config(config.run_folder, backbone, **plain, **settings)
    run = Run(config.run_folder)
    dataset = MaskPromptDataset.open(run.dataset)
    accelerator = Accelerator(
        cpu=True, mixed_precision=config.train.mixed_precision, project_dir=str(run.logs("train"))
    )
    task = build_task(config, run, dataset, accelerator)
    TrainingLoop(task, config.train, accelerator, run.generator, config.seed, {}).run()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for network in task.parts.trained().values():
            for weight in (p for p in network.parameters() if p.requires_grad):
                weight += spread * torch.randn(weight.shape, generator=generator)
    assert export(task, config, run, dataset) == exported_names(config.train)
    for network in task.networks.values():  # back to plain networks, without autocast
        accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    return task, run.generator


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    return {
        "sample": torch.randn(2, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([50, 800]),
        "encoder_hidden_states": torch.randn(2, 48, 32, generator=generator),
        "return_dict": False,
    }


@torch.no_grad()
def residuals(controlnet: Any) -> list[Tensor]:
    """Return a ControlNet's outputs on a fixed input."""
    condition = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    down, mid = controlnet(**inputs(), controlnet_cond=condition)
    return [*down, mid]


@torch.no_grad()
def prediction(unet: Any) -> Tensor:
    return unet(**inputs())[0]


@torch.no_grad()
def states(text_encoder: Any) -> Tensor:
    return text_encoder(torch.arange(96).reshape(2, 48))[0]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("settings", [{}, {"controlnet": "zero_convs"}, {"channels_last": True}])
def test_a_controlnet_loads_as_it_was_trained(config: ExperimentConfig, settings: dict[str, Any]) -> None:
    task, folder = exported(config, **settings)
    loaded = ControlNetModel.from_pretrained(folder / "controlnet")
    assert loaded.dtype == torch.float32
    trained = task.parts.controlnet.state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("mode", ["zero_convs", "frozen"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_of_a_controlnet_are_merged(
    config: ExperimentConfig, backbone: Path, tmp_path: Path, mode: str, precision: str
) -> None:
    given = build_tiny_controlnet(backbone, tmp_path / "given")
    task, folder = exported(
        config, controlnet=mode, lora=["controlnet"], rank=3, lora_alpha=5.0, mixed_precision=precision,
        controlnet_model_name_or_path=str(given),
    )  # fmt: skip
    loaded = ControlNetModel.from_pretrained(folder / "controlnet")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    unmoved = residuals(ControlNetModel.from_pretrained(given))
    adapted = task.parts.controlnet.float()
    for found, expected in zip(residuals(loaded), residuals(adapted), strict=True):
        assert_close(found, expected)
    assert float((residuals(loaded)[-1] - unmoved[-1]).abs().max()) > 1e-2 * float(unmoved[-1].abs().max())
    # The network in hand keeps its adapters, unmerged.
    assert any(isinstance(module, BaseTunerLayer) and not module.merged for module in adapted.modules())


def test_a_unet_whose_decoder_was_trained_loads(config: ExperimentConfig, backbone: Path) -> None:
    task, folder = exported(config, sd_locked=False)
    loaded = UNet2DConditionModel.from_pretrained(folder / "unet")
    torch.testing.assert_close(prediction(loaded), prediction(task.parts.unet), rtol=0, atol=0)
    before = load_file(backbone / "unet" / WEIGHTS_FILE)
    after = load_file(folder / "unet" / WEIGHTS_FILE)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))}


def test_a_unet_trained_in_bf16_is_written_in_float32(config: ExperimentConfig) -> None:
    task, folder = exported(config, sd_locked=False, controlnet="none", mixed_precision="bf16")
    weights = load_file(folder / "unet" / WEIGHTS_FILE)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    for key, value in task.parts.unet.state_dict().items():
        assert torch.equal(weights[key], value.float()), key


@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_adapters_load_into_a_pipeline_with_their_strength(
    config: ExperimentConfig, backbone: Path, alpha: float | None
) -> None:
    task, folder = exported(config, controlnet="none", lora=["unet", "text_encoder"], rank=3, lora_alpha=alpha)
    pipe = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
    plain = prediction(pipe.unet), states(pipe.text_encoder)
    pipe.load_lora_weights(folder / "lora")
    found, expected = (
        (prediction(pipe.unet), states(pipe.text_encoder)),
        (prediction(task.parts.unet), states(task.parts.text_encoder)),
    )
    for one, other, before in zip(found, expected, plain, strict=True):
        assert_close(one, other)
        assert float((one - before).abs().max()) > 1e-2 * float(before.abs().max())


@pytest.mark.parametrize("targets", [["unet"], ["text_encoder"]])
def test_adapters_of_one_network_leave_the_other_alone(
    config: ExperimentConfig, backbone: Path, targets: list[str]
) -> None:
    task, folder = exported(config, controlnet="none", lora=targets)
    pipe = StableDiffusionPipeline.from_pretrained(backbone, safety_checker=None)
    pipe.load_lora_weights(folder / "lora")
    assert_close(prediction(pipe.unet), prediction(task.parts.unet))
    assert_close(states(pipe.text_encoder), states(task.parts.text_encoder))
    assert list(pipe.get_list_adapters()) == targets


def test_a_lora_file_has_the_names_and_the_meaning_that_all_programs_know(config: ExperimentConfig) -> None:
    task, folder = exported(config, controlnet="none", lora=["unet", "text_encoder"], rank=2, lora_alpha=8.0)
    weights = load_file(folder / "lora" / LORA_FILE)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    layer = task.parts.unet.get_submodule(first)
    delta = weights[f"unet.{first}.lora.up.weight"] @ weights[f"unet.{first}.lora.down.weight"]
    assert_close(delta, layer.get_delta_weight("default").detach())
    assert "text_encoder.text_model.encoder.layers.1.self_attn.out_proj.lora_linear_layer.up.weight" in weights
    with safe_open(folder / "lora" / LORA_FILE, "pt") as file:  # no alpha: it is in the weights
        assert file.metadata() == {"format": "pt"}


def test_adapters_and_a_controlnet_work_together(config: ExperimentConfig, backbone: Path) -> None:
    task, folder = exported(config, spread=0.05, lora=["unet", "text_encoder"], lora_alpha=8.0)
    loaded = ControlNetModel.from_pretrained(folder / "controlnet")
    pipe = StableDiffusionControlNetPipeline.from_pretrained(backbone, controlnet=loaded, safety_checker=None)
    pipe.load_lora_weights(folder / "lora")
    parts = task.parts
    trained = StableDiffusionControlNetPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=parts.unet, controlnet=parts.controlnet,
        scheduler=pipe.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    images = []
    for one in (pipe, trained):
        one.set_progress_bar_config(disable=True)
        condition = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(6))
        generator = torch.Generator().manual_seed(0)
        images.append(one("toy", condition, num_inference_steps=3, generator=generator, output_type="pt").images)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["controlnet"]),
        ({"sd_locked": False}, ["controlnet", "unet"]),
        ({"controlnet": "none", "sd_locked": False}, ["unet"]),
        ({"controlnet": "none", "lora": ["unet"]}, ["lora"]),
        ({"lora": ["text_encoder"], "sd_locked": False}, ["controlnet", "unet", "lora"]),
        ({"controlnet": "zero_convs", "lora": ["controlnet"]}, ["controlnet"]),
    ],
)
def test_each_setting_leaves_its_folders(config: ExperimentConfig, settings: dict[str, Any], names: list[str]) -> None:
    _, folder = exported(config, **settings)
    written = {path.name for path in folder.iterdir()} - {"cache"}
    assert {name for name in written if not name.startswith("checkpoint-")} == set(names)
    for name in names:
        assert {path.suffix for path in (folder / name).iterdir()} <= {".json", ".md", ".safetensors", ".png"}
        assert (folder / name / "README.md").is_file()


def test_a_folder_that_cannot_be_written_is_told(config: ExperimentConfig) -> None:
    task, folder = exported(config)
    (folder / ".controlnet.maskloom-tmp").write_text("in the way")
    run = Run(config.run_folder)
    with pytest.raises(MaskLoomError, match=r"generator/controlnet: could not be written .*free space"):
        export(task, config, run, MaskPromptDataset.open(run.dataset))
    assert (folder / "controlnet" / WEIGHTS_FILE).is_file()  # the older one is still whole
