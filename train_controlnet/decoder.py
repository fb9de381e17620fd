"""Fine-tuning of the VAE's decoder on the train images, before the ControlNet: texture that a frozen VAE would lose.

The encoder stays as it is, bit for bit, so latents, their cache and the UNet stay valid, as with Stability AI's ft-MSE and ft-EMA
decoders for Stable Diffusion. Loss: 0.16 L1 + 0.84 (1 - SSIM), the weights of Zhao et al., Loss Functions for Image Restoration with Neural
Networks (2017), with SSIM at one scale (Wang et al., 2004). No perceptual network: the ceiling's Fréchet distance is measured with one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from maskloom.models.stable_diffusion.loading import load_part
from maskloom.models.stable_diffusion.objective import sample_latents
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import DecoderConfig, LoopConfig, TrainConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.errors import MaskLoomError, report_write_errors
from maskloom.pipeline.files.ownership import whole_folder
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws, keyed_generator
from maskloom.pipeline.training.resuming import check_resumable
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.pipeline.training.task import Task
from maskloom.train_controlnet.data.views import Views, open_views, pixels, size_buckets
from maskloom.train_controlnet.model_card import model_card

NAME = "vae"
CHECKPOINTS = "vae_training"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SSIM_WEIGHT = 0.84


def train_decoder(
    config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator, inputs: Mapping[str, str]
) -> dict[str, float]:
    """Train the decoder, resuming where an earlier run stopped, and write `generator/vae/`.

    A decoder that is finished is only written again. Its figures go to `logs/train/vae_decoder/metrics.jsonl`.

    Args:
        config: the experiment, with `train.vae_decoder` set.
        run: the run.
        contract: the real dataset's.
        accelerator: that of the training that follows; this one gets its own.
        inputs: digests of what the stage reads.

    Returns:
        PSNR in dB and SSIM on validation images, before and after; empty on other processes, and without such images.

    Raises:
        MaskLoomError: the VAE cannot be loaded, the loss was not finite, a checkpoint does not fit, or an engine shards weights.
    """
    decoder = config.fine_tuning.vae_decoder
    assert decoder is not None
    loop = decoder_loop(config.fine_tuning)
    own = make_accelerator(loop, run.logs("train") / "vae_decoder")  # a second training needs hooks of its own
    task = DecoderTask(config, run, contract, own)
    before: dict[str, float] = {}
    if own.is_main_process:
        say(f"train: the VAE's decoder, {loop.max_train_steps} steps")
        before = task.validate(0)
    with _told_of_the_decoder():
        TrainingLoop(task, loop, own, run.generator / CHECKPOINTS, config.seed, _decoder_inputs(inputs, decoder)).run()
    accelerator.gradient_accumulation_steps = (
        config.fine_tuning.gradient_accumulation_steps
    )  # accelerators share this number
    figures: dict[str, float] = {}
    if own.is_main_process:
        figures = _before_and_after(before, task.validate(loop.max_train_steps))
        _export(task.vae, config, loop, contract, run.generator / NAME)
    own.free_memory()
    accelerator.wait_for_everyone()
    return figures


def check_decoder_resumable(
    config: ExperimentConfig, checkpoints: Path, inputs: Mapping[str, str], force: bool
) -> None:
    """Refuse what `train_decoder` would refuse of the checkpoint that it would continue from; nothing is changed.

    Raises:
        MaskLoomError: it belongs to another training, or has more steps than are asked for.
    """
    decoder = config.fine_tuning.vae_decoder
    assert decoder is not None
    with _told_of_the_decoder():
        own = _decoder_inputs(inputs, decoder)
        check_resumable(decoder_loop(config.fine_tuning), checkpoints, config.seed, own, force)


def _decoder_inputs(inputs: Mapping[str, str], decoder: DecoderConfig) -> dict[str, str]:
    return {**inputs, "crop": str(decoder.crop)}


@contextmanager
def _told_of_the_decoder() -> Iterator[None]:
    """Name the section in errors of the shared loop, which knows only `train`."""
    try:
        yield
    except MaskLoomError as error:
        raise MaskLoomError(f"train.vae_decoder, whose own learning_rate counts: {error}") from error


def load_decoder(vae: AutoencoderKL, run: Run) -> None:
    """Give a VAE the weights of `generator/vae/`; those of its encoder are the backbone's.

    Raises:
        MaskLoomError: the file is missing or damaged, or belongs to another VAE.
    """
    file = run.generator / NAME / WEIGHTS
    try:
        vae.load_state_dict(load_file(file))
    except Exception as error:  # safetensors and torch raise errors of many kinds; the remedy is the same
        raise MaskLoomError(f"{file}: not the fine-tuned VAE of this backbone; run train again with --force") from error


def decoder_loop(train: TrainConfig) -> LoopConfig:
    """Return the shared loop's settings for the decoder: its own steps, rate and batch, the rest from `train`."""
    decoder = train.vae_decoder
    assert decoder is not None
    return LoopConfig(
        train_batch_size=decoder.train_batch_size,
        max_train_steps=decoder.max_train_steps,
        learning_rate=decoder.learning_rate,
        lr_scheduler="cosine",
        adam_weight_decay=0.0,  # the decoder starts trained: there is nothing to hold small
        use_8bit_adam=train.use_8bit_adam,
        mixed_precision=train.mixed_precision,
        allow_tf32=train.allow_tf32,
        checkpointing_steps=train.checkpointing_steps,
        checkpoints_total_limit=1,
        resume_from_checkpoint=train.resume_from_checkpoint and "latest",  # a path is the other training's
        validation_steps=train.validation_steps,
        logging_steps=train.logging_steps,
        report_to=None,
        dataloader_num_workers=train.dataloader_num_workers,
    )


