"""A whole Stable Diffusion pipeline with random weights, small enough to build in a second: real
classes, tiny sizes.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 32
MAX_TOKENS = 48


def build_tiny_backbone(folder: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Write a StableDiffusionPipeline folder (VAE factor 8, about 1 MB) and return it.

    The same seed gives the same weights.

    Args:
        folder: where to write; made if missing.
        seed: of the random weights.
        prediction_type: what the scheduler says that the UNet predicts, `epsilon` or
            `v_prediction`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(folder / "tokenizer"),
            unet=_unet(),
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.save_pretrained(folder)
    return folder


def build_tiny_controlnet(backbone: Path, folder: Path, seed: int = 0) -> Path:
    """Write a ControlNet for a tiny backbone and return its folder.

    Its zero convolutions get random weights: a ControlNet as it starts out would leave every image
    unchanged.
    """
    unet = UNet2DConditionModel.from_pretrained(backbone, subfolder="unet", local_files_only=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
        for layer in (
            *controlnet.controlnet_down_blocks,
            controlnet.controlnet_mid_block,
            controlnet.controlnet_cond_embedding.conv_out,
        ):
            layer.weight.normal_()
    controlnet.save_pretrained(folder)
    return folder


def _scheduler(prediction_type: str) -> DDPMScheduler:
    """Return Stable Diffusion 1.5's noise schedule."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _text_encoder() -> CLIPTextModel:
    ends = len(_vocabulary()) - 1
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=ends + 1,
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=ends - 1,
            eos_token_id=ends,
            pad_token_id=ends,
        )
    ).eval()


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """Write vocab.json and merges.txt (letters only, no merges) and read them as diffusers does."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, local_files_only=True)


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}
