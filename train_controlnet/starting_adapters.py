"""Adapters (LoRA) that a training starts from: `train.lora_model_name_or_path`.

The file may use diffusers', PEFT's or kohya's names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor

from maskloom.models.stable_diffusion.trained_parts import LORA_KEY, adapter_file
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError, excerpt

METADATA = "lora_adapter_metadata"  # in files of newer versions of diffusers: rank and alpha by network
UP_NAMES = (".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", ".lora_B.weight")
PARTS = ("unet", "text_encoder")


def load_adapters(networks: Mapping[str, Any], config: TrainConfig) -> None:
    """Load the weights of a file into the adapters of UNet and text encoder.

    The weights are rescaled so that the adapters have the effect of those in the file, whatever its
    alpha.

    Args:
        networks: networks with their adapters, by name; on the meta device they are only checked.
        config: names the file, the adapted networks, rank and alpha.

    Raises:
        MaskLoomError: the file cannot be read, or its rank, layers or backbone are not those of the
            training.
    """
    assert config.lora_model_name_or_path is not None
    where = f"{LORA_KEY}={config.lora_model_name_or_path}"
    found = read_adapters(adapter_file(config.lora_model_name_or_path), where)
    adapted = [name for name in PARTS if name in config.lora]
    for name in PARTS:
        if name in adapted and not found[name]:
            raise MaskLoomError(f"{where}: holds no adapters of the {name}; take {name} out of train.lora")
        if name not in adapted and found[name]:
            raise MaskLoomError(f"{where}: holds adapters of the {name} as well; add {name} to train.lora")
    for name in adapted:
        network, weights = networks[name], found[name]
        if name == "text_encoder" and not hasattr(network, "text_model"):  # transformers 5 and later
            weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
        expected = get_peft_model_state_dict(network, save_embedding_layers=False)
        check_layers(weights, expected, f"{where}: {name}", config)
        scale = config.rank / (config.lora_alpha or config.rank)
        scaled = {key: value.float() * (scale if "lora_B" in key else 1) for key, value in weights.items()}
        if not next(network.parameters()).is_meta:
            set_peft_model_state_dict(network, scaled)


def read_adapters(file: Path, where: str) -> dict[str, dict[str, Tensor]]:
    """Return each network's adapters under PEFT's names, alpha multiplied into the second matrix.

    Raises:
        MaskLoomError: the file is not a LoRA of Stable Diffusion.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            notes = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
            raw = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (a file, not a dictionary)
        if any("dora" in key for key in raw) or any(
            notes.get(f"{part}.{key}") for part in PARTS for key in ("use_dora", "use_rslora", "alpha_pattern")
        ):
            raise ValueError("DoRA, rank-stabilised LoRA and an alpha per layer are not supported")
        state, _ = StableDiffusionPipeline.lora_state_dict(_with_alphas(raw))
        parts = {
            part: {key.removeprefix(f"{part}."): v for key, v in state.items() if key.startswith(f"{part}.")}
            for part in PARTS
        }
        unknown = [key for key in state if not key.startswith(tuple(f"{part}." for part in PARTS))]
        if unknown or not state:
            raise ValueError(f"{unknown[0]!r} belongs to neither UNet nor text encoder" if unknown else "it is empty")
        unet, text_encoder = parts["unet"], parts["text_encoder"]
        named = {
            "unet": convert_unet_state_dict_to_peft(unet),
            "text_encoder": convert_state_dict_to_peft(convert_state_dict_to_diffusers(text_encoder))
            if text_encoder
            else {},
        }
        return {part: _with_noted_alpha(weights, notes, part) for part, weights in named.items()}
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise MaskLoomError(
            f"{where}: {file.name} cannot be read as LoRA of Stable Diffusion ({excerpt(error)}); "
            "give a .safetensors file in diffusers', PEFT's or kohya's names"
        ) from error


def _with_alphas(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the matrices without alphas; each second one is multiplied by alpha / rank."""
    state = {key: value for key, value in raw.items() if not key.endswith(".alpha")}
    for key in raw.keys() - state.keys():
        layer = key.removesuffix(".alpha")
        up = next(layer + name for name in UP_NAMES if layer + name in raw)
        state[up] = state[up] * (float(raw[key]) / state[up].shape[1])
    return state


def _with_noted_alpha(weights: Mapping[str, Tensor], notes: Mapping[str, Any], part: str) -> dict[str, Tensor]:
    """Return the matrices, the second ones multiplied by alpha / rank from the metadata."""
    alpha = notes.get(f"{part}.lora_alpha")
    return {
        key: value * (alpha / value.shape[1]) if alpha is not None and "lora_B" in key else value
        for key, value in weights.items()
    }


def check_layers(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, config: TrainConfig) -> None:
    """Check that adapters have the rank, layers and shapes of the training's, and finite values.

    Raises:
        MaskLoomError: they have not; names the first difference and the remedy.
    """
    ranks = sorted({value.shape[0] for key, value in found.items() if "lora_A" in key})
    if ranks != [config.rank]:
        ways = f"set train.rank={ranks[0]}" if len(ranks) == 1 else "give adapters of one rank"
        raise MaskLoomError(
            f"{where}: its adapters have rank {', '.join(map(str, ranks))}, and train.rank is {config.rank}; {ways}"
        )
    strange, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    if strange or missing:
        which = f"adapts {strange[0]}, which this training does not" if strange else f"lacks {missing[0]}"
        raise MaskLoomError(
            f"{where}: {which} ({len(strange)} weights too many, {len(missing)} missing); adapters must cover all "
            "projections of attention of this backbone, and no other layers"
        )
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise MaskLoomError(
                f"{where}: {key} has shape {list(value.shape)}, not {list(expected[key].shape)}: made for another "
                f"backbone than {config.pretrained_model_name_or_path}"
            )
        if not torch.isfinite(value).all():
            raise MaskLoomError(f"{where}: {key} holds NaN or infinite values; give other weights")
