"""Loads the parts of a Stable Diffusion backbone, from the Hub or a local folder, with errors a user can act on."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from pipeline.errors import MaskLoomError, one_line

KEY = "train.pretrained_model_name_or_path"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_backbone(name_or_path: str) -> None:
    """Check what can be checked before anything is loaded.

    Raises:
        MaskLoomError: it looks like a local path but no Stable Diffusion folder is there.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        missing = [
            part
            for part in ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
            if not (folder / part).exists()
        ]
        if missing:
            raise MaskLoomError(
                f"{KEY}={name_or_path}: {', '.join(missing)} missing; give a Stable Diffusion folder in diffusers format"
            )
    elif name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1 or folder.parent.is_dir():
        raise MaskLoomError(
            f"{KEY}={name_or_path}: no such folder; give a local folder or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )


def load_part(part: type[Any], name_or_path: str, **settings: Any) -> Any:
    """Return a part of the backbone, or a pipeline of all its parts; see `load_weights`.

    Raises:
        MaskLoomError: it cannot be loaded.
    """
    check_backbone(name_or_path)
    return load_weights(part, name_or_path, KEY, **settings)


def load_weights(part: type[Any], name_or_path: str, key: str, **settings: Any) -> Any:
    """Return `part.from_pretrained(...)`; a local folder is read without asking the network.

    Args:
        part: a diffusers or transformers class with `from_pretrained`.
        name_or_path: Hub id or folder.
        key: the configuration key that names it.
        **settings: passed on (`subfolder`, `revision`, `variant`, `torch_dtype`, …).

    Raises:
        MaskLoomError: it cannot be loaded; carries the library's reason.
    """
    silence_loading()
    try:
        return part.from_pretrained(name_or_path, local_files_only=Path(name_or_path).is_dir(), **settings)
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        where = "/".join(filter(None, (name_or_path, settings.get("subfolder"))))
        raise MaskLoomError(
            f"{key}: {where} cannot be loaded as {part.__name__}: {one_line(error)[:300]}; "
            "give a folder in diffusers format or a Hub id"
        ) from error


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
            f"enable_xformers_memory_efficient_attention: {one_line(error)[:200]}; pip install -e .[gpu], or leave it off (SDPA is used then)"
        ) from None
