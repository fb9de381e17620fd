"""The backbone recipe end to end at a tiny size, and the weights that are committed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from transformers import CLIPTokenizer

from maskloom.pipeline.config.loading import load_config
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.training_log import METRICS_FILE, append_metrics
from maskloom.train_backbone.__main__ import main
from maskloom.train_backbone.architecture import new_vae
from maskloom.train_backbone.config import Architecture, BackboneConfig
from maskloom.train_backbone.images import TrainImages, mirrored_text
from maskloom.train_backbone.recipe import last_losses, make_tokenizer, train_backbone
from maskloom.train_backbone.vae import VaeTask, latent_statistics, normalise_vae, normalised_moments
from maskloom.train_backbone.vocabulary import write_tokenizer
from tests.tiny_datasets import tiny_description, tiny_samples, write_dataset

ROOT = Path(__file__).parents[2]
NANO = ROOT / "assets" / "nano-sd"
MEGABYTE = 10**6
TINY = {
    "image_size": 32,
    "vae_channels": (8, 8, 8, 8),
    "vae_norm_groups": 4,
    "text_width": 16,
    "text_layers": 1,
    "text_heads": 2,
    "model_max_length": 16,
    "unet_channels": (8, 16, 16),
    "unet_head_dim": 8,
    "unet_norm_groups": 4,
}
LOOP = {
    "train_batch_size": 2,
    "max_train_steps": 2,
    "report_to": None,
    "use_ema": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
}


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A prepared dataset of 6 train images of 48x48 pixels."""
    folder = tmp_path / "dataset"
    write_dataset(
        folder, tiny_description(48), {split: tiny_samples(split, 6, 48) for split in ("train", "validation")}
    )
    return folder


@pytest.fixture
def config(tmp_path: Path, dataset: Path) -> BackboneConfig:
    """Both parts for two steps, the discriminator from the second on."""
    return BackboneConfig.model_validate(
        {
            "experiment": "tiny",
            "run_dir": tmp_path / "run",
            "output_dir": tmp_path / "backbone",
            "sources": [{"path": dataset, "copies": 2, "random_flip": True, "affine": True}],
            "architecture": TINY,
            "vae": {**LOOP, "pixels": 16, "crop": (20, 40), "adversarial_start": 2, "adversarial_ramp": 2},
            "denoiser": LOOP,
        }
    )


