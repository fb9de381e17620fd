"""Training of a ControlNet, adapters, or both, as a task of the shared loop."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from maskloom.models.stable_diffusion.objective import (
    denoising_losses,
    lesion_weights,
    prediction_target,
    sample_latents,
    timestep_weights,
)
from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder, tell_cuts, text_states
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Contract, open_split
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.loop import Task
from maskloom.pipeline.training.precision import DTYPES
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_controlnet.data.latent_cache import (
    CACHE_FOLDER,
    cache_folder,
    drop_stale_caches,
    fill_embeddings,
    fill_views,
)
from maskloom.train_controlnet.data.prompts import numbered_prompts
from maskloom.train_controlnet.data.rows import TrainingRows, Views, size_buckets
from maskloom.train_controlnet.decoder import load_decoder
from maskloom.train_controlnet.networks import Networks, load_networks
from maskloom.train_controlnet.validation.validator import Validator

OPTIMIZER = "denoiser"


class DiffusionTask(Task):
    """Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models (2023); Hu et al., LoRA (2021)."""

    def __init__(
        self,
        config: ExperimentConfig,
        run: Run,
        contract: Contract,
        accelerator: Accelerator,
        parts: Networks | None = None,
    ) -> None:
        """Fill the caches and make the rows.

        Args:
            config: the experiment.
            run: where the caches are kept.
            contract: the real dataset's.
            accelerator: of the training.
            parts: the networks; None: they are loaded.

        Raises:
            MaskLoomError: a part of the backbone cannot be loaded, or a switch needs a package that is missing.
        """
        self.config, self.device = config.fine_tuning, accelerator.device
        self.dtype = DTYPES[config.fine_tuning.mixed_precision]
        self.parts = load_networks(config.fine_tuning, self.device) if parts is None else parts
        if config.fine_tuning.vae_decoder is not None:  # for pictures and adherence; the encoder is the backbone's
            load_decoder(self.parts.vae, run)
        self.scheduler = self.parts.scheduler
        self.prompt_encoder = PromptEncoder.of(
            self.parts.tokenizer, self.parts.text_encoder.config, config.fine_tuning.prompt_chunks
        )
        self.networks = self.parts.trained()
        self.trained_parameters = sum(p.numel() for p in self.parameters()[OPTIMIZER])
        self._fill_caches(config, run, contract, accelerator)
        self.validator = Validator(self, config, run, contract, accelerator)

    def parameters(self) -> dict[str, list[torch.nn.Parameter]]:
        """Return all trained weights as one optimizer's."""
        return {OPTIMIZER: [p for net in self.networks.values() for p in net.parameters() if p.requires_grad]}

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield the weighted denoising loss; see `Task.losses`."""
        latents = self.latents(batch, draws)
        noise = self._noise(latents, draws)
        timesteps = draws.integers("timestep", self.scheduler.config.num_train_timesteps)
        prompts, conditioning = self.led_by(batch, draws)
        losses = self.sample_losses(latents, noise, timesteps, prompts, conditioning, batch.get("foreground"))
        weights = timestep_weights(
            self.scheduler, timesteps, self.config.snr_gamma, self.config.debiased_estimation_loss
        )
        yield OPTIMIZER, (losses * weights).mean()

    def led_by(self, batch: dict[str, Any], draws: Draws) -> tuple[Tensor, Tensor | None]:
        """Return numbers of prompts and conditioning images, some of each left out, independently: the empty prompt, a black image."""
        without_prompt = draws.uniform("empty prompt") < self.config.proportion_empty_prompts
        prompts = batch["prompt"].masked_fill(without_prompt, 0)
        conditioning = batch.get("conditioning")
        if conditioning is not None and self.config.proportion_empty_conditioning:
            without_mask = draws.uniform("empty conditioning") < self.config.proportion_empty_conditioning
            conditioning = conditioning * ~without_mask[:, None, None, None]
        return prompts, conditioning

    def latents(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """Return (B, C, h, w) float32 latents: a fresh draw from the posterior of each image."""
        moments = batch["moments"] if "moments" in batch else self.encode(batch["pixels"])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        return sample_latents(moments.float(), draws.normal("posterior", shape), self.parts.vae.config.scaling_factor)

    def sample_losses(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        prompts: Tensor,
        conditioning: Tensor | None,
        foreground: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of each sample, (B,), before its timestep's weight.

        Args:
            latents: (B, C, h, w) float32.
            noise: (B, C, h, w) float32 standard normal.
            timesteps: (B,) int64.
            prompts: (B,) numbers of the prompts; 0 is the empty prompt.
            conditioning: (B, 3, H, W) uint8; None without a ControlNet.
            foreground: (B, H, W) of 0 and 1 where the mask's foreground counts more; None: all counts alike.
        """
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.prediction(noisy, timesteps, prompts, conditioning)
        target = prediction_target(self.scheduler, latents, noise, timesteps)
        if foreground is None:
            return denoising_losses(prediction, target)
        return denoising_losses(
            prediction,
            target,
            lesion_weights(foreground, self.config.lesion_loss_weight, (latents.shape[2], latents.shape[3])),
        )

    def prediction(self, noisy: Tensor, timesteps: Tensor, prompts: Tensor, conditioning: Tensor | None) -> Tensor:
        """Return the UNet's output, (B, C, h, w), led by the ControlNet if there is one; arguments as in `sample_losses`."""
        noisy, text = noisy.to(self.dtype), self._text_states(prompts)
        residuals: dict[str, Any] = {}
        if self.parts.controlnet is not None:
            assert conditioning is not None
            down, mid = self._network("controlnet")(
                noisy,
                timesteps,
                encoder_hidden_states=text,
                controlnet_cond=conditioning.to(self.dtype) / 255,
                return_dict=False,
            )
            residuals = {
                "down_block_additional_residuals": [residual.to(self.dtype) for residual in down],
                "mid_block_additional_residual": mid.to(self.dtype),
            }
        return self._network("unet")(noisy, timesteps, encoder_hidden_states=text, return_dict=False, **residuals)[0]

    def validate(self, step: int) -> dict[str, float]:
        """Return the held-out loss by timestep bin and more, and write sample pictures."""
        return self.validator.figures(step)

    def row_name(self, index: int) -> str:
        """Return the sample id of a training row."""
        return self.views["train"].sample_id(index)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the moments (B, 2C, h, w) of (B, 3, H, W) images in [-1, 1]."""
        vae = self.parts.vae
        return vae.encode(images.to(self.device, vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> Tensor:
        """Return the text encoder's last hidden states, (B, L, D); L counts the tokens of all pieces of a prompt."""
        return text_states(self.parts.text_encoder, self.prompt_encoder.tokens(prompts).to(self.device))

    def _network(self, name: str) -> Any:
        """Return a network as the loop prepared it, or as it is where it is not trained."""
        return self.networks[name] if name in self.networks else getattr(self.parts, name)

    def _noise(self, latents: Tensor, draws: Draws) -> Tensor:
        """Return (B, C, h, w) noise, with a constant offset a channel where asked (Guttenberg, Diffusion with Offset Noise, 2023)."""
        noise = draws.normal("noise", latents.shape[1:])
        if self.config.noise_offset:
            noise = noise + self.config.noise_offset * draws.normal("noise offset", (latents.shape[1], 1, 1))
        return noise

    def _text_states(self, prompts: Tensor) -> Tensor:
        """Return (B, L, D): looked up, or computed where the text encoder is trained."""
        if "text_encoder" in self.networks:
            return text_states(self.networks["text_encoder"], self.text[prompts]).to(self.dtype)
        return self.text[prompts]

    def _fill_caches(self, config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator) -> None:
        """Make training and validation rows; VAE and text encoder leave the device when the caches hold their work."""
        self.views = self._open_views(config, run, contract)
        folder = cache_folder(run.generator / CACHE_FOLDER, config, contract.digest)
        if accelerator.is_main_process:
            drop_stale_caches(folder.parent, folder)
        accelerator.wait_for_everyone()
        cached = self.config.cache_latents
        caches = {
            name: fill_views(folder / name, views, self.encode if cached else None, accelerator)
            for name, views in self.views.items()
            if cached or views.copies > 1
        }
        made = {name: cache.prompts() for name, cache in caches.items()}
        prompts = numbered_prompts({name: views.prompts(made.get(name, {})) for name, views in self.views.items()})
        if accelerator.is_main_process:
            tell_cuts("train", self.prompt_encoder, [*prompts.unique, *self.config.validation_prompt])
        if "text_encoder" in self.networks:
            self.text = self.prompt_encoder.tokens(prompts.unique).to(self.device)
        else:
            embeddings = fill_embeddings(folder / "prompts.safetensors", prompts.unique, self.embed, accelerator)
            self.text = embeddings.to(self.device, self.dtype)
            self.parts.text_encoder.to("cpu")
        self.rows = {
            name: TrainingRows(
                views,
                caches[name] if cached else None,
                prompts.numbers[name],
                with_conditioning=self.parts.controlnet is not None,
                with_foreground=self.config.lesion_loss_weight > 1,
                shuffled_by=config.seed if self.config.shuffle_conditioning and name == "train" else None,
            )
            for name, views in self.views.items()
        }
        self.dataset, self.buckets = self.rows["train"], size_buckets(self.views["train"])
        if cached:
            self.parts.vae.to("cpu")

    def _open_views(self, config: ExperimentConfig, run: Run, contract: Contract) -> dict[str, Views]:
        """Return the views of the train split, with changed copies, and of the validation split if there is one."""
        views: dict[str, Views] = {}
        for name in ("train", "validation"):
            if name not in contract.splits:
                continue
            rows = open_split(run.dataset, name)
            if name == "train" and self.config.max_train_samples:
                rows = rows.select(range(min(self.config.max_train_samples, len(rows))))
            augment = self.config.augment if name == "train" else None
            views[name] = Views(rows, contract.description, augment, config.seed)
        return views
