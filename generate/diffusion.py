"""Base class and helpers of the Stable Diffusion generators: loading weights, batched sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskloom.generate.generator import Condition, ImageGenerator, Options
from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder
from maskloom.models.stable_diffusion.sampling import (
    Pipeline,
    Sampling,
    build_pipeline,
    check_sampling,
    prompt_embedding,
    sample,
    sampling_scheduler,
)
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import ADAPTER_FILE, exported_names
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.generate import GenerateConfig
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import file_digest, value_digest
from maskloom.pipeline.runs.record import require_intact
from maskloom.pipeline.runs.run import Run

if TYPE_CHECKING:
    import torch

CACHED_PROMPTS = 512
AGAIN = "run train again with --force"
MODEL_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def trained_parts(config: ExperimentConfig, run: Run, wanted: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the `wanted` weights that this configuration trains, by name.

    The names are those of `models.stable_diffusion.trained_parts`.
    """
    return {name: run.generator / name for name in exported_names(config.fine_tuning) if name in wanted}


def weights_digest(config: ExperimentConfig, run: Run, parts: Mapping[str, Path]) -> str:
    """Return a digest of the backbone's identity and the content of the trained parts.

    Args:
        config: names the backbone.
        run: the run that trained the parts.
        parts: from `trained_parts`.

    Raises:
        MaskLoomError: a part has not been trained yet, or has changed since training.
    """
    for folder in parts.values():
        require_intact(run, "train", folder)
    files = [folder / name for part, folder in parts.items() for name in _files(part)]
    backbone = BackboneSource.of(config.fine_tuning).digest()
    return value_digest([backbone, *(file_digest(file) for file in files)]) if files else backbone


def _files(part: str) -> Sequence[str]:
    return (ADAPTER_FILE,) if part == "lora" else MODEL_FILES


def check_backbone(config: ExperimentConfig) -> None:
    """Check, before anything is computed, that the backbone can be sampled on this machine.

    Raises:
        MaskLoomError: names `train.pretrained_model_name_or_path` and the problem.
    """
    from maskloom.models.stable_diffusion import checks as backbone_checks

    backbone_checks.check_backbone(BackboneSource.of(config.fine_tuning))


def load_backbone(
    config: ExperimentConfig, device: torch.device, parts: Mapping[str, Path], sizes: Sequence[tuple[int, int]]
) -> Pipeline:
    """Return a Stable Diffusion pipeline; a ControlNet pipeline if `parts` has a `controlnet`.

    Args:
        config: names the backbone and the scheduler.
        device: the device to load it onto.
        parts: trained weights that replace or extend those of the backbone; from `trained_parts`.
        sizes: (height, width) of the images to be generated.

    Raises:
        MaskLoomError: the backbone or a part cannot be read, or xFormers is requested and not
            installed.
    """
    import torch

    from maskloom.models.stable_diffusion.loading import load_part, use_xformers
    from maskloom.models.stable_diffusion.text import load_tokenizer
    from maskloom.pipeline.training.cpu_memory import keep_freed_memory

    source, dtype, trained = (
        BackboneSource.of(config.fine_tuning),
        weight_dtype(config.generate),
        _models(config, parts),
    )
    pipe = build_pipeline(
        vae=trained.get("vae") or load_part(source, "vae", dtype),
        text_encoder=load_part(source, "text_encoder", dtype),
        tokenizer=load_tokenizer(source),
        unet=trained.get("unet") or load_part(source, "unet", dtype),
        scheduler=sampling_scheduler(source.scheduler_settings(), config.generate, config.fine_tuning, bool(parts)),
        controlnet=trained.get("controlnet"),
        sizes=sizes,
    )
    pipe.to(device)
    if "lora" in parts:
        _add_adapters(pipe, parts["lora"])
    if config.generate.enable_xformers_memory_efficient_attention:
        use_xformers(pipe)
    torch.backends.cudnn.deterministic = True
    if device.type == "cpu":
        keep_freed_memory()
    return pipe


