"""ControlNet training as a task of the shared loop."""

from collections.abc import Iterator
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline.backbone import DTYPES, load_part, load_weights, use_xformers
from pipeline.config import ExperimentConfig, TrainConfig
from pipeline.contract import Contract, open_split
from pipeline.files import model_digest
from pipeline.randomness import Draws
from pipeline.runs import Run
from pipeline.training import Task
from train_controlnet.latent_cache import (
    MomentCache,
    cache_folder,
    drop_stale_caches,
    fill_embeddings,
    fill_moments,
    pixels,
    rgb_array,
)
from train_controlnet.objective import denoising_loss, prediction_target, sample_latents
from train_controlnet.validation import Validator


class ControlNetRows(Dataset[dict[str, Any]]):
    """A split as training rows: moments (or pixels), conditioning, and the number of the prompt's embedding."""

    def __init__(self, rows: datasets.Dataset, moments: MomentCache | None, prompt_numbers: dict[str, int]) -> None:
        """Keep the parts.

        Args:
            rows: contract rows.
            moments: the cache, or None to hand out pixels.
            prompt_numbers: row of each prompt in the embeddings.
        """
        columns = ["conditioning_image", "text"] + ([] if moments else ["image"])
        self.rows, self.moments, self.prompt_numbers = rows.select_columns(columns), moments, prompt_numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = {"pixels": pixels(row["image"])} if self.moments is None else {"moments": self.moments[index]}
        conditioning = torch.from_numpy(rgb_array(row["conditioning_image"])).permute(2, 0, 1)
        return {**image, "conditioning": conditioning, "prompt": self.prompt_numbers[row["text"]]}


