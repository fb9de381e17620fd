"""Loads the parts of a Stable Diffusion backbone, and networks that were trained here, with errors a user can act on.

The one place that reads weights of diffusers' and transformers' models: always safetensors, always of a class that is named here, never
one that a file names, so that no file can bring code to run.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from maskloom.models.stable_diffusion.checks import ControlNetSettings, check_backbone
from maskloom.models.stable_diffusion.keys import CONTROLNET_KEY, KEY, SINGLE_FILE_KEY
from maskloom.models.stable_diffusion.single_file import PREFIXES, converted_names, tensors_under
from maskloom.models.stable_diffusion.source import SETTINGS, BackboneSource, folder_of, read_settings
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError, excerpt
from maskloom.pipeline.plugins import install_command

CONTROLNET_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
KINDS: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
"""By part: its class."""
BUFFERS = ("position_ids",)  # older versions saved them
REST_OF_CLIP = (
    "vision_model.",
    "visual_projection.",
    "text_projection.",
    "logit_scale",
)  # beside a text encoder's weights


def load_part(source: BackboneSource, part: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a network of the backbone, with weights of this type.

    Args:
        source: the backbone.
        part: `unet`, `vae` or `text_encoder`.
        dtype: of the weights.

    Raises:
        MaskLoomError: the backbone cannot be used here (see `check_backbone`), or the weights do not fit the settings, or are not finite.
    """
    check_backbone(source)
    if source.is_single_file:
        network = _load_single_file_part(KINDS[part], source, part).to(dtype)
        _check_finite(network, f"{KEY}={source.name}: {part}")
        return network
    folder = source.weights_folder() / part
    return _loaded(
        KINDS[part],
        folder,
        f"{KEY}: {source.name}/{part}",
        "give a folder in diffusers format or a Hub id",
        dtype,
        source.variant,
    )


def _load_single_file_part(kind: type[Any], source: BackboneSource, part: str) -> Any:
    """Return a network with the file's weights, in float32.

    Args:
        kind: its class.
        source: the backbone.
        part: of `PREFIXES`.

    Raises:
        MaskLoomError: weights are missing, or have other shapes than the settings say.
    """
    with init_empty_weights():  # weights that are drawn at random first would take longer than all the rest
        network = new_network(kind, source, part)
    try:
        weights = converted_names(part, tensors_under(source.path, PREFIXES[part]), network)
        network.load_state_dict(weights, assign=True)
    except Exception as error:  # the converters raise errors of many kinds; the remedy is the same
        raise MaskLoomError(
            f"{KEY}={source.name}: its {part} does not fit the settings in {source.settings_folder()} ({excerpt(error)}); "
            f"set {SINGLE_FILE_KEY} to the folder or Hub id of a pipeline of the same shape, or give a folder in diffusers format"
        ) from error
    return network.float().eval()


def load_noise_schedule(source: BackboneSource, prediction_type: str | None, zero_terminal_snr: bool) -> DDPMScheduler:
    """Return the noise schedule to train with.

    Args:
        source: the backbone.
        prediction_type: replaces the backbone's; None keeps it.
        zero_terminal_snr: whether no signal is left at the last step.

    Raises:
        MaskLoomError: zero terminal SNR with a backbone that predicts noise.
    """
    try:
        scheduler = DDPMScheduler.from_config(source.scheduler_settings())
    except Exception as error:  # whatever the class makes of a wrong setting, the remedy is the same
        raise _unreadable(
            f"{KEY}={source.name}: scheduler/{SETTINGS['scheduler']}",
            DDPMScheduler,
            error,
            "download the backbone again",
        ) from error
    if prediction_type:
        scheduler.register_to_config(prediction_type=prediction_type)
    if not zero_terminal_snr:
        return scheduler
    if scheduler.config.prediction_type == "epsilon":
        raise MaskLoomError(
            f"train.rescale_betas_zero_snr: {source.name} predicts noise, which says nothing where no signal is left; "
            "set train.prediction_type=v_prediction"
        )
    return DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)


def new_network(kind: type[Any], source: BackboneSource, part: str) -> Any:
    """Return a network of the backbone's shape without its weights; on the meta device where that is torch's default.

    Raises:
        MaskLoomError: the settings do not make one.
    """
    path = source.settings_folder() / part / SETTINGS[part]
    return _built(kind, read_settings(path), f"{KEY}={source.name}: {path}")