def _models(config: ExperimentConfig, parts: Mapping[str, Path]) -> dict[str, Any]:
    """Return the trained parts that are complete networks.

    Raises:
        MaskLoomError: a part's files are damaged.
    """
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    from maskloom.models.stable_diffusion.loading import load_trained

    kinds: dict[str, Any] = {"controlnet": ControlNetModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    dtype = weight_dtype(config.generate)
    return {name: load_trained(kinds[name], folder, AGAIN, dtype) for name, folder in parts.items() if name in kinds}


def _add_adapters(pipe: Pipeline, folder: Path) -> None:
    """Fuse LoRA adapters into the weights, so that sampling costs the same as without them.

    Raises:
        MaskLoomError: the file is damaged or belongs to another backbone.
    """
    try:
        pipe.load_lora_weights(folder, weight_name=ADAPTER_FILE, local_files_only=True, use_safetensors=True)
    except Exception as error:  # loaders raise many types; the remedy is the same
        raise MaskLoomError(f"{folder}: cannot be read as LoRA of this backbone: {one_line(error)}; {AGAIN}") from error
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # removes the wrapper layers; the fused weights stay


def weight_dtype(config: GenerateConfig) -> torch.dtype:
    """Return the dtype of weights and activations for `generate.mixed_precision`."""
    from maskloom.pipeline.training.precision import DTYPES

    return DTYPES[config.mixed_precision]


class Sampler:
    """Samples batches from a pipeline, with one noise seed per image."""

    def __init__(
        self, pipe: Pipeline, how: Sampling, description: Description, prompt_chunks: int | None = None
    ) -> None:
        """Store the pipeline and the sampling settings.

        Args:
            pipe: from `load_backbone`.
            how: steps and guidance.
            description: provides the channels of the dataset.
            prompt_chunks: `train.prompt_chunks`.
        """
        self.pipe, self.how, self.description = pipe, how, description
        self.prompt_encoder = PromptEncoder.of(pipe.tokenizer, pipe.text_encoder.config, prompt_chunks)
        self.embedding = lru_cache(maxsize=CACHED_PROMPTS)(partial(prompt_embedding, pipe, self.prompt_encoder))

    def images(self, conditions: Sequence[Condition], conditioning: torch.Tensor | None = None) -> NDArray[np.float32]:
        """Return images, (B, H, W) or (B, H, W, 3) in 0..1, of the size of the conditioning images.

        The grey value of a one-channel dataset is the mean of the three channels.

        Args:
            conditions: prompts, seeds and conditioning images, all of one size.
            conditioning: the input of the ControlNet, from `control_tensor`; None without one.
        """
        import torch

        size = conditions[0].conditioning_image.shape[:2]
        noise = [torch.Generator("cpu").manual_seed(condition.seed) for condition in conditions]
        with torch.inference_mode():
            prompts = [self.embedding(condition.text) for condition in conditions]
            batch = sample(
                self.pipe, prompts, self.embedding(self.how.negative_prompt), conditioning, size, noise, self.how
            )
        pixels = batch.numpy()  # (B, 3, H, W)
        return pixels.mean(axis=1) if self.description.channels == 1 else np.moveaxis(pixels, 1, -1)


def control_tensor(conditions: Sequence[Condition], dtype: torch.dtype) -> torch.Tensor:
    """Return the conditioning images as (B, 3, H, W) in 0..1."""
    import torch

    stacked = np.stack([condition.conditioning_image for condition in conditions])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(dtype) / 255


class BackboneOptions(Options):
    """Options shared by the Stable Diffusion generators."""

    negative_prompt: str = ""


class BackboneGenerator(ImageGenerator):
    """Stable Diffusion with the trained weights in `parts`.

    Plug-ins differ in these weights and in the conditions that they pass on.
    """

    options: Any

    @property
    def parts(self) -> dict[str, Path]:
        """The trained weights to load, by name; from `trained_parts`."""
        return {}

    @property
    def training_stage(self) -> str | None:
        """The stage that trained the weights, `train`; None: the backbone as it is."""
        return "train" if self.parts else None

    def weights_digest(self) -> str:
        """Return a digest of the backbone and of the trained weights.

        Raises:
            MaskLoomError: a part has not been trained, or is not trained by this configuration.
        """
        return weights_digest(self.config, self.run, self.parts)

    def check_settings(self) -> None:
        """Check the backbone, and that the sampler supports its noise schedule."""
        trained = bool(self.parts)  # first: without a ControlNet the backbone does not matter
        check_backbone(self.config)
        source, steps = BackboneSource.of(self.config.fine_tuning), [self.config.generate.num_inference_steps]
        check_sampling(source.scheduler_settings(), self.config.generate, self.config.fine_tuning, trained, steps)

    def check(self) -> None:
        """See `check_settings`."""
        self.check_settings()

    def load(self, device: torch.device, description: Description) -> None:
        """Read the backbone and the trained weights.

        Raises:
            MaskLoomError: files are damaged.
        """
        pipe = load_backbone(self.config, device, self.parts, description.sizes)
        how = Sampling.of(self.config.generate, self.options.model_dump())
        self.sampler = Sampler(pipe, how, description, self.config.fine_tuning.prompt_chunks)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the prompts; masks are ignored."""
        return self.sampler.images(conditions)
