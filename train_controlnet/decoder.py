"""Fine-tuning of the VAE's decoder on the train images, before the ControlNet.

It recovers texture that a frozen VAE would lose. The encoder stays bitwise the same, so latents,
their cache and the UNet stay valid, as with Stability AI's ft-MSE and ft-EMA decoders for Stable
Diffusion. Loss: 0.16 L1 + 0.84 (1 - SSIM), the weights of Zhao et al., Loss Functions for Image
Restoration with Neural Networks (2017), with SSIM at one scale (Wang et al., 2004). There is no
perceptual loss, because the Fréchet distance that evaluates the result uses such a network.
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
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
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
    config: ExperimentConfig,
    run: Run,
    dataset: MaskPromptDataset,
    accelerator: Accelerator,
    inputs: Mapping[str, str],
) -> dict[str, float]:
    """Train the decoder, resuming from the last checkpoint, and write `generator/vae/`.

    A finished decoder is only exported again. The training log is
    `logs/train/vae_decoder/metrics.jsonl`.

    Args:
        config: the experiment, with `train.vae_decoder` set.
        run: the run.
        dataset: the real dataset.
        accelerator: the accelerator of the training that follows; the decoder gets its own.
        inputs: digests of what the stage reads.

    Returns:
        PSNR in dB and SSIM on validation images, before and after; empty without such images and on
        all processes but the main one.

    Raises:
        MaskLoomError: the VAE cannot be loaded, the loss was not finite, or the checkpoint belongs
            to another training.
    """
    train, decoder = config.fine_tuning, config.fine_tuning.vae_decoder
    assert decoder is not None
    loop = decoder_loop(train)
    own = make_accelerator(loop, run.logs("train") / "vae_decoder")  # its hooks must not mix with the other training's
    vae = load_part(BackboneSource.of(train), "vae").to(own.device)
    views = open_views(config, dataset, augment=None)
    task = DecoderTask(decoder, vae, views, own, validation_samples=train.validation_samples)
    before: dict[str, float] = {}
    if own.is_main_process:
        say(f"train: the VAE's decoder, {loop.max_train_steps} steps")
        before = task.validate(0)
    with decoder_errors():
        own_inputs = decoder_inputs(inputs, decoder)
        TrainingLoop(task, loop, own, run.generator / CHECKPOINTS, config.seed, own_inputs).run()
    # All accelerators of a process share this number, so the other training's is set back.
    accelerator.gradient_accumulation_steps = train.gradient_accumulation_steps
    figures: dict[str, float] = {}
    if own.is_main_process:
        figures = report_improvement(before, task.validate(loop.max_train_steps))
        export_vae(task.vae, config, loop, dataset, run.generator / NAME)
    own.free_memory()
    accelerator.wait_for_everyone()
    return figures


def check_decoder_resumable(
    config: ExperimentConfig, checkpoints: Path, inputs: Mapping[str, str], force: bool
) -> None:
    """Check that `train_decoder` can resume from its last checkpoint; changes nothing on disk.

    Raises:
        MaskLoomError: the checkpoint belongs to another training, or has more steps than requested.
    """
    decoder = config.fine_tuning.vae_decoder
    assert decoder is not None
    with decoder_errors():
        own_inputs = decoder_inputs(inputs, decoder)
        check_resumable(decoder_loop(config.fine_tuning), checkpoints, config.seed, own_inputs, force)


def decoder_inputs(inputs: Mapping[str, str], decoder: DecoderConfig) -> dict[str, str]:
    """Return the inputs that a checkpoint of the decoder depends on."""
    return {**inputs, "crop": str(decoder.crop)}


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Name `train.vae_decoder` in errors of the shared loop, which knows only `train`."""
    try:
        yield
    except MaskLoomError as error:
        raise MaskLoomError(f"train.vae_decoder, whose own learning_rate counts: {error}") from error


def load_decoder(vae: AutoencoderKL, run: Run) -> None:
    """Load the weights in `generator/vae/` into a VAE; those of its encoder are the backbone's.

    Raises:
        MaskLoomError: the file is missing or damaged, or belongs to another VAE.
    """
    file = run.generator / NAME / WEIGHTS
    try:
        vae.load_state_dict(load_file(file))
    except Exception as error:  # safetensors and torch raise errors of many kinds; the remedy is the same
        raise MaskLoomError(f"{file}: not the fine-tuned VAE of this backbone; run train again with --force") from error


def decoder_loop(train: TrainConfig) -> LoopConfig:
    """Return the settings of the shared loop for the decoder.

    Steps, learning rate and batch size are the decoder's own; the others come from `train`.
    """
    decoder = train.vae_decoder
    assert decoder is not None
    return LoopConfig(
        train_batch_size=decoder.train_batch_size,
        max_train_steps=decoder.max_train_steps,
        learning_rate=decoder.learning_rate,
        lr_scheduler="cosine",
        adam_weight_decay=0.0,  # the weights start trained and should not shrink
        use_8bit_adam=train.use_8bit_adam,
        mixed_precision=train.mixed_precision,
        allow_tf32=train.allow_tf32,
        checkpointing_steps=train.checkpointing_steps,
        checkpoints_total_limit=1,
        resume_from_checkpoint=train.resume_from_checkpoint
        and "latest",  # a path names a checkpoint of the other training
        validation_steps=train.validation_steps,
        logging_steps=train.logging_steps,
        report_to=None,
        dataloader_num_workers=train.dataloader_num_workers,
    )


