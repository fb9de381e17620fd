"""What the Stable Diffusion generators share: reading a backbone and what was trained on it, and sampling in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from generate.generator import Condition, ImageGenerator, Options
from pipeline.config import ExperimentConfig, GenerateConfig, TrainConfig
from pipeline.contract import Description
from pipeline.errors import MaskLoomError, one_line
from pipeline.files import file_digest, model_digest, value_digest
from pipeline.runs import Run
from pipeline.trained_parts import ADAPTER_FILE, exported_names

if TYPE_CHECKING:
    import torch

# StableDiffusionPipeline or its ControlNet sibling; diffusers builds both lazily, hidden from type checkers.
Pipeline = Any
CACHED_PROMPTS = 512
SLICED_DECODING_PIXELS = 512 * 512  # from here on the VAE decodes image by image: a batch's activations would not fit


MODEL_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def trained_parts(config: ExperimentConfig, run: Run, wanted: Sequence[str]) -> dict[str, Path]:
    """Return the folders of those `wanted` weights that this configuration trains, by name (`pipeline.trained_parts`)."""
    return {name: run.generator / name for name in exported_names(config.fine_tuning) if name in wanted}


def weights_digest(config: ExperimentConfig, parts: Mapping[str, Path]) -> str:
    """Return the identity of the backbone and of the content of trained parts.

    Args:
        config: names the backbone.
        parts: from `trained_parts`.

    Raises:
        MaskLoomError: a part has not been trained yet.
    """
    files = [folder / name for part, folder in parts.items() for name in _files(part)]
    for file in files:
        if not file.is_file():
            raise MaskLoomError(f"{file}: missing; run train first (make train)")
    backbone = model_digest(config.fine_tuning.pretrained_model_name_or_path, config.fine_tuning.revision)
    return value_digest([backbone, *(file_digest(file) for file in files)]) if files else backbone


def _files(part: str) -> Sequence[str]:
    return (ADAPTER_FILE,) if part == "lora" else MODEL_FILES


def check_backbone_folder(config: ExperimentConfig) -> None:
    """Tell a mistyped folder before anything is computed.

    Raises:
        MaskLoomError: names `train.pretrained_model_name_or_path`.
    """
    from pipeline.backbone import check_backbone

    check_backbone(config.fine_tuning.pretrained_model_name_or_path)


def load_backbone(config: ExperimentConfig, device: torch.device, parts: Mapping[str, Path]) -> Pipeline:
    """Return a Stable Diffusion pipeline ready to sample; a ControlNet pipeline where `parts` holds a `controlnet`.

    Args:
        config: names the backbone and the scheduler.
        device: where to compute.
        parts: trained weights that take the place of the backbone's, or are added to it; from `trained_parts`.

    Raises:
        MaskLoomError: the backbone or a part cannot be read, or xFormers is asked for and missing.
    """
    import torch
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

    from pipeline.backbone import load_part, use_xformers
    from pipeline.cpu_memory import keep_freed_memory

    pipe = load_part(
        StableDiffusionControlNetPipeline if "controlnet" in parts else StableDiffusionPipeline,
        config.fine_tuning.pretrained_model_name_or_path,
        revision=config.fine_tuning.revision,
        variant=config.fine_tuning.variant,
        torch_dtype=weight_dtype(config.generate),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **_models(config, parts),
    )
    pipe.scheduler = fast_scheduler(pipe.scheduler.config, config, trained=bool(parts))
    pipe.set_progress_bar_config(disable=True)
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
    """Return the trained parts that are whole networks.

    Raises:
        MaskLoomError: a part's files are damaged.
    """
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

    from pipeline.backbone import silence_loading

    silence_loading()
    kinds: dict[str, Any] = {"controlnet": ControlNetModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}
    models = {}
    for name, folder in parts.items():
        if name in kinds:
            try:
                models[name] = kinds[name].from_pretrained(
                    folder, torch_dtype=weight_dtype(config.generate), local_files_only=True
                )
            except Exception as error:  # whatever the readers inside raise, the remedy is the same
                raise _unreadable(folder, kinds[name].__name__, error) from error
    return models


def _add_adapters(pipe: Pipeline, folder: Path) -> None:
    """Add adapters (LoRA) to the weights that they adapt: sampling then costs what it costs without them.

    Raises:
        MaskLoomError: the file is damaged, or made for another backbone.
    """
    try:
        pipe.load_lora_weights(folder, weight_name=ADAPTER_FILE, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, "LoRA of this backbone", error) from error
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # the wrappers around the layers; their weights keep the sum


def _unreadable(folder: Path, kind: str, error: Exception) -> MaskLoomError:
    return MaskLoomError(f"{folder}: cannot be read as {kind}: {one_line(error)}; run train again with --force")


def weight_dtype(config: GenerateConfig) -> torch.dtype:
    """Return the type of weights and activations for `generate.mixed_precision`."""
    from pipeline.backbone import DTYPES

    return DTYPES[config.mixed_precision]


def fast_scheduler(backbone: Any, config: ExperimentConfig, trained: bool) -> Any:
    """Return the configured scheduler with the noise schedule that the networks were trained on.

    Args:
        backbone: the configuration of the backbone's scheduler.
        config: names the scheduler, and how training changed the backbone's schedule.
        trained: whether trained weights take part. Without them the backbone's own schedule holds, but for a prediction type that
            was set while the UNet stayed frozen: it can only correct what the backbone says.
    """
    kind, settings = solver(config.generate)
    train = config.fine_tuning
    if train.prediction_type is not None and (trained or unet_is_frozen(train)):
        settings["prediction_type"] = train.prediction_type
    if trained and train.rescale_betas_zero_snr:  # sampling must start where no signal is left, as training did
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return kind.from_config(backbone, **settings)


def solver(config: GenerateConfig) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' class for `generate.scheduler`, and the settings that it needs besides those of a noise schedule."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "unipc": (UniPCMultistepScheduler, {}),
        "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "ddim": (DDIMScheduler, {}),
    }
    return kinds[config.scheduler]


def unet_is_frozen(train: TrainConfig) -> bool:
    """Return whether training leaves the UNet as the backbone has it."""
    return train.sd_locked and "unet" not in train.lora


class Sampler:
    """Samples batches from a pipeline, with a noise seed for every image."""

    def __init__(
        self,
        pipe: Pipeline,
        config: GenerateConfig,
        description: Description,
        negative_prompt: str,
        prompt_chunks: int | None = None,
    ) -> None:
        """Keep the pipeline.

        Args:
            pipe: from `load_backbone`.
            config: steps and guidance.
            description: channels and usual image size of the dataset.
            negative_prompt: what unconditional guidance sees.
            prompt_chunks: `train.prompt_chunks`.
        """
        from pipeline.prompt_encoding import PromptEncoder

        self.prompt_encoder = PromptEncoder.of(pipe.tokenizer, pipe.text_encoder.config, prompt_chunks)
        self.pipe, self.config, self.description, self.negative_prompt = pipe, config, description, negative_prompt
        # One prompt at a time, so that an embedding does not depend on which other prompts share its batch.
        self.embedding = lru_cache(maxsize=CACHED_PROMPTS)(self._embedding)
        if max(map(np.prod, description.sizes)) >= SLICED_DECODING_PIXELS:
            pipe.vae.enable_slicing()

    def images(self, conditions: Sequence[Condition], **control: Any) -> NDArray[np.float32]:
        """Return images, (B, H, W) or (B, H, W, 3), in 0..1, of the conditioning images' size.

        Args:
            conditions: prompts, seeds and, all of one size, conditioning images.
            control: further arguments of the pipeline's call.
        """
        import torch

        height, width = conditions[0].conditioning_image.shape[:2]
        # Noise is drawn on the CPU: the same seed then gives the same picture on every device.
        noise = [torch.Generator("cpu").manual_seed(condition.seed) for condition in conditions]
        with torch.inference_mode():
            batch = self.pipe(
                prompt_embeds=torch.cat([self.embedding(condition.text) for condition in conditions]),
                negative_prompt_embeds=torch.cat([self.embedding(self.negative_prompt)] * len(conditions)),
                height=height,
                width=width,
                num_inference_steps=self.config.num_inference_steps,
                guidance_scale=self.config.guidance_scale,
                generator=noise,
                output_type="pt",
                **control,
            ).images
        return self._in_dataset_channels(batch.float().cpu().numpy())

    def _embedding(self, text: str) -> torch.Tensor:
        """Return the text encoder's states of one prompt, (1, tokens, width), read as in training."""
        from pipeline.prompt_encoding import text_states

        return text_states(self.pipe.text_encoder, self.prompt_encoder.tokens([text]).to(self.pipe.device))

    def _in_dataset_channels(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (B, 3, H, W) as (B, H, W, 3), or as (B, H, W) by the mean of the channels for grey datasets."""
        return batch.mean(axis=1) if self.description.channels == 1 else np.moveaxis(batch, 1, -1)


def control_tensor(conditions: Sequence[Condition], dtype: torch.dtype) -> torch.Tensor:
    """Return the conditioning images as (B, 3, H, W) in 0..1."""
    import torch

    stacked = np.stack([condition.conditioning_image for condition in conditions])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).to(dtype) / 255


class BackboneOptions(Options):
    """Options of every generator on a Stable Diffusion backbone."""

    negative_prompt: str = ""


class BackboneGenerator(ImageGenerator):
    """Stable Diffusion with the trained weights that `parts` names; plug-ins differ in these and in what they show it."""

    options: Any

    @property
    def parts(self) -> dict[str, Path]:
        """The trained weights that take part, by name; from `trained_parts`."""
        return {}

    def weights_digest(self) -> str:
        """Return the identity of the backbone and of the trained weights.

        Raises:
            MaskLoomError: a part has not been trained yet, or never will be.
        """
        return weights_digest(self.config, self.parts)

    def check(self) -> None:
        """Look for the backbone."""
        check_backbone_folder(self.config)

    def load(self, device: torch.device, description: Description) -> None:
        """Read the backbone and the trained weights.

        Raises:
            MaskLoomError: files are damaged.
        """
        pipe = load_backbone(self.config, device, self.parts)
        chunks = self.config.fine_tuning.prompt_chunks
        self.sampler = Sampler(pipe, self.config.generate, description, self.options.negative_prompt, chunks)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the prompts; masks are not looked at."""
        return self.sampler.images(conditions)
