import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskloom.generate.diffusion import Sampler
from maskloom.generate.generate import open_generators
from maskloom.generate.generator import Condition
from maskloom.models.stable_diffusion.sampling import Sampling
from maskloom.models.stable_diffusion.trained_pipeline import load_backbone
from maskloom.pipeline.errors import MaskLoomError
from tests.generate.workbench import PLAIN, Bench
from tests.tiny_datasets import tiny_description

CPU = torch.device("cpu")
SIZES = [(32, 32)]
KEY = "train.pretrained_model_name_or_path"


def condition(seed: int, text: str = "a disc") -> Condition:
    return Condition(text, None, np.zeros((32, 32, 3), np.uint8), 0, seed)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("unipc", "UniPCMultistepScheduler"),
        ("dpmsolver++", "DPMSolverMultistepScheduler"),
        ("ddim", "DDIMScheduler"),
    ],
)
def test_schedulers_keep_the_noise_schedule_of_the_backbone(bench: Bench, name: str, kind: str):
    config = bench.config(scheduler=name)
    pipe = load_backbone(config, CPU, {}, SIZES)
    assert type(pipe.scheduler).__name__ == kind
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    assert pipe.scheduler.config.prediction_type == "epsilon"
    images = Sampler(pipe, Sampling.of(config.generate), tiny_description()).images([condition(1)])
    assert images.shape == (1, 32, 32)


def test_an_image_is_that_of_its_seed_and_prompt(bench: Bench):
    config = bench.config()
    sampler = Sampler(load_backbone(config, CPU, {}, SIZES), Sampling.of(config.generate), tiny_description())
    first, again, seed, text = sampler.images([condition(1), condition(1), condition(2), condition(1, "square")])
    np.testing.assert_allclose(first, again, atol=1e-5)
    assert abs(first - seed).max() > 0.01
    assert abs(first - text).max() > 1e-4


def test_the_mean_of_the_channels_is_grey(bench: Bench):
    config = bench.config()
    pipe = load_backbone(config, CPU, {}, SIZES)
    grey = Sampler(pipe, Sampling.of(config.generate), tiny_description()).images([condition(1)])
    colour = Sampler(pipe, Sampling.of(config.generate), tiny_description(channels=3)).images([condition(1)])
    np.testing.assert_allclose(grey, colour.mean(axis=-1), atol=1e-6)


def test_the_control_follows_its_scale(bench: Bench):
    config = bench.config(PLAIN, generators={"controlnet": {}, "text_only": {}}, controlnet_conditioning_scale=0.0)
    generators = open_generators(config, bench.run).values()
    for one in generators:
        one.load(CPU, tiny_description())
    switched_off, text_only = (one.images([condition(3)]) for one in generators)
    np.testing.assert_allclose(switched_off, text_only, atol=1e-5)


def test_bfloat16_weights(bench: Bench):
    pipe = load_backbone(bench.config(mixed_precision="bf16"), CPU, {}, SIZES)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_large_images_are_decoded_one_by_one(bench: Bench):
    config = bench.config()
    assert not load_backbone(config, CPU, {}, SIZES).vae.use_slicing
    assert load_backbone(config, CPU, {}, [*SIZES, (512, 512)]).vae.use_slicing


def test_conditioning_images_are_embedded_once_a_batch(bench: Bench):
    generator = open_generators(bench.config(num_inference_steps=4), bench.run)["controlnet"]
    generator.load(CPU, tiny_description())
    calls = []
    first_layer = generator.sampler.pipe.controlnet.controlnet_cond_embedding.conv_in
    first_layer.register_forward_hook(lambda *_: calls.append(1))
    black, white = (replace(condition(1), conditioning_image=np.full((32, 32, 3), v, np.uint8)) for v in (0, 255))
    first, second = generator.images([black]), generator.images([white])
    assert len(calls) == 2
    assert (first != second).any()


@pytest.mark.parametrize("name", ["controlnet", "lora", "text_only"])
def test_a_mistyped_backbone_is_told_before_anything_is_written(bench: Bench, name: str):
    config = bench.config([f"{KEY}={bench.folder}/nowhere"], generators={name: {}})
    with pytest.raises(MaskLoomError, match=f"{KEY}=.*nowhere: no such folder"):
        open_generators(config, bench.run)[name].check()


def test_a_damaged_backbone(bench: Bench, tmp_path: Path):
    shutil.copytree(bench.backbone, tmp_path / "damaged")
    (tmp_path / "damaged/unet/diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(MaskLoomError, match=f"{KEY}: .*damaged"):
        load_backbone(bench.config([f"{KEY}={tmp_path}/damaged"]), CPU, {}, SIZES)


def test_xformers_where_it_is_not_installed(bench: Bench):
    with pytest.raises(MaskLoomError, match=r"enable_xformers_memory_efficient_attention: .*xformers"):
        load_backbone(bench.config(enable_xformers_memory_efficient_attention=True), CPU, {}, SIZES)
