"""Loads the parts of a Stable Diffusion backbone and networks trained by this program.

The one place that reads weights of models of diffusers and transformers: always safetensors, and
always a class that is named here instead of in a file, so no file can bring code to run.
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
"""The class of each part."""
BUFFERS = ("position_ids",)  # saved by older versions
# Weights of a whole CLIP beside those of its text encoder.
REST_OF_CLIP = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def load_part(source: BackboneSource, part: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a network of the backbone.

    Args:
        source: the backbone.
        part: `unet`, `vae` or `text_encoder`.
        dtype: data type of the weights.

    Raises:
        MaskLoomError: the backbone is not supported (see `check_backbone`), or its weights do not
            fit the settings or are not finite.
    """
    check_backbone(source)
    if source.is_single_file:
        network = load_single_file_part(KINDS[part], source, part).to(dtype)
        check_finite(network, f"{KEY}={source.name}: {part}")
        return network
    folder = source.weights_folder() / part
    return load_pretrained(
        KINDS[part],
        folder,
        f"{KEY}: {source.name}/{part}",
        "give a folder in diffusers format or a Hub id",
        dtype,
        source.variant,
    )


def load_single_file_part(kind: type[Any], source: BackboneSource, part: str) -> Any:
    """Return a network with the weights of a single file, in float32.

    Args:
        kind: the class of the network.
        source: the backbone.
        part: a key of `PREFIXES`.

    Raises:
        MaskLoomError: weights are missing, or their shapes are not those of the settings.
    """
    with init_empty_weights():  # random initialisation would take longer than all the rest
        network = new_network(kind, source, part)
    try:
        weights = converted_names(part, tensors_under(source.path, PREFIXES[part]), network)
        network.load_state_dict(weights, assign=True)
    except Exception as error:  # the converters raise errors of many kinds; the remedy is the same
        raise MaskLoomError(
            f"{KEY}={source.name}: its {part} does not fit the settings in {source.settings_folder()} "
            f"({excerpt(error)}); set {SINGLE_FILE_KEY} to the folder or Hub id of a pipeline of the same shape, "
            "or give a folder in diffusers format"
        ) from error
    return network.float().eval()


def load_noise_schedule(source: BackboneSource, prediction_type: str | None, zero_terminal_snr: bool) -> DDPMScheduler:
    """Return the noise schedule of the training.

    Args:
        source: the backbone.
        prediction_type: the prediction type; None: the backbone's.
        zero_terminal_snr: whether to rescale the schedule such that no signal is left at the last
            timestep.

    Raises:
        MaskLoomError: zero terminal SNR with a backbone that predicts noise.
    """
    try:
        scheduler = DDPMScheduler.from_config(source.scheduler_settings())
    except Exception as error:  # a wrong setting raises errors of many kinds; the remedy is the same
        raise unreadable(
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
            f"train.rescale_betas_zero_snr: {source.name} predicts noise, which carries no information where no signal "
            "is left; set train.prediction_type=v_prediction"
        )
    return DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)


def new_network(kind: type[Any], source: BackboneSource, part: str) -> Any:
    """Return a network with the backbone's settings and initial weights, on the default device.

    Raises:
        MaskLoomError: the settings cannot be used.
    """
    path = source.settings_folder() / part / SETTINGS[part]
    return build_network(kind, read_settings(path), f"{KEY}={source.name}: {path}")


def controlnet_folder(name: str) -> Path:
    """Return the folder of a ControlNet, downloading its safetensors if the name is a Hub id.

    Raises:
        MaskLoomError: it does not exist, or it is not a supported ControlNet.
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
    return load_pretrained(
        ControlNetModel,
        controlnet_folder(name),
        f"{CONTROLNET_KEY}: {name}",
        "give a folder in diffusers format or a Hub id",
    )


def new_controlnet(name: str) -> ControlNetModel:
    """Return a ControlNet with its settings and without its weights.

    Raises:
        MaskLoomError: its settings cannot be read or used.
    """
    path = controlnet_folder(name) / "config.json"
    return build_network(ControlNetModel, read_settings(path), f"{CONTROLNET_KEY}: {path}")


def load_trained(kind: type[Any], folder: Path, remedy: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a network that this program trained, from its folder.

    Args:
        kind: a class with `from_pretrained`.
        folder: holds `config.json` and safetensors.
        remedy: for error messages: what to do if they cannot be read.
        dtype: data type of the weights.

    Raises:
        MaskLoomError: the files are missing or damaged.
    """
    return load_pretrained(kind, folder, str(folder), remedy, dtype)


def load_schedule(kind: type[Any], folder: Path, remedy: str, **settings: Any) -> Any:
    """Return a scheduler saved next to trained networks; arguments as in `load_trained`."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise unreadable(str(folder), kind, error, remedy) from error


def load_pretrained(
    kind: type[Any],
    folder: Path,
    where: str,
    remedy: str,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Any:
    """Return `kind.from_pretrained(folder)`.

    Raises:
        MaskLoomError: the folder cannot be read, or weights do not match the settings (the
            libraries would initialise missing weights at random).
    """
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
        raise unreadable(where, kind, error, remedy) from error
    # A whole CLIP also has an image encoder. The libraries silently ignore weights of other layers.
    foreign = [key for key in found["unexpected_keys"] if name != "dtype" or not str(key).startswith(REST_OF_CLIP)]
    wrong = sorted(key for key in {*found["missing_keys"], *foreign} if not str(key).endswith(BUFFERS))
    if wrong:
        raise MaskLoomError(
            f"{where}: its weights are not those that its config.json describes "
            f"({len(wrong)} missing or unknown, such as {wrong[0]}); {remedy}"
        )
    check_finite(network, where)
    return network


def check_finite(network: torch.nn.Module, where: str) -> None:
    """Check that all weights are finite: others would make every image NaN.

    This takes a tenth of the time of loading them.

    Raises:
        MaskLoomError: a weight is NaN, infinite, or too large for its precision.
    """
    for name, values in network.named_parameters():
        if values.numel() and not torch.stack(torch.aminmax(values.detach())).isfinite().all():
            raise MaskLoomError(
                f"{where}: its weights hold NaN or infinite values in {values.dtype} (such as {name}); "
                "give other weights, or, if they are too large for half precision, set train.mixed_precision=no"
            )


def build_network(kind: type[Any], settings: dict[str, Any], where: str) -> Any:
    """Return a network with these settings and initial weights.

    Raises:
        MaskLoomError: the settings cannot be used.
    """
    silence_loading()
    try:
        if issubclass(kind, CLIPTextModel):
            return CLIPTextModel(CLIPTextConfig(**settings))
        return kind.from_config(settings)
    except Exception as error:  # a wrong setting raises errors of many kinds; the remedy is the same
        raise unreadable(where, kind, error, "give a folder in diffusers format") from error


def unreadable(where: str, kind: type[Any], error: Exception, remedy: str) -> MaskLoomError:
    """Return the error for files or settings that a class cannot read."""
    return MaskLoomError(f"{where}: cannot be read as {kind.__name__}: {excerpt(error)}; {remedy}")


def silence_loading() -> None:
    """Silence the libraries' progress bars while loading, and a warning on a renamed argument."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # All supported versions of diffusers accept the older name.
    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)


def use_xformers(*modules: Any) -> None:
    """Enable xFormers attention in modules.

    Raises:
        MaskLoomError: xFormers is not installed or cannot run here.
    """
    try:
        for module in modules:
            module.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
        raise MaskLoomError(
            f"enable_xformers_memory_efficient_attention: {excerpt(error)}; {install_command('gpu')}, "
            "or set it to false (SDPA is used then)"
        ) from None
