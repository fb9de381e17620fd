"""Fine-tuning of the VAE's decoder: what changes, what does not, and that it goes on where it
stopped.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from skimage.metrics import structural_similarity
from torch import Tensor

from maskloom.models.stable_diffusion.loading import load_part
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import DecoderConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.checkpoints import checkpoint_steps
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_controlnet.data.views import open_views
from maskloom.train_controlnet.decoder import (
    CHECKPOINTS,
    WEIGHTS,
    DecoderTask,
    check_decoder_engine,
    decoder_loop,
    load_decoder,
    random_crops,
    reconstruction_loss,
    train_decoder,
)
from maskloom.train_controlnet.train import train_stage
from tests.tiny_datasets import Sample, tiny_description, write_tiny_run
from tests.train_controlnet.conftest import tiny_config

INPUTS = {"dataset": "d", "backbone": "b"}
CPU = torch.device("cpu")
DECODER = {"max_train_steps": 4, "learning_rate": 1e-3, "train_batch_size": 2, "crop": 64}


def with_decoder(config: ExperimentConfig, decoder: dict[str, Any] | None = None, **train: Any) -> ExperimentConfig:
    """Return the experiment with fine-tuning of the decoder; pictures cost time and are off."""
    backbone = Path(config.train.pretrained_model_name_or_path)
    values = {
        "num_validation_images": 0,
        "validation_samples": 2,
        "vae_decoder": {**DECODER, **(decoder or {})},
        **train,
    }
    return tiny_config(config.run_folder, backbone, **values)


def trained(config: ExperimentConfig) -> tuple[bytes, dict[str, float]]:
    """Return the bytes of the exported VAE, and the figures."""
    run = Run(config.run_folder)
    figures = train_decoder(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True), INPUTS)
    return (run.generator / "vae" / WEIGHTS).read_bytes(), figures


def test_the_decoder_learns_and_the_encoder_stays_bit_for_bit(config: ExperimentConfig, backbone: Path) -> None:
    _, figures = trained(with_decoder(config, {"max_train_steps": 30, "learning_rate": 5e-3}))
    folder = config.run_folder / "generator" / "vae"
    vae = AutoencoderKL.from_pretrained(folder)
    before = AutoencoderKL.from_pretrained(backbone, subfolder="vae").state_dict()
    for name, weight in vae.state_dict().items():
        learnt = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(weight, before[name]) != learnt, name
    assert figures["psnr_after"] > figures["psnr_before"] + 1
    assert figures["ssim_after"] > figures["ssim_before"]
    assert json.loads((folder / "config.json").read_text())["_name_or_path"] == ""
    lines = (config.run_folder / "logs/train/vae_decoder/metrics.jsonl").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {"loss", "validation/loss", "validation/psnr", "validation/ssim"} <= logged


def test_the_card_tells_of_this_training(config: ExperimentConfig) -> None:
    trained(with_decoder(config, lora=["unet"]))
    card = (config.run_folder / "generator/vae/README.md").read_text()
    assert "vae" in yaml.safe_load(card.split("---")[1])["tags"]
    assert "| trained | the VAE's decoder |" in card
    assert "| steps | 4 of 2 x 1 samples per process |" in card
    assert "| learning rate | 0.001, cosine, warm-up 0 |" in card


def test_an_interrupted_training_ends_with_the_same_bytes(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, generator = with_decoder(config), config.run_folder / "generator"
    whole = trained(settings)
    shutil.rmtree(generator)
    losses = DecoderTask.losses

    def interrupted(self: DecoderTask, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if draws.positions[0] == 6:
            raise KeyboardInterrupt
        return losses(self, batch, draws)

    monkeypatch.setattr(DecoderTask, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(settings)
    monkeypatch.undo()
    assert list(checkpoint_steps(generator / CHECKPOINTS)) == [2]
    assert not (generator / "vae").exists()
    assert trained(settings) == whole
    shutil.rmtree(generator / "vae")
    assert trained(settings) == whole  # nothing left to train: only written again


@pytest.mark.parametrize("decoder", [{"crop": 128}, {"learning_rate": 2e-3}])
def test_a_checkpoint_of_other_settings_is_refused(config: ExperimentConfig, decoder: dict[str, Any]) -> None:
    trained(with_decoder(config))
    named = next(iter(decoder))
    with pytest.raises(MaskLoomError, match=rf"train\.vae_decoder.*another training \({named}: .*--force"):
        trained(with_decoder(config, decoder))


def test_the_accumulation_of_the_training_that_follows_is_kept(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    settings = with_decoder(config, gradient_accumulation_steps=3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    train_decoder(settings, run, MaskPromptDataset.open(run.dataset), accelerator, INPUTS)
    assert accelerator.gradient_accumulation_steps == 3


def test_the_stage_trains_the_decoder_first_and_its_pictures_use_it(config: ExperimentConfig, backbone: Path) -> None:
    run = Run(config.run_folder)
    seen = {}
    for name, settings in (
        ("tuned", with_decoder(config, max_train_steps=2, num_validation_images=1)),
        ("plain", with_decoder(config, max_train_steps=2, num_validation_images=1, vae_decoder=None)),
    ):
        train_stage(settings, force=True)
        picture = (run.logs("train") / "images/step-000002.png").read_bytes()
        seen[name] = (run.generator / "controlnet" / WEIGHTS).read_bytes(), picture
        results = read_json(run.logs("train") / "stage.json", "")["results"]
        assert (run.generator / "vae" / "README.md").exists() == ("vae_decoder" in results) == (name == "tuned")
    assert (
        seen["tuned"][0] == seen["plain"][0]
    )  # the encoder, and with it the ControlNet, does not depend on the decoder
    assert seen["tuned"][1] != seen["plain"][1]


def test_loading_takes_the_decoder_and_leaves_the_encoder(config: ExperimentConfig, backbone: Path) -> None:
    trained(with_decoder(config))
    run = Run(config.run_folder)
    vae = AutoencoderKL.from_pretrained(backbone, subfolder="vae", torch_dtype=torch.bfloat16)
    encoder = {name: weight.clone() for name, weight in vae.encoder.state_dict().items()}
    load_decoder(vae, run)
    assert all(torch.equal(weight, encoder[name]) for name, weight in vae.encoder.state_dict().items())
    tuned = load_file(run.generator / "vae" / WEIGHTS)
    assert torch.equal(vae.decoder.conv_out.weight, tuned["decoder.conv_out.weight"].bfloat16())


def test_a_lost_or_foreign_vae_is_named(config: ExperimentConfig, backbone: Path) -> None:
    vae, run = AutoencoderKL.from_pretrained(backbone, subfolder="vae"), Run(config.run_folder)
    with pytest.raises(MaskLoomError, match=r"vae/diffusion_pytorch_model.safetensors: .*run train again with --force"):
        load_decoder(vae, run)
    (run.generator / "vae").mkdir(parents=True)
    save_file({"other": torch.zeros(1)}, run.generator / "vae" / WEIGHTS)
    with pytest.raises(MaskLoomError, match="not the fine-tuned VAE of this backbone"):
        load_decoder(vae, run)


def test_without_validation_images_there_are_no_figures(tmp_path: Path, backbone: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 4})
    assert trained(tiny_config(tmp_path, backbone, vae_decoder=DECODER))[1] == {}


def test_images_of_several_sizes_are_learnt_in_batches_of_one(tmp_path: Path, backbone: Path) -> None:
    def grow_squares(sample: Sample) -> None:
        if sample.label == 1:
            sample.image, sample.mask = np.pad(sample.image, (0, 8), mode="reflect"), np.pad(sample.mask, (0, 8))
            sample.conditioning_image = np.pad(sample.conditioning_image, [(0, 8), (0, 8), (0, 0)])

    about = tiny_description().model_copy(update={"buckets": ((40, 40),)})
    write_tiny_run(tmp_path, {}, {"train": 8, "validation": 4}, description=about, change=grow_squares)
    _, figures = trained(tiny_config(tmp_path, backbone, vae_decoder=DECODER))
    assert figures["psnr_after"] > figures["psnr_before"]


def test_a_loss_that_is_not_finite_names_the_key(config: ExperimentConfig) -> None:
    with pytest.raises(
        MaskLoomError, match=r"train\.vae_decoder, whose own learning_rate counts: .*not finite at step"
    ):
        trained(with_decoder(config, {"learning_rate": 1e12}))


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_engines_that_shard_are_refused(kind: DistributedType) -> None:
    with pytest.raises(MaskLoomError, match=rf"train\.vae_decoder .*{kind.value} shards weights"):
        check_decoder_engine(kind)
    check_decoder_engine(DistributedType.MULTI_GPU)


def test_crops_are_keyed_to_the_position_and_lie_in_the_image() -> None:
    image = torch.arange(3 * 96 * 80, dtype=torch.float32).reshape(1, 3, 96, 80)
    batch = image.repeat(3, 1, 1, 1)
    one = random_crops(batch, 64, Draws(0, [7, 8, 7], CPU))
    assert one.shape == (3, 3, 64, 64)
    assert torch.equal(one[0], one[2])
    assert not torch.equal(one[0], one[1])
    assert torch.equal(random_crops(image, 64, Draws(0, [8], CPU))[0], one[1])
    assert not torch.equal(random_crops(image, 64, Draws(1, [7], CPU))[0], one[0])
    corners = [int(random_crops(image, 64, Draws(0, [p], CPU))[0, 0, 0, 0]) for p in range(300)]
    assert ({c // 80 for c in corners}, {c % 80 for c in corners}) == (set(range(33)), set(range(17)))
    assert torch.equal(random_crops(image, 256, Draws(0, [7], CPU)), image)


def test_the_posterior_is_sampled_anew_at_each_position(config: ExperimentConfig) -> None:
    settings = with_decoder(config)
    train, dataset = settings.fine_tuning, MaskPromptDataset.open(Run(config.run_folder).dataset)
    vae = load_part(BackboneSource.of(train), "vae")
    task = DecoderTask(train.vae_decoder, vae, open_views(settings, dataset, None), Accelerator(cpu=True), 2)
    task.vae.quant_conv.bias[4:] = 0.0  # a posterior wide enough to matter
    batch = {"pixels": task.dataset[0]["pixels"][None]}
    losses = [next(task.losses(batch, Draws(0, [p], CPU)))[1].item() for p in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_is_l1_and_ssim_as_others_compute_them() -> None:
    random = np.random.default_rng(0)
    images = random.uniform(0, 1, (2, 3, 40, 40))
    found = (images + random.normal(0, 0.1, images.shape)).clip(0, 1)
    ssim = [
        structural_similarity(
            *pair, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for pair in zip(images, found, strict=True)
    ]
    expected = 0.84 * (1 - np.mean(ssim)) + 0.16 * abs(images - found).mean()
    as_tensors = (torch.from_numpy(2 * one - 1).float() for one in (found, images))
    assert float(reconstruction_loss(*as_tensors)) == pytest.approx(
        expected, rel=0.01
    )  # they treat the border otherwise
    assert float(reconstruction_loss(torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("wanted", "taken"), [("latest", "latest"), ("runs/x/checkpoint-3", "latest"), (None, None)])
def test_the_loop_takes_its_own_settings_and_the_rest_of_train(
    config: ExperimentConfig, wanted: str | None, taken: str | None
) -> None:
    train = with_decoder(config, resume_from_checkpoint=wanted, gradient_accumulation_steps=4, use_ema=True).train
    loop = decoder_loop(train)
    assert (loop.max_train_steps, loop.learning_rate, loop.train_batch_size) == (4, 1e-3, 2)
    assert (loop.checkpointing_steps, loop.validation_steps, loop.logging_steps) == (2, 3, 2)
    assert (loop.gradient_accumulation_steps, loop.use_ema, loop.report_to) == (1, False, None)
    assert loop.resume_from_checkpoint == taken


def test_settings_of_the_decoder_are_checked() -> None:
    with pytest.raises(ValueError, match="crop"):
        DecoderConfig(crop=100)