def check_decoder_engine(kind: DistributedType) -> None:
    """Refuse engines that the small network does not need.

    Raises:
        MaskLoomError: FSDP or DeepSpeed is on.
    """
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise MaskLoomError(
            f"train.vae_decoder is trained whole on each process, and {kind.value} shards weights; use configs/accelerate/ddp.yaml, "
            "or set train.vae_decoder=null"
        )


class Decoder(nn.Module):
    """What is trained: latents -> images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return (B, 3, H, W) images, about -1 to 1, of (B, C, H/8, W/8) latents before `scaling_factor`."""
        return self.decoder(self.post_quant_conv(latents))


class TrainImages(Dataset[dict[str, Any]]):
    """The images of a split, whole."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": pixels(self.views.image(index))}


class DecoderTask(Task):
    """The decoder against images whose latents are drawn from the frozen encoder's posterior."""

    def __init__(self, config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator) -> None:
        """Load the VAE in float32 and open the images.

        Raises:
            MaskLoomError: the VAE cannot be loaded.
        """
        train = config.fine_tuning
        assert train.vae_decoder is not None
        self.crop, self.accelerator = train.vae_decoder.crop, accelerator
        self.validation_samples = train.validation_samples
        vae = load_part(BackboneSource.of(train), "vae")
        self.vae = vae.requires_grad_(False).eval().to(accelerator.device)
        decoder = Decoder(self.vae)
        self.networks = {"decoder": decoder.requires_grad_(True)}
        self.views = open_views(config, run, contract, augment=None)
        self.dataset, self.buckets = TrainImages(self.views["train"]), size_buckets(self.views["train"])

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the loss of random crops; see `Task.losses`."""
        images = random_crops(batch["pixels"], self.crop, draws)
        with torch.no_grad(), self.accelerator.autocast():
            moments = self.vae.encode(images).latent_dist.parameters.float()
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        latents = sample_latents(moments, draws.normal("decoder posterior", shape), 1.0)
        yield "decoder", reconstruction_loss(self.networks["decoder"](latents), images)

    def row_name(self, index: int) -> str:
        """Return the sample id of a training row."""
        return self.views["train"].sample_id(index)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Return loss, PSNR in dB and SSIM of validation images, whole, from the posterior's mean. Empty without such rows."""
        if "validation" not in self.views:
            return {}
        images = TrainImages(self.views["validation"])
        count = min(len(images), self.validation_samples)
        figures = [self._reconstruction_figures(images[i]["pixels"][None]) for i in range(count)]
        return {key: sum(each[key] for each in figures) / count for key in figures[0]}

    def _reconstruction_figures(self, image: Tensor) -> dict[str, float]:
        image = image.to(self.accelerator.device)
        with self.accelerator.autocast():
            found = self.vae.decode(self.vae.encode(image).latent_dist.mode()).sample.float()
        error = functional.mse_loss(_unit_range(found).clamp(0, 1), _unit_range(image))
        return {
            "loss": float(reconstruction_loss(found, image)),
            "psnr": float(-10 * torch.log10(error.clamp_min(1e-10))),
            "ssim": 1 - float(_dissimilarity(found.clamp(-1, 1), image)),
        }


