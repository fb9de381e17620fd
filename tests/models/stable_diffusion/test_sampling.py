"""Validation samples, mask adherence and the stage `generate` sample in the same way: same weights,
noise and settings, same pixels.
"""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from maskloom.generate.generators import controlnet
from maskloom.models.stable_diffusion.sampling import (
    Sampling,
    check_sampling,
    prompt_embedding,
    sample,
    sampling_scheduler,
)
from maskloom.models.stable_diffusion.trained_pipeline import load_backbone
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.generate import SchedulerName
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import keyed_generator
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.train_controlnet.export import export
from maskloom.train_controlnet.train import build_task, check_validation_sampling
from maskloom.train_controlnet.validation.samples import (
    SampleRequest,
    adherence_sampling,
    sample_images,
    validation_sampling,
)
from tests.tiny_backbone import build_tiny_backbone, build_tiny_controlnet
from tests.tiny_datasets import write_tiny_run
from tests.train_controlnet.conftest import fresh_accelerate, tiny_config  # noqa: F401

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_backbone(tmp_path_factory.mktemp("backbone"), prediction_type="v_prediction")


def experiment(folder: Path, backbone: Path, generate: dict[str, Any], **train: Any) -> ExperimentConfig:
    write_tiny_run(folder, {}, {"train": 6, "validation": 6, "test": 2})
    if train.get("controlnet") != "none":
        weights = build_tiny_controlnet(backbone, folder / "start")
        train |= {"controlnet_model_name_or_path": str(weights)}
    config = tiny_config(folder, backbone, **train)
    values = config.model_dump(mode="json", exclude_none=True)
    return ExperimentConfig.model_validate({**values, "generate": {**values["generate"], **generate}})


OPTIONS = {"negative_prompt": "a square", "control_guidance_end": 0.7}


@pytest.mark.parametrize(
    ("generate", "train"),
    [
        ({"scheduler": "unipc", "guidance_scale": 2.5, "generators": {"controlnet": OPTIONS}}, {}),
        (
            {"scheduler": "ddim", "guidance_scale": 1.0, "controlnet_conditioning_scale": 0.5},
            {"rescale_betas_zero_snr": True},
        ),
        (
            {"scheduler": "dpmsolver++", "generators": {"lora": {"negative_prompt": "a disc"}}},
            {"controlnet": "none", "sd_locked": False},
        ),
    ],
)
def test_validation_and_generate_give_identical_pixels(
    tmp_path: Path, backbone: Path, generate: dict[str, Any], train: dict[str, Any]
) -> None:
    config = experiment(tmp_path, backbone, {"num_inference_steps": 3, **generate}, **train)
    run = Run(config.run_folder)
    dataset, accelerator = MaskPromptDataset.open(run.dataset), make_accelerator(config.fine_tuning, run.logs("train"))
    task = build_task(config, run, dataset, accelerator)
    how = validation_sampling(config)
    mask = np.zeros((32, 32, 3), np.uint8)
    mask[8:20, 10:25] = 255
    requests = [SampleRequest(mask, "a disc"), SampleRequest(mask[::-1].copy(), "a square on the left")]
    validation = sample_images(task, accelerator, requests, config, how, "picture")
    export(task, config, run, dataset)
    assert generated(config, run, requests) == [image.tobytes() for image in validation]