def check_decoder_engine(kind: DistributedType) -> None:
    """Check that no engine shards the weights of the decoder.

    Raises:
        MaskLoomError: FSDP or DeepSpeed is on.
    """
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise MaskLoomError(
            f"train.vae_decoder is trained whole on each process, and {kind.value} shards weights; "
            "use configs/accelerate/ddp.yaml, or set train.vae_decoder=null"
        )


class Decoder(nn.Module):
    """The trained part of the VAE: latents -> images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about -1 to 1.

        Args:
            latents: (B, C, H/8, W/8), not multiplied by `scaling_factor`.
        """
        return self.decoder(self.post_quant_conv(latents))


class TrainImages(Dataset[dict[str, Any]]):
    """The whole images of a split, as `pixels`: (3, H, W) float32 in [-1, 1]."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": pixels(self.views.image(index))}


class DecoderTask(Task):
    """Trains the decoder to reconstruct images from samples of the frozen encoder's posterior."""

    def __init__(
        self,
        config: DecoderConfig,
        vae: AutoencoderKL,
        views: Mapping[str, Views],
        accelerator: Accelerator,
        validation_samples: int,
    ) -> None:
        """Store the networks, data and settings, and freeze all weights but the decoder's.

        Args:
            config: the section `train.vae_decoder`.
            vae: in float32, on the accelerator's device.
            views: the images of `train` and, if there are any, of `validation`.
            accelerator: the accelerator of the training.
            validation_samples: number of validation images to reconstruct.
        """
        self.crop, self.accelerator, self.validation_samples = config.crop, accelerator, validation_samples
        self.vae = vae.requires_grad_(False).eval()
        decoder = Decoder(self.vae)
        self.networks = {"decoder": decoder.requires_grad_(True)}
        self.views = views
        self.dataset, self.buckets = TrainImages(views["train"]), size_buckets(views["train"])

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
        """Return loss, PSNR in dB and SSIM of whole validation images, decoded from the mean.

        Empty without validation images.
        """
        if "validation" not in self.views:
            return {}
        images = TrainImages(self.views["validation"])
        count = min(len(images), self.validation_samples)
        figures = [self._reconstruction_figures(images[i]["pixels"][None]) for i in range(count)]
        return {key: sum(each[key] for each in figures) / count for key in figures[0]}

    def _reconstruction_figures(self, image: Tensor) -> dict[str, float]:
        """Return loss, PSNR in dB and SSIM of one image, (1, 3, H, W) in [-1, 1]."""
        image = image.to(self.accelerator.device)
        with self.accelerator.autocast():
            found = self.vae.decode(self.vae.encode(image).latent_dist.mode()).sample.float()
        error = functional.mse_loss(unit_range(found).clamp(0, 1), unit_range(image))
        return {
            "loss": float(reconstruction_loss(found, image)),
            "psnr": float(-10 * torch.log10(error.clamp_min(1e-10))),
            "ssim": 1 - float(dissimilarity(found.clamp(-1, 1), image)),
        }


def random_crops(images: Tensor, side: int, draws: Draws) -> Tensor:
    """Return one crop of each image; its place depends on (seed, position).

    Args:
        images: (B, 3, H, W).
        side: side of the crops in pixels; a shorter side of the images is not cropped.
        draws: holds the seed and the positions.
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
    """Return 0.16 L1 + 0.84 (1 - SSIM) of images scaled to 0..1, a scalar.

    Args:
        found: (B, 3, H, W), about -1 to 1.
        images: (B, 3, H, W) in [-1, 1].
    """
    distance = functional.l1_loss(unit_range(found.float()), unit_range(images))
    return SSIM_WEIGHT * dissimilarity(found, images) + (1 - SSIM_WEIGHT) * distance


def dissimilarity(found: Tensor, images: Tensor) -> Tensor:
    """Return 1 - SSIM (Gaussian window of 11 pixels, sigma 1.5), averaged over the batch."""
    from monai.losses.ssim_loss import SSIMLoss

    return SSIMLoss(spatial_dims=2, data_range=1.0)(unit_range(found.float()), unit_range(images))


def unit_range(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as images in 0..1."""
    return (images + 1) / 2


def report_improvement(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Print and return PSNR and SSIM before and after; empty without validation images."""
    if not before:
        return {}
    say(
        f"train: the VAE's decoder on validation images: PSNR {before['psnr']:.2f} -> {after['psnr']:.2f} dB, "
        f"SSIM {before['ssim']:.3f} -> {after['ssim']:.3f}"
    )
    keys = ("psnr", "ssim")
    return {f"{key}_before": before[key] for key in keys} | {f"{key}_after": after[key] for key in keys}


def export_vae(
    vae: AutoencoderKL, config: ExperimentConfig, loop: LoopConfig, dataset: MaskPromptDataset, target: Path
) -> None:
    """Write the VAE in float32 with its model card, atomically."""
    own = {"controlnet": "none", "lora": [], "sd_locked": True, **loop.model_dump(exclude={"mixed_precision"})}
    as_trained = config.model_copy(update={"train": config.fine_tuning.model_copy(update=own)})
    vae.register_to_config(_name_or_path="")  # a local path of this machine
    with report_write_errors(target), whole_folder(target) as folder:
        vae.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(model_card(as_trained, dataset, None, NAME), encoding="utf-8")
