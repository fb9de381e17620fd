"""The networks of the small backbone: those of Stable Diffusion, orders of magnitude smaller.

| part | Stable Diffusion 1.5 | here |
|---|---|---|
| VAE | factor 8, 4 latent channels, 84 M | factor 8, 4 latent channels, 1.25 M |
| text encoder | CLIP ViT-L, 12 layers of 768, 123 M | CLIP, 2 layers of 96, 0.26 M |
| UNet | 4 levels of 320..1280, 860 M | 3 levels of 64..96, 4.1 M |
"""

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from maskloom.train_backbone.config import Architecture

FACTOR = 8
LATENT_CHANNELS = 4


def new_vae(sizes: Architecture) -> AutoencoderKL:
    """Return the untrained VAE: (B, 3, H, W) in [-1, 1] <-> (B, 4, H/8, W/8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=sizes.vae_norm_groups,
        sample_size=sizes.image_size,
        scaling_factor=1.0,
    )


def new_text_encoder(sizes: Architecture, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return the untrained text encoder: token ids (B, L) -> (B, L, text_width)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            max_position_embeddings=sizes.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(sizes: Architecture) -> UNet2DConditionModel:
    """Return the untrained UNet; only its two coarser levels have cross-attention, to save time."""
    return UNet2DConditionModel(
        sample_size=sizes.image_size // FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        # diffusers takes this argument as the number of heads (its issue 2011).
        attention_head_dim=tuple(width // sizes.unet_head_dim for width in sizes.unet_channels),
        norm_num_groups=sizes.unet_norm_groups,
    )


def new_scheduler(sizes: Architecture) -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule."""
    settings: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(
        **settings,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=sizes.prediction_type,
    )
