"""Checks that a backbone can be trained and sampled, from its settings and file names alone.

Reads no weights, runs no code that comes with a backbone, and imports no torch. Only the parts of
Stable Diffusion 1.x and 2.x are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from maskloom.models.stable_diffusion.keys import KEY, SINGLE_FILE_KEY, TOKENIZER_KEY
from maskloom.models.stable_diffusion.single_file import FIRST_LAYER, generation_of, weight_shapes
from maskloom.models.stable_diffusion.source import (
    INDEX,
    PARTS,
    SETTINGS,
    WEIGHTS,
    BackboneSource,
    looks_local,
    read_settings,
)
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import install_command

SUPPORTED = "only Stable Diffusion 1.x and 2.x (text to image) can be trained and sampled here"
SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverSDEScheduler",
)
"""diffusers' `KarrasDiffusionSchedulers`, which share a noise schedule, except for those of EDM."""
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
NOTHING = (None, None)
COMPONENTS: Mapping[str, set[tuple[str | None, str | None]]] = {
    "unet": {("diffusers", "UNet2DConditionModel")},
    "vae": {("diffusers", "AutoencoderKL")},
    "text_encoder": {("transformers", "CLIPTextModel")},
    "tokenizer": {("transformers", "CLIPTokenizer"), ("transformers", "CLIPTokenizerFast")},
    "scheduler": {("diffusers", name) for name in SCHEDULERS},
    # Not used, so it may be present.
    "safety_checker": {NOTHING, ("stable_diffusion", "StableDiffusionSafetyChecker")},
    "feature_extractor": {
        NOTHING,
        *(
            ("transformers", f"CLIP{name}")
            for name in ("FeatureExtractor", "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
        ),
    },
    "image_encoder": {NOTHING, ("transformers", "CLIPVisionModelWithProjection")},
}
"""Allowed library and class of each component in `model_index.json`."""
FOREIGN_FILES = {"text_encoder": "adapter_config.json"}  # transformers would load an adapter into the model
VAE_LEVELS = 4  # a VAE with downsampling factor 8
MOST_TOKENS = 4096


Attention = Literal["eager", "sdpa", "flash_attention_2"] | None


class _Settings(BaseModel):
    """The settings that are checked; all others are left to the library."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    auto_map: None = Field(None, description="names code next to the weights")
    quantization_config: None = None
    # transformers would take any other name as a repository, download its code and run it.
    attention: Attention = Field(None, alias="_attn_implementation")
    attn_implementation: Attention = None


class _DenoiserSettings(_Settings):
    """Settings common to UNet and ControlNet, with diffusers' defaults.

    Inputs and layers that are not supported must be absent.
    """

    class_embed_type: None = None
    num_class_embeds: None = None
    addition_embed_type: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] = "UNetMidBlock2DCrossAttn"
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    norm_eps: float = Field(1e-5, gt=0)
    mid_block_scale_factor: float = Field(1, gt=0)


class UNetSettings(_DenoiserSettings):
    """`unet/config.json`, with diffusers' defaults."""

    kind: Literal["UNet2DConditionModel"] = Field(alias="_class_name")
    sample_size: int | tuple[int, int] | None = None
    in_channels: int = Field(4, ge=1)
    out_channels: int = Field(4, ge=1)
    block_out_channels: list[int] = Field([320, 640, 1280, 1280], min_length=1)
    cross_attention_dim: int = Field(1280, ge=1)
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    time_cond_proj_dim: None = None
    dual_cross_attention: Literal[False] = False
    dropout: float = Field(0, ge=0, lt=1)


class ControlNetSettings(_DenoiserSettings):
    """`config.json` of a ControlNet, with diffusers' defaults."""

    conditioning_channels: Literal[3] = 3
    conditioning_embedding_out_channels: list[int] = [16, 32, 96, 256]
    controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb"
    global_pool_conditions: Literal[False] = False

    @field_validator("conditioning_embedding_out_channels")
    @classmethod
    def _makes_factor_8(cls, value: list[int]) -> list[int]:
        if len(value) != VAE_LEVELS:
            raise ValueError(f"an embedding with factor {2 ** (len(value) - 1)}, not 8 as the VAE")
        return value


class VaeSettings(_Settings):
    """`vae/config.json`, with diffusers' defaults."""

    kind: Literal["AutoencoderKL"] = Field(alias="_class_name")
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: int = Field(4, ge=1)
    block_out_channels: list[int] = Field([64], min_length=1)
    scaling_factor: float = Field(0.18215, gt=0, allow_inf_nan=False)
    shift_factor: None = None
    latents_mean: None = None
    latents_std: None = None

    @field_validator("block_out_channels")
    @classmethod
    def _makes_factor_8(cls, value: list[int]) -> list[int]:
        if len(value) != VAE_LEVELS:
            raise ValueError(f"a VAE with factor {2 ** (len(value) - 1)}, not 8")
        return value


class TextSettings(_Settings):
    """`text_encoder/config.json`, with transformers' defaults."""

    model_type: Literal["clip_text_model"]
    hidden_size: int = Field(512, ge=1)
    vocab_size: int = Field(49408, ge=1)
    max_position_embeddings: int = Field(77, ge=3, le=MOST_TOKENS)
    layer_norm_eps: float = Field(1e-5, gt=0)


class SchedulerSettings(_Settings):
    """`scheduler/scheduler_config.json`, with diffusers' defaults."""

    kind: Literal[SCHEDULERS] = Field(alias="_class_name")  # type: ignore[valid-type]
    num_train_timesteps: int = Field(1000, ge=2, le=100_000)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    trained_betas: list[float] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    use_flow_sigmas: Literal[False] = False

    @model_validator(mode="after")
    def _has_one_beta_per_timestep(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} timesteps")
        return self

    @field_validator("trained_betas")
    @classmethod
    def _are_betas(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not (value and all(math.isfinite(beta) and 0 < beta < 1 for beta in value)):
            raise ValueError("must be numbers between 0 and 1")
        return value


class TokenizerSettings(_Settings):
    """`tokenizer/tokenizer_config.json`."""

    tokenizer_class: Literal["CLIPTokenizer", "CLIPTokenizerFast"] | None = None
    model_max_length: float | None = Field(None, ge=3, strict=True)  # 10^30 means no limit


def check_backbone(source: BackboneSource, settings_only: bool = False) -> None:
    """Check that a backbone can be trained and sampled, before anything is computed.

    Args:
        source: the backbone.
        settings_only: whether a backbone may have no weights at all; if it has some, they must be
            the configured ones.

    Raises:
        MaskLoomError: it does not exist, a part or its weights are missing, it is of another kind,
            or it names code of its own.
    """
    check_place(source)
    folder = source.settings_folder()
    check_index(folder, source.name)
    check_parts(folder, source)
    if source.is_single_file:
        check_single_file(source, read_settings(folder / "unet" / SETTINGS["unet"]))
    elif not (settings_only and source.has_no_weights()):
        for part in WEIGHTS:  # of the variant, and whole as far as they are local
            for name in source.weight_names(part) or []:
                if source.is_folder and name.endswith(".safetensors"):
                    check_safetensors(source.path / part / name, KEY)


def check_single_file(source: BackboneSource, unet: Mapping[str, Any]) -> None:
    """Check a single-file backbone without reading its weights.

    Args:
        source: the backbone.
        unet: the settings of its UNet.

    Raises:
        MaskLoomError: the file is damaged or of another kind, or a setting does not apply.
    """
    path = source.path
    generation = generation_of(path)
    if source.variant is not None:
        raise MaskLoomError(f"train.variant={source.variant}: a single file has no variants; set train.variant=null")
    shape = weight_shapes(path).get(FIRST_LAYER, [])
    if len(shape) != 4 or shape[1] != unet.get("in_channels", 4):
        raise MaskLoomError(
            f"{KEY}={path}: its UNet takes {shape[1] if len(shape) == 4 else 'unknown'} channels, "
            f"not {unet.get('in_channels', 4)} (inpainting, depth and editing models take more); {SUPPORTED}"
        )
    if generation == "sd2" and source.single_file_config is None and source.prediction_type is None:
        raise MaskLoomError(
            f"{KEY}={path}: a Stable Diffusion 2.x file does not say what it predicts; set train.prediction_type to v_prediction "
            f"(768-v) or epsilon (base), or {SINGLE_FILE_KEY} to a pipeline's folder or Hub id"
        )


def check_xformers(key: str) -> None:
    """Check that xFormers can be used on this machine.

    Args:
        key: the configuration key that asks for it.

    Raises:
        MaskLoomError: it is not installed, or there is no GPU.
    """
    if find_spec("xformers") is None:
        raise MaskLoomError(f"{key} needs xformers: {install_command('gpu')}, or set it to false (SDPA is used then)")
    import torch

    if not torch.cuda.is_available():
        raise MaskLoomError(f"{key} needs a GPU and none was found; set it to false (SDPA is used then)")


def check_place(source: BackboneSource) -> None:
    """Check that the name is a folder, a .safetensors file or a Hub id.

    Raises:
        MaskLoomError: it is none of these.
    """
    name, path = source.name, source.path
    if source.is_folder:
        return
    if source.is_single_file:
        if path.suffix != ".safetensors":
            raise MaskLoomError(
                f"{KEY}={name}: only .safetensors files are read, because pickles can run code; "
                "convert it to safetensors, or give a folder in diffusers format"
            )
    elif looks_local(name) or path.suffix == ".safetensors":
        raise MaskLoomError(
            f"{KEY}={name}: no such folder or file; give a local folder, a .safetensors file, "
            "or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )


def check_index(folder: Path, name: str) -> None:
    """Check that `model_index.json` names only classes of Stable Diffusion 1.x and 2.x.

    Raises:
        MaskLoomError: it is missing or names other classes or code of its own.
    """
    if not (folder / INDEX).is_file():
        missing = [part for part in (INDEX, *PARTS) if not (folder / part).exists()]
        raise MaskLoomError(
            f"{KEY}={name}: {', '.join(missing)} missing; give a Stable Diffusion folder in diffusers format"
        )
    index = read_settings(folder / INDEX)
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise MaskLoomError(
            f"{KEY}={name}: {INDEX} says that it is a {kind if isinstance(kind, str) else 'pipeline of its own'}; "
            f"{SUPPORTED}"
        )
    if "auto_map" in index:
        raise MaskLoomError(
            f"{KEY}={name}: {INDEX} names code of its own (auto_map), which is never run; give a backbone without it"
        )
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list):
            continue
        library_and_class = tuple(item if isinstance(item, str | None) else repr(item) for item in value)
        if library_and_class not in COMPONENTS.get(part, {NOTHING}):
            raise MaskLoomError(
                f"{KEY}={name}: {INDEX} names {'.'.join(map(str, value))[:100]} as its {part}; "
                f"code that comes with a backbone is never run, and {SUPPORTED}"
            )


def check_parts(folder: Path, source: BackboneSource) -> None:
    """Check the settings of each part, and that the parts fit each other.

    Raises:
        MaskLoomError: a part is missing or not supported, or two parts do not fit.
    """
    name = source.name
    needed = PARTS if source.tokenizer_name is None and not source.is_single_file else tuple(SETTINGS)
    missing = [part for part in needed if not (folder / part).exists()]
    if missing:
        raise MaskLoomError(
            f"{KEY}={name}: {', '.join(missing)} missing; give a Stable Diffusion folder in diffusers format"
        )
    for part, file in FOREIGN_FILES.items():
        if (folder / part / file).exists():
            raise MaskLoomError(
                f"{KEY}={name}: {part}/{file} would load an adapter; remove it, or merge the adapter into the weights"
            )
    unet, vae = (
        read_part_settings(folder, "unet", UNetSettings, name),
        read_part_settings(folder, "vae", VaeSettings, name),
    )
    text = read_part_settings(folder, "text_encoder", TextSettings, name)
    read_part_settings(folder, "scheduler", SchedulerSettings, name)
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise MaskLoomError(
            f"{KEY}={name}: its UNet takes {unet.in_channels} channels and returns {unet.out_channels}, the VAE's "
            f"latents have {vae.latent_channels} (inpainting, depth and editing models take more); {SUPPORTED}"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise MaskLoomError(
            f"{KEY}={name}: its UNet attends to {unet.cross_attention_dim} values per token, the text encoder returns "
            f"{text.hidden_size}; the parts belong to different models"
        )
    check_tokenizer(source, text)


def read_part_settings(folder: Path, part: str, model: type[Any], name: str) -> Any:
    """Return the settings of a part as `model`.

    Raises:
        MaskLoomError: they are missing or not supported.
    """
    path = folder / part / SETTINGS[part]
    try:
        return validated(read_settings(path), model, str(path))
    except MaskLoomError as error:
        raise MaskLoomError(f"{KEY}={name}: {error}; {SUPPORTED}") from None


def check_tokenizer(source: BackboneSource, text: TextSettings) -> None:
    """Check that there is a CLIP tokenizer whose tokens the text encoder knows.

    Raises:
        MaskLoomError: there is none, or it does not fit.
    """
    folder = source.tokenizer_folder()
    where = f"{KEY}={source.name}" if source.tokenizer_name is None else f"{TOKENIZER_KEY}={source.tokenizer_name}"
    settings, whole, words = (folder / name for name in ("tokenizer_config.json", "tokenizer.json", "vocab.json"))
    if settings.is_file():
        try:
            validated(read_settings(settings), TokenizerSettings, str(settings))
        except MaskLoomError as error:
            raise MaskLoomError(f"{where}: {error}; {SUPPORTED}") from None
    if not whole.is_file() and not (words.is_file() and (folder / "merges.txt").is_file()):
        raise MaskLoomError(
            f"{where}: {folder} has no tokenizer (vocab.json and merges.txt, or tokenizer.json); "
            "give one in CLIP's format"
        )
    vocabulary = read_settings(words) if words.is_file() else (read_settings(whole).get("model") or {}).get("vocab")
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if not numbers or not all(type(number) is int for number in numbers):
        raise MaskLoomError(
            f"{where}: {words if words.is_file() else whole} is no vocabulary (word: number); "
            "download the tokenizer again"
        )
    if max(numbers) >= text.vocab_size:
        raise MaskLoomError(
            f"{where}: the tokenizer has {max(numbers) + 1} tokens, the text encoder of {source.name} knows "
            f"{text.vocab_size}; give the tokenizer that belongs to it"
        )


def check_safetensors(path: Path, key: str) -> None:
    """Check that a file is a complete safetensors file; only its header is read.

    Raises:
        MaskLoomError: it is truncated or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise MaskLoomError(
            f"{key}: {path} is no whole .safetensors file ({error}); download or copy it again"
        ) from None