def generated(config: ExperimentConfig, run: Run, requests: list[SampleRequest]) -> list[bytes]:
    """Return the images of the pipeline that the stage `generate` loads, called as its generators
    call it, in bytes.
    """
    name = "lora" if config.fine_tuning.controlnet == "none" else "controlnet"
    options = controlnet.Options(**config.generate.generators.get(name, {}))
    parts = {part: run.generator / part for part in ("controlnet", "unet") if (run.generator / part).is_dir()}
    pipe = load_backbone(config, CPU, parts, [(32, 32)])
    from maskloom.models.stable_diffusion.prompt_encoding import load_prompt_encoder

    encoder = load_prompt_encoder(config.fine_tuning)
    with torch.inference_mode():
        batch = sample(
            pipe,
            [prompt_embedding(pipe, encoder, request.prompt) for request in requests],
            prompt_embedding(pipe, encoder, options.negative_prompt),
            torch.from_numpy(np.stack([request.conditioning for request in requests])).permute(0, 3, 1, 2) / 255
            if "controlnet" in parts
            else None,
            (32, 32),
            [keyed_generator(config.seed, "picture", number) for number in range(len(requests))],
            Sampling.of(config.generate, options.model_dump()),
        )
    pixels = (batch.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    return [image.tobytes() for image in pixels]


def test_adherence_samples_as_generate_does_unless_it_says_otherwise(tmp_path: Path, backbone: Path) -> None:
    values = {
        "num_inference_steps": 7,
        "guidance_scale": 4.0,
        "controlnet_conditioning_scale": 1.5,
        "generators": {"controlnet": OPTIONS},
    }
    config = experiment(tmp_path, backbone, values, adherence={"num_images": 8})
    whole = Sampling(7, 4.0, 1.5, "a square", 0.0, 0.7)

    def sampling(**adherence: Any) -> Sampling:
        train = config.fine_tuning.model_copy(
            update={"adherence": config.fine_tuning.adherence.model_copy(update=adherence)}
        )
        return adherence_sampling(config.model_copy(update={"train": train}))

    assert sampling() == whole
    changed = sampling(num_inference_steps=2, guidance_scale=0.0, controlnet_conditioning_scale=2.0)
    assert changed == Sampling(2, 0.0, 2.0, "a square", 0.0, 0.7)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_settings_as_they_are_on_disk_give_what_the_backbones_own_class_gives(
    tmp_path: Path, kind: type[Any], name: str
) -> None:
    kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(tmp_path)
    settings = kind.load_config(tmp_path)
    config = ExperimentConfig.model_validate(
        {
            "experiment": "a",
            "data": {"dataset": "tiny"},
            "generate": {"scheduler": name},
            "train": {"pretrained_model_name_or_path": "a/b"},
        }
    )
    found = sampling_scheduler(settings, config.generate, config.fine_tuning, trained=True)
    through = type(found).from_config(
        kind.from_pretrained(tmp_path).config, **({"algorithm_type": "dpmsolver++"} if name == "dpmsolver++" else {})
    )
    assert dict(found.config) == dict(through.config)
    found.set_timesteps(5)
    through.set_timesteps(5)
    assert found.timesteps.equal(through.timesteps)


@pytest.mark.parametrize(
    ("scheduler", "steps", "settings", "named"),
    [
        ("ddim", 1001, {}, "num_inference_steps=1001: the backbone's noise schedule has 1000 steps"),
        ("unipc", 5000, {}, "num_inference_steps=5000"),
        ("ddim", 5, {"timestep_spacing": "planted"}, "cannot sample with"),
        ("unipc", 5, {"solver_order": "two"}, "cannot sample with"),
        ("dpmsolver++", 5, {"solver_type": "planted"}, "cannot sample with"),
        ("unipc", 5, {"steps_offset": 10**9}, "timesteps outside the noise schedule"),
        ("ddim", 5, {"trained_betas": [0.999999] * 1000, "timestep_spacing": "trailing"}, "not finite"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_it_is_trained_for(
    backbone: Path, scheduler: str, steps: int, settings: dict[str, Any], named: str
) -> None:
    config = plain(scheduler)
    with pytest.raises(MaskLoomError, match=named):
        check_sampling(
            {**DDPMScheduler().config, **settings, "_use_default_values": []},
            config.generate,
            config.fine_tuning,
            True,
            [3, steps],
        )


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_any_number_of_steps_that_the_noise_schedule_has_can_be_sampled(name: str) -> None:
    config = plain(name)
    check_sampling(DDPMScheduler().config, config.generate, config.fine_tuning, True, [1, 2, 7, 999])


def plain(scheduler: str) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "experiment": "a",
            "data": {"dataset": "tiny"},
            "generate": {"scheduler": scheduler},
            "train": {"pretrained_model_name_or_path": "a/b"},
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        {"control_guidance_end": "late"},
        {"control_guidance_start": 0.5, "control_guidance_end": 0.5},
        {"negative_prompt": 5},
    ],
)
def test_a_generators_options_are_checked_before_the_training_that_samples_with_them(
    tmp_path: Path, backbone: Path, options: dict[str, Any]
) -> None:
    config = experiment(tmp_path, backbone, {"generators": {"controlnet": options}})
    with pytest.raises(MaskLoomError, match=r"^generate\.generators\.controlnet: .*(control_guidance|negative_prompt)"):
        check_validation_sampling(config)


def test_the_steps_of_adherence_are_checked_too(tmp_path: Path, backbone: Path) -> None:
    config = experiment(tmp_path, backbone, {}, adherence={"num_inference_steps": 2000})
    with pytest.raises(MaskLoomError, match="num_inference_steps=2000"):
        check_validation_sampling(config)
