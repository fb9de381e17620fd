"""Writes a backbone in Stable Diffusion's original layout, one `.safetensors` file: the names that
diffusers' converters translate, turned round.
"""

import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_original(backbone: Path, file: Path) -> Path:
    """Write a folder's UNet, VAE and text encoder (CLIP's, as in 1.x) as one file and return it."""
    whole: dict[str, Tensor] = {}
    for part in ("unet", "vae", "text_encoder"):
        whole |= original_names(part, load_file(next((backbone / part).glob("*.safetensors"))))
    save_file({key: value.contiguous() for key, value in whole.items()}, file)
    return file


def original_names(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a part's weights under the names, and in the shapes, of the original layout."""
    if part == "text_encoder":
        return {
            f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value
            for key, value in weights.items()
        }
    if part == "vae":
        depth = 1 + max(int(match[1]) for key in weights if (match := re.match(r"decoder\.up_blocks\.(\d+)", key)))
        return {f"first_stage_model.{_vae_name(key, depth)}": _vae_weight(key, value) for key, value in weights.items()}
    layers = 1 + max(int(match[1]) for key in weights if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)", key)))
    attentive = {int(match[1]) for key in weights if (match := re.match(r"up_blocks\.(\d+)\.attentions", key))}
    return {f"model.diffusion_model.{_unet_name(key, layers, attentive)}": value for key, value in weights.items()}


def _unet_name(key: str, layers: int, attentive: set[int]) -> str:
    for ours, theirs in OUTER.items():
        if key.startswith(f"{ours}."):
            return key.replace(ours, theirs, 1)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        kind, number, rest = match.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{_inner(kind, rest)}"
    if not (match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)):
        return key
    side, kind, rest = match[1], match[3], match[5]
    level, number = int(match[2]), int(match[4])
    if side == "down":
        block = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else number)
        place = "0.op" if kind == "downsamplers" else f"{int(kind == 'attentions')}"
        name = f"input_blocks.{block}.{place}"
        return f"{name}.{rest.removeprefix('conv.')}" if kind == "downsamplers" else f"{name}.{_inner(kind, rest)}"
    block = level * (layers + 1) + (layers if kind == "upsamplers" else number)
    if kind == "upsamplers":  # after the attention layer, where the level has one
        return f"output_blocks.{block}.{1 + (level in attentive)}.{rest}"
    return f"output_blocks.{block}.{int(kind == 'attentions')}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, end = rest.rpartition(".")
    return f"{RESNET[layer]}.{end}"


def _vae_name(key: str, depth: int) -> str:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.*)", key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    if match := re.match(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", key):
        return f"{match[1]}.mid.attn_1.{ATTENTION[match[2]]}.{match[3]}"
    if match := re.match(r"encoder\.down_blocks\.(\d)\.(resnets|downsamplers)\.(\d)\.(.*)", key):
        level, kind, number, rest = match.groups()
        return f"encoder.down.{level}.{'downsample' if kind == 'downsamplers' else f'block.{number}'}.{rest}"
    if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", key):
        level, kind, number, rest = match.groups()
        return f"decoder.up.{depth - 1 - int(level)}.{'upsample' if kind == 'upsamplers' else f'block.{number}'}.{rest}"
    return key


def _vae_weight(key: str, value: Tensor) -> Tensor:
    """Return a weight of the VAE's attention as the 1 x 1 convolution that it once was.

    Any other weight is returned unchanged.
    """
    is_matrix = ".attentions." in key and key.endswith("weight") and value.ndim == 2
    return value[:, :, None, None] if is_matrix else value
