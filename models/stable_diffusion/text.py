"""The tokenizer and the text encoder's settings of a backbone, without weights and torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from maskloom.models.stable_diffusion.keys import KEY, TOKENIZER_KEY
from maskloom.models.stable_diffusion.source import SETTINGS, BackboneSource, read_settings
from maskloom.pipeline.errors import MaskLoomError, excerpt

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, CLIPTokenizer


def load_tokenizer(source: BackboneSource) -> CLIPTokenizer:
    """Return the tokenizer; its maximum length is at most that of the text encoder.

    Raises:
        MaskLoomError: it cannot be read.
    """
    where = f"{TOKENIZER_KEY}={source.tokenizer_name}" if source.tokenizer_name else f"{KEY}={source.name}"
    tokenizer = read_tokenizer(source.tokenizer_folder(), where)
    tokenizer.model_max_length = int(
        min(tokenizer.model_max_length, load_text_settings(source).max_position_embeddings)
    )
    return tokenizer


def read_tokenizer(folder: Path, where: str) -> CLIPTokenizer:
    """Return the tokenizer in a folder.

    Args:
        folder: holds the files of the tokenizer.
        where: the configuration key of the folder, for messages.

    Raises:
        MaskLoomError: it cannot be read.
    """
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise MaskLoomError(
            f"{where}: {folder} cannot be read as CLIPTokenizer: {excerpt(error)}; download the tokenizer again"
        ) from error


def load_text_settings(source: BackboneSource) -> CLIPTextConfig:
    """Return the settings of the text encoder.

    Raises:
        MaskLoomError: they are missing or invalid.
    """
    from transformers import CLIPTextConfig

    path = source.settings_folder() / "text_encoder" / SETTINGS["text_encoder"]
    try:
        return CLIPTextConfig(**read_settings(path))
    except Exception as error:  # a wrong setting raises errors of many kinds; the remedy is the same
        raise MaskLoomError(
            f"{KEY}={source.name}: {path} cannot be read as CLIPTextConfig: {excerpt(error)}; "
            "give a folder in diffusers format"
        ) from error