def test_recipe_writes_a_pipeline_that_loads_and_draws(config: BackboneConfig) -> None:
    train_backbone(config, force=False)
    pipe = StableDiffusionPipeline.from_pretrained(config.output_dir)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert not list(config.output_dir.rglob("*.bin"))
    image = pipe("toy imaging of a disc", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    card = (config.output_dir / "README.md").read_text(encoding="utf-8")
    assert "toy imaging of a disc" in card
    assert (config.output_dir / "samples.png").is_file()


def test_finished_recipe_writes_the_same_weights_again(config: BackboneConfig) -> None:
    train_backbone(config, force=False)
    files = sorted(config.output_dir.rglob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    train_backbone(config, force=False)
    assert [file.read_bytes() for file in files] == before


def test_the_card_names_the_last_loss_of_each_part_that_logged_one(config: BackboneConfig) -> None:
    log = config.run_folder / "logs" / "denoiser" / METRICS_FILE
    log.parent.mkdir(parents=True)
    for step, figures in enumerate(({"loss": 2.0}, {"loss": 1.0}, {"validation/loss": 3.0})):
        append_metrics(log, step, figures)
    assert last_losses(config) == {"last loss, denoiser": "1.0000"}


def test_force_deletes_no_checkpoint_that_a_part_goes_on_from(config: BackboneConfig) -> None:
    checkpoint = config.run_folder / "vae" / "checkpoint-1"
    OwnedFolder(config.run_folder).claim()
    OwnedFolder(checkpoint).claim()
    denoiser = config.denoiser.model_copy(update={"resume_from_checkpoint": str(checkpoint)})
    with pytest.raises(MaskLoomError, match=r"resume_from_checkpoint=.*checkpoint-1: --force deletes"):
        train_backbone(config.model_copy(update={"denoiser": denoiser}), force=True)
    assert OwnedFolder(checkpoint).is_marked()


def test_prompts_beyond_the_limit_are_told(config: BackboneConfig, capsys: pytest.CaptureFixture[str]) -> None:
    short = config.architecture.model_copy(update={"model_max_length": 5})
    make_tokenizer(config.model_copy(update={"architecture": short}), TrainImages(config.sources), report=True)
    said = capsys.readouterr().err
    assert (
        "backbone: 2 of 2 different prompts are longer than the text encoder reads (3 tokens; the longest has 5)"
        in said
    )
    assert "Shorten the prompts, or raise architecture.model_max_length" in said
    make_tokenizer(config, TrainImages(config.sources), report=True)
    assert "different prompts" not in capsys.readouterr().err


def test_missing_dataset_is_told_in_one_line(
    config: BackboneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--config", str(ROOT / "configs/backbone.yaml"), f"sources=[{{path: {tmp_path}/absent}}]"])
    assert stop.value.code == 2
    assert "absent: no such dataset" in capsys.readouterr().err


def test_dataset_smaller_than_the_backbone_is_refused(config: BackboneConfig) -> None:
    larger = config.model_copy(update={"architecture": Architecture(image_size=64)})
    with pytest.raises(MaskLoomError, match="prepare it with a square"):
        train_backbone(larger, force=False)


def test_images_of_several_sizes_are_refused(config: BackboneConfig, dataset: Path) -> None:
    about = tiny_description(48).model_copy(update={"buckets": ((48, 64),)})
    write_dataset(dataset, about, {"train": tiny_samples("train", 6, 48)})
    with pytest.raises(MaskLoomError, match="tiny holds images of several sizes; prepare it without"):
        train_backbone(config, force=False)


def test_configuration_in_the_repository_is_valid() -> None:
    config = load_config(ROOT / "configs/backbone.yaml", [], BackboneConfig)
    assert config.output_dir == Path("assets/nano-sd")


def test_parts_of_unlike_precision_are_refused() -> None:
    overrides = ["denoiser.mixed_precision=fp16"]
    with pytest.raises(MaskLoomError, match=r"denoiser\.mixed_precision must be the same"):
        load_config(ROOT / "configs/backbone.yaml", overrides, BackboneConfig)


def test_every_prompt_word_is_one_token_and_unknown_words_are_spelled(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, ["T1 brain MRI, superior axial slice", "Zebra"], 16)
    assert tokenizer.tokenize("zebra superior") == ["zebra</w>", "superior</w>"]
    assert "".join(tokenizer.tokenize("xylograph")) == "xylograph</w>"
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again("axial", padding="max_length").input_ids == tokenizer("axial", padding="max_length").input_ids
    assert again.model_max_length == 16


def test_normalising_moves_latents_and_leaves_reconstructions() -> None:
    torch.manual_seed(0)
    vae = new_vae(Architecture.model_validate(TINY)).eval().requires_grad_(False)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    moments = vae.encode(images).latent_dist.parameters
    before = vae.decode(moments.chunk(2, dim=1)[0]).sample
    centre, spread = latent_statistics(moments)
    normalise_vae(vae, centre, spread)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.parameters, normalised_moments(moments, centre, spread), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(posterior.mean).sample, before, rtol=1e-4, atol=1e-4)
    centre, spread = latent_statistics(posterior.parameters)
    torch.testing.assert_close(torch.cat([centre, spread]), torch.tensor([0.0] * 4 + [1.0] * 4), rtol=1e-3, atol=1e-3)


class Failing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise KeyError


def test_the_discriminator_learns_again_even_if_its_score_fails() -> None:
    task = VaeTask.__new__(VaeTask)
    task.networks, task.accelerator = {"discriminator": Failing()}, Accelerator(cpu=True)
    with pytest.raises(KeyError):
        task._frozen_score(torch.ones(1))
    assert task.networks["discriminator"].weight.requires_grad


def test_augmented_copies_are_stable_and_the_first_is_the_image(config: BackboneConfig) -> None:
    images = TrainImages(config.sources)
    assert len(images) == 12
    first, text = images.copy(0, 48, seed=0)
    torch.testing.assert_close(first, images[0]["image"] / 127.5 - 1)
    assert text == "toy imaging of a disc"
    bent, _ = images.copy(6, 48, seed=0)
    assert not torch.equal(bent, first)
    assert torch.equal(bent, images.copy(6, 48, seed=0)[0])


def test_mirroring_changes_the_sides_in_the_prompt() -> None:
    assert mirrored_text("a lesion, upper left, right of a leftover") == "a lesion, upper right, left of a leftover"


@pytest.fixture(scope="module")
def nano() -> StableDiffusionPipeline:
    """The committed backbone."""
    pipe = StableDiffusionPipeline.from_pretrained(NANO, local_files_only=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_committed_backbone_is_small_and_without_pickles() -> None:
    files = [path for path in NANO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md", ".png"}


def drawn(nano: StableDiffusionPipeline, prompt: str) -> np.ndarray:
    """Return three samples of a prompt as (3, 128, 128) in 0..1."""
    generator = torch.Generator().manual_seed(0)
    images = nano([prompt] * 3, num_inference_steps=8, guidance_scale=3.0, generator=generator, output_type="np").images
    return images.mean(axis=-1)


def test_committed_backbone_draws_what_the_prompt_says(nano: StableDiffusionPipeline) -> None:
    brain = drawn(nano, "T1 brain MRI, axial slice, middle level")
    breast = drawn(nano, "breast ultrasound, benign, scanner A")
    assert np.abs(brain - breast).mean() > 0.1
    # A brain slice is bright in the middle on a black ground; an ultrasound image fills its frame,
    # with bright skin on top.
    assert brain[:, 32:96, 32:96].mean() > 0.4
    assert brain[:, :8, :8].mean() < 0.1
    assert breast[:, :8].mean() > 0.4


def test_committed_backbone_knows_levels(nano: StableDiffusionPipeline) -> None:
    # In the template, brain covers 0.46..0.51 of a slice near the midline and at most 0.37 of a
    # lateral one.
    midline = drawn(nano, "T1 brain MRI, sagittal slice, midline level") > 0.2
    lateral = drawn(nano, "T1 brain MRI, sagittal slice, lateral level") > 0.2
    assert midline.mean() > 1.25 * lateral.mean()


def test_committed_backbone_carries_a_controlnet(nano: StableDiffusionPipeline) -> None:
    controlnet = ControlNetModel.from_unet(nano.unet)
    pipe = StableDiffusionControlNetPipeline(**nano.components, controlnet=controlnet, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    control = torch.zeros(1, 3, 128, 128)
    image = pipe("T1 brain MRI, axial slice", image=control, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 128, 128, 3)


@pytest.mark.parametrize("module", ["train_backbone", "train_controlnet.backbone"])
def test_both_names_of_the_command_are_the_same(module: str, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("experiment: b\ndatasets: []\nvae_steps: 3\n")
    command = [sys.executable, "-m", module, "--config", str(config)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {config}: ")
    helped = subprocess.run([*command[:3], "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert helped.returncode == 0
    assert "Train a small Stable Diffusion backbone" in helped.stdout