def random_crops(images: Tensor, side: int, draws: Draws) -> Tensor:
    """Return one crop of each image, placed by (seed, position); a shorter side of the images stays whole.

    Args:
        images: (B, 3, H, W).
        side: of the crops, in pixels.
        draws: names seed and positions.
    """
    height, width = (min(side, length) for length in images.shape[2:])
    crops = []
    for image, position in zip(images, draws.positions, strict=True):
        generator = keyed_generator(draws.seed, "crop", position)
        top, left = (
            int(torch.randint(length - kept + 1, (), generator=generator))
            for length, kept in zip(image.shape[1:], (height, width), strict=True)
        )
        crops.append(image[:, top : top + height, left : left + width])
    return torch.stack(crops)


def reconstruction_loss(found: Tensor, images: Tensor) -> Tensor:
    """Return 0.16 L1 + 0.84 (1 - SSIM) on the range 0..1, a scalar.

    Args:
        found: (B, 3, H, W), about -1 to 1.
        images: (B, 3, H, W) in [-1, 1].
    """
    distance = functional.l1_loss(_unit_range(found.float()), _unit_range(images))
    return SSIM_WEIGHT * _dissimilarity(found, images) + (1 - SSIM_WEIGHT) * distance


def _dissimilarity(found: Tensor, images: Tensor) -> Tensor:
    """Return 1 - SSIM (Gaussian window of 11 pixels, sigma 1.5), averaged over the batch."""
    from monai.losses.ssim_loss import SSIMLoss

    return SSIMLoss(spatial_dims=2, data_range=1.0)(_unit_range(found.float()), _unit_range(images))


def _unit_range(images: Tensor) -> Tensor:
    return (images + 1) / 2


def _before_and_after(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Return PSNR and SSIM before and after, and say them; empty where there are none."""
    if not before:
        return {}
    say(
        f"train: the VAE's decoder on validation images: PSNR {before['psnr']:.2f} -> {after['psnr']:.2f} dB, "
        f"SSIM {before['ssim']:.3f} -> {after['ssim']:.3f}"
    )
    keys = ("psnr", "ssim")
    return {f"{key}_before": before[key] for key in keys} | {f"{key}_after": after[key] for key in keys}


def _export(vae: AutoencoderKL, config: ExperimentConfig, loop: LoopConfig, contract: Contract, target: Path) -> None:
    """Write the VAE whole or not at all, in float32, with its card."""
    own = {"controlnet": "none", "lora": [], "sd_locked": True, **loop.model_dump(exclude={"mixed_precision"})}
    as_trained = config.model_copy(update={"train": config.fine_tuning.model_copy(update=own)})
    vae.register_to_config(_name_or_path="")  # where the backbone lies is a matter of this machine
    with report_write_errors(target), whole_folder(target) as folder:
        vae.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(model_card(as_trained, contract, None, NAME), encoding="utf-8")