def controlnet_folder(name: str) -> Path:
    """Return the folder of a ControlNet, after downloading its safetensors where the name is a Hub id.

    Raises:
        MaskLoomError: there is none, or it is no ControlNet.
    """
    folder = folder_of(name, None, CONTROLNET_FILES, CONTROLNET_KEY)
    path = folder / "config.json"
    settings = read_settings(path)
    kind = settings.get("_class_name")
    if kind != ControlNetModel.__name__:
        raise MaskLoomError(
            f"{CONTROLNET_KEY}={name}: config.json says that it is a {kind}, not a ControlNetModel; give a ControlNet"
        )
    try:
        validated(settings, ControlNetSettings, str(path))
    except MaskLoomError as error:
        raise MaskLoomError(
            f"{CONTROLNET_KEY}={name}: {error}; give a ControlNet of Stable Diffusion 1.x or 2.x"
        ) from None
    return folder


def load_controlnet(name: str) -> ControlNetModel:
    """Return a ControlNet in float32.

    Raises:
        MaskLoomError: it cannot be read.
    """
    return _loaded(
        ControlNetModel,
        controlnet_folder(name),
        f"{CONTROLNET_KEY}: {name}",
        "give a folder in diffusers format or a Hub id",
    )


def new_controlnet(name: str) -> ControlNetModel:
    """Return a ControlNet of the shape that its settings say, without its weights.

    Raises:
        MaskLoomError: its settings cannot be read, or do not make one.
    """
    path = controlnet_folder(name) / "config.json"
    return _built(ControlNetModel, read_settings(path), f"{CONTROLNET_KEY}: {path}")


def load_trained(kind: type[Any], folder: Path, remedy: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a network that was trained here, from its folder.

    Args:
        kind: a class with `from_pretrained`.
        folder: holds `config.json` and safetensors.
        remedy: what to do where they cannot be read.
        dtype: of the weights.

    Raises:
        MaskLoomError: the files are missing or damaged.
    """
    return _loaded(kind, folder, str(folder), remedy, dtype)


def load_schedule(kind: type[Any], folder: Path, remedy: str, **settings: Any) -> Any:
    """Return a scheduler from the folder that was saved beside networks trained here; see `load_trained`."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise _unreadable(str(folder), kind, error, remedy) from error


def _loaded(
    kind: type[Any],
    folder: Path,
    where: str,
    remedy: str,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Any:
    """Return `kind.from_pretrained(folder)`, and refuse weights that are not those of the settings: the libraries would draw them at random."""
    silence_loading()
    name = "dtype" if issubclass(kind, transformers.PreTrainedModel) else "torch_dtype"
    try:
        network, found = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            output_loading_info=True,
            **{name: dtype},
        )
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise _unreadable(where, kind, error, remedy) from error
    # A whole CLIP holds an image encoder as well; layers that the settings do not know would be left out without a word.
    foreign = [key for key in found["unexpected_keys"] if name != "dtype" or not str(key).startswith(REST_OF_CLIP)]
    wrong = sorted(key for key in {*found["missing_keys"], *foreign} if not str(key).endswith(BUFFERS))
    if wrong:
        raise MaskLoomError(
            f"{where}: its weights are not those that its config.json describes ({len(wrong)} missing or unknown, such as {wrong[0]}); {remedy}"
        )
    _check_finite(network, where)
    return network


def _check_finite(network: torch.nn.Module, where: str) -> None:
    """Refuse weights that would make every image of them NaN, before anything is computed; takes a tenth of the time of loading them.

    Raises:
        MaskLoomError: a weight is NaN, infinite, or too large for its precision.
    """
    for name, values in network.named_parameters():
        if values.numel() and not torch.stack(torch.aminmax(values.detach())).isfinite().all():
            raise MaskLoomError(
                f"{where}: its weights hold NaN or infinite values in {values.dtype} (such as {name}); "
                "give other weights, or, where they are too large for half precision, set train.mixed_precision=no"
            )


def _built(kind: type[Any], settings: dict[str, Any], where: str) -> Any:
    """Return a network of these settings."""
    silence_loading()
    try:
        if issubclass(kind, CLIPTextModel):
            return CLIPTextModel(CLIPTextConfig(**settings))
        return kind.from_config(settings)
    except Exception as error:  # whatever the classes make of a wrong setting, the remedy is the same
        raise _unreadable(where, kind, error, "give a folder in diffusers format") from error


def _unreadable(where: str, kind: type[Any], error: Exception, remedy: str) -> MaskLoomError:
    return MaskLoomError(f"{where}: cannot be read as {kind.__name__}: {excerpt(error)}; {remedy}")


def silence_loading() -> None:
    """Keep the libraries' bars over a model's files, and their remark about a new name of an argument, out of the log."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # The older name is the one that every supported version of diffusers understands.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)


def use_xformers(*modules: Any) -> None:
    """Switch modules to xFormers attention.

    Raises:
        MaskLoomError: xFormers is not installed or cannot run here.
    """
    try:
        for module in modules:
            module.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
        raise MaskLoomError(
            f"enable_xformers_memory_efficient_attention: {excerpt(error)}; {install_command('gpu')}, or leave it off (SDPA is used then)"
        ) from None
