"""The folders of trained weights that a training writes to `generator/`, and those it reads.

Imports no large library.
"""

from pathlib import Path

from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' name of a LoRA file."""
KOHYA_FILE = "kohya_lora_weights.safetensors"
"""The same LoRA under kohya's names, for ComfyUI and AUTOMATIC1111."""
LORA_KEY = "train.lora_model_name_or_path"


EXPORTED = ("controlnet", "unet", "lora", "vae")


def exported_names(config: TrainConfig) -> list[str]:
    """Return the names of the folders, which users of diffusers load one by one.

    `controlnet` (`ControlNetModel.from_pretrained`), `lora` (`pipe.load_lora_weights`), `unet` if
    its decoder is trained (`UNet2DConditionModel.from_pretrained`), and `vae` if its decoder is
    fine-tuned (`AutoencoderKL.from_pretrained`).
    """
    names = []
    if config.controlnet != "none":
        names.append("controlnet")
    if not config.sd_locked:
        names.append("unet")
    if {"unet", "text_encoder"} & set(config.lora):
        names.append("lora")
    if config.vae_decoder is not None:
        names.append("vae")
    return names


def adapter_file(name_or_path: str) -> Path:
    """Return a LoRA's weights file: the path itself, or the file in a folder.

    Raises:
        MaskLoomError: there is none, or there are several.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    ours = [file for file in found if file.name == ADAPTER_FILE]
    if len(ours or found) != 1:
        what = f"{len(found)} .safetensors files and no {ADAPTER_FILE}" if path.is_dir() else "no such file or folder"
        raise MaskLoomError(
            f"{LORA_KEY}={name_or_path}: {what}; give a LoRA's .safetensors file, or a folder that `train` wrote"
        )
    return (ours or found)[0]


def read_places(train: TrainConfig) -> dict[str, Path | None]:
    """Return the local files and folders that a training reads besides the dataset, by key."""
    named = {
        "train.pretrained_model_name_or_path": train.pretrained_model_name_or_path,
        "train.controlnet_model_name_or_path": train.controlnet_model_name_or_path,
        "train.lora_model_name_or_path": train.lora_model_name_or_path,
        "train.tokenizer_name": train.tokenizer_name,
        "train.single_file_config": train.single_file_config,
        **{f"train.validation_image[{number}]": path for number, path in enumerate(train.validation_image)},
    }
    return {key: Path(value) for key, value in named.items() if value is not None and Path(value).exists()}
