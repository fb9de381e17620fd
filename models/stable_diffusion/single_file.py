"""Stable Diffusion's original layout: a single `.safetensors` file with UNet, VAE and text encoder.

diffusers' own converters translate the names of weights. The file has no settings and no tokenizer;
see `BackboneSource`. Imports no torch at the top.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskloom.models.stable_diffusion.keys import KEY
from maskloom.pipeline.errors import MaskLoomError

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
"""Prefix of the weights' names by part."""
GENERATIONS = {
    "sd1": "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
    "sd2": "cond_stage_model.model.positional_embedding",
}
"""By generation: the name of a weight that only its text encoder has."""
XL_PREFIX = "conditioner.embedders."
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
WITHOUT_PLACE = ("position_ids", "text_projection.weight", "logit_scale")  # of CLIP, unused by Stable Diffusion


def generation_of(path: Path) -> str:
    """Return `sd1` or `sd2`.

    Raises:
        MaskLoomError: the file is damaged, or is not a Stable Diffusion 1.x or 2.x checkpoint.
    """
    keys = weight_shapes(path)
    absent = [part for part, prefix in PREFIXES.items() if not any(key.startswith(prefix) for key in keys)]
    found = next((name for name, key in GENERATIONS.items() if key in keys), None)
    if any(key.startswith(XL_PREFIX) for key in keys):
        raise MaskLoomError(
            f"{KEY}={path}: a Stable Diffusion XL file; only Stable Diffusion 1.x and 2.x can be trained and "
            "sampled here"
        )
    if absent or found is None:
        raise MaskLoomError(
            f"{KEY}={path}: holds no {', '.join(absent) or 'text encoder'} in Stable Diffusion's original layout; "
            "give a whole checkpoint of Stable Diffusion 1.x or 2.x, or a folder in diffusers format"
        )
    return found


def converted_names(part: str, weights: dict[str, Any], network: Any) -> dict[str, Any]:
    """Return the weights of a part under the names of diffusers' or transformers' class."""
    from diffusers.loaders import single_file_utils as converters

    if part == "unet":
        return converters.convert_ldm_unet_checkpoint(weights, config=network.config)
    if part == "vae":
        return converters.convert_ldm_vae_checkpoint(weights, config=network.config)
    open_clip = GENERATIONS["sd2"] in weights
    found = (
        converters.convert_open_clip_checkpoint(network, weights)
        if open_clip
        else converters.convert_ldm_clip_checkpoint(weights)
    )
    found = {key: value for key, value in found.items() if not key.endswith(WITHOUT_PLACE)}
    if not hasattr(network, "text_model"):  # transformers 5.6 dropped this level of names
        found = {key.removeprefix("text_model."): value for key, value in found.items()}
    return found


def weight_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shape of every weight by name, from the header of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise MaskLoomError(f"{KEY}={path}: no whole .safetensors file ({error}); download or copy it again") from None


def tensors_under(path: Path, prefix: str) -> dict[str, Any]:
    """Return the weights whose names start with a prefix."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