class ControlNetTask(Task):
    """Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models (2023), on a frozen UNet."""

    def __init__(self, config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator) -> None:
        """Load the backbone, fill the caches, and make the rows.

        Raises:
            MaskLoomError: a part of the backbone cannot be loaded, or a switch needs a package that is missing.
        """
        self.config, self.device = config.train, accelerator.device
        self.dtype = DTYPES[config.train.mixed_precision]
        self._load_backbone(self.config)
        self.networks = {"controlnet": self._new_controlnet(self.config)}
        self.trained_parameters = sum(p.numel() for p in self.networks["controlnet"].parameters())
        self._fill_caches(run, contract, accelerator)
        self.validator = Validator(self, config, run, accelerator)

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the ControlNet's loss; see `Task.losses`."""
        latents = self.latents(batch, draws)
        noise = draws.normal("noise", latents.shape[1:])
        timesteps = draws.integers("timestep", self.scheduler.config.num_train_timesteps)
        dropped = draws.uniform("empty prompt") < self.config.proportion_empty_prompts
        prompts = torch.where(dropped, torch.zeros_like(batch["prompt"]), batch["prompt"])
        per_sample = self.sample_losses(latents, noise, timesteps, prompts, batch["conditioning"])
        yield "controlnet", per_sample.mean()

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """Return (B, C, h, w) float32 latents: a fresh draw from the posterior of each image."""
        moments = batch["moments"] if "moments" in batch else self.encode(batch["pixels"])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        return sample_latents(moments.float(), draws.normal("posterior", shape), self.vae.config.scaling_factor)

    def sample_losses(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompts: Tensor, conditioning: Tensor
    ) -> Tensor:
        """Return the loss of each sample, (B,).

        Args:
            latents: (B, C, h, w) float32.
            noise: (B, C, h, w) float32 standard normal.
            timesteps: (B,) int64.
            prompts: (B,) rows of the embeddings; 0 is the empty prompt.
            conditioning: (B, 3, H, W) uint8.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(self.dtype)
        text = self.embeddings[prompts.cpu()].to(self.device, self.dtype)
        control = conditioning.to(self.dtype) / 255
        down, mid = self.networks["controlnet"](
            noisy, timesteps, encoder_hidden_states=text, controlnet_cond=control, return_dict=False
        )
        prediction = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=[residual.to(self.dtype) for residual in down],
            mid_block_additional_residual=mid.to(self.dtype),
            return_dict=False,
        )[0]
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        return denoising_loss(self.scheduler, prediction, target, timesteps, self.config.snr_gamma)

    def validate(self, step: int) -> dict[str, float]:
        """Return the held-out loss by timestep bin, and write sample pictures."""
        return self.validator.figures(step)

    def row_name(self, index: int) -> str:
        """Return the sample id of a training row."""
        return str(self.sample_ids[index])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the moments (B, 2C, h, w) of (B, 3, H, W) images in [-1, 1]."""
        return self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Return the text encoder's last hidden states, (B, L, D)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def _load_backbone(self, config: TrainConfig) -> None:
        where = {"revision": config.revision, "variant": config.variant}
        name = config.pretrained_model_name_or_path
        self.tokenizer = load_part(CLIPTokenizer, name, subfolder="tokenizer", revision=config.revision)
        self.scheduler = load_part(DDPMScheduler, name, subfolder="scheduler", revision=config.revision)
        if config.prediction_type:
            self.scheduler.register_to_config(prediction_type=config.prediction_type)
        self.text_encoder = load_part(CLIPTextModel, name, subfolder="text_encoder", dtype=self.dtype, **where)
        self.vae = load_part(AutoencoderKL, name, subfolder="vae", torch_dtype=self.dtype, **where)
        self.unet = load_part(UNet2DConditionModel, name, subfolder="unet", torch_dtype=self.dtype, **where)
        for frozen in (self.text_encoder, self.vae, self.unet):
            frozen.requires_grad_(False).eval().to(self.device)
        if config.enable_xformers_memory_efficient_attention:
            use_xformers(self.unet)
        if config.unet_gradient_checkpointing:
            self.unet.train()  # diffusers recomputes activations in training mode only; SD's UNet has no dropout
            self.unet.enable_gradient_checkpointing()

    def _new_controlnet(self, config: TrainConfig) -> ControlNetModel:
        """Return a ControlNet in float32: a copy of the UNet's encoder, or given weights to go on from."""
        if config.controlnet_model_name_or_path:
            key = "train.controlnet_model_name_or_path"
            controlnet = load_weights(
                ControlNetModel, config.controlnet_model_name_or_path, key, torch_dtype=torch.float32
            )
        else:
            controlnet = ControlNetModel.from_unet(self.unet).float()
        if config.enable_xformers_memory_efficient_attention:
            use_xformers(controlnet)
        if config.gradient_checkpointing:
            controlnet.enable_gradient_checkpointing()
        return controlnet.train()

    def _fill_caches(self, run: Run, contract: Contract, accelerator: Accelerator) -> None:
        """Make training and validation rows; VAE and text encoder leave the device when the caches hold their work."""
        splits = {name: open_split(run.dataset, name) for name in ("train", "validation") if name in contract.splits}
        backbone = model_digest(self.config.pretrained_model_name_or_path, self.config.revision)
        folder = cache_folder(run.generator / "cache", [contract.digest, backbone, str(self.dtype)])
        if accelerator.is_main_process:
            drop_stale_caches(run.generator / "cache", folder)
        accelerator.wait_for_everyone()
        prompts = ["", *sorted({text for rows in splits.values() for text in rows["text"]} - {""})]
        self.embeddings = fill_embeddings(folder / "prompts.safetensors", prompts, self.embed, accelerator)
        numbers = {text: i for i, text in enumerate(prompts)}
        self.rows = {}
        for name, rows in splits.items():
            moments = fill_moments(folder / name, rows, self.encode, accelerator) if self.config.cache_latents else None
            self.rows[name] = ControlNetRows(rows, moments, numbers)
        self.dataset = self.rows["train"]
        self.sample_ids = splits["train"]["sample_id"]
        self.validation_split = splits.get("validation")
        self.text_encoder.to("cpu")
        if self.config.cache_latents:
            self.vae.to("cpu")
