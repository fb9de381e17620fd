"""The model card of trained weights; `maskloom push` adds figures and provenance."""

from pathlib import Path
from typing import Any

import yaml

from maskloom.models.stable_diffusion.prompt_encoding import MARKS, load_prompt_encoder
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import ADAPTER_FILE, KOHYA_FILE
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.files.provenance import git_sha
from maskloom.pipeline.hub.cards import TAGS, TRAINING_TAG, hub_base_model, licence_metadata

TITLES = {"controlnet": "ControlNet", "lora": "LoRA adapters", "unet": "UNet", "vae": "VAE"}
"""Title of the card by weights folder."""
LORA_FILES = f"""## Files

- `{ADAPTER_FILE}`: for diffusers, `pipe.load_lora_weights(FOLDER)`.
- `{KOHYA_FILE}`: the same adapters under kohya's names. Copy it to `models/loras` of ComfyUI (node
  Load LoRA) or to `models/Lora` of AUTOMATIC1111 (`<lora:{Path(KOHYA_FILE).stem}:1>` in the prompt).
  Use a checkpoint of the same backbone, and strength 1 for UNet and text encoder.

"""
PROMPT_CHUNKS = """## Prompts

In training, prompts were encoded in {chunks} chunks of {room} tokens. Encode them in the same way for
sampling; `pipe(prompt)` would truncate them:

```python
import torch

def prompt_embeds(text):
    ids = pipe.tokenizer(text, add_special_tokens=False).input_ids
    pieces = [ids[i : i + {room}] for i in range(0, {chunks} * {room}, {room})]
    marked = [[pipe.tokenizer.bos_token_id, *piece, pipe.tokenizer.eos_token_id] for piece in pieces]
    padded = [piece + [pipe.tokenizer.pad_token_id] * ({length} - len(piece)) for piece in marked]
    with torch.no_grad():
        return pipe.text_encoder(torch.tensor(padded, device=pipe.device))[0].flatten(0, 1)[None]

image = pipe(prompt_embeds=prompt_embeds(prompt), negative_prompt_embeds=prompt_embeds("")).images[0]
```

ComfyUI, AUTOMATIC1111 and compel (`truncate_long_prompts=False`) also join chunks, but only as many
as a prompt fills.

"""


def model_card(
    config: ExperimentConfig, dataset: MaskPromptDataset, grid: Path | None, kind: str = "controlnet"
) -> str:
    """Return the README.md of trained weights with the metadata for the Hub, without local paths.

    Args:
        config: the experiment.
        dataset: the real dataset.
        grid: the sample grid, if there is one (`samples.png` next to the card).
        kind: the weights folder, one of `TITLES`.
    """
    about, splits, train = dataset.description, dataset.contract.splits, config.fine_tuning
    backbone = BackboneSource.of(train).inputs()["backbone"]
    base_model = hub_base_model(backbone)
    colours = ", ".join(f"{name} = rgb{colour}" for name, colour in zip(about.mask_classes, about.palette, strict=True))
    classes = f": {colours}" if about.conditioning in ("mask", "both") else ""
    conditioning = f"\nThe conditioning image is `{about.conditioning}`{classes}." if kind == "controlnet" else ""
    rows = ", ".join(
        f"{split} {splits[split].rows} rows in {splits[split].groups} groups" for split in dataset.contract.split_names
    )
    samples = "\n![conditioning | real | samples](samples.png)\n" if grid else ""
    return f"""---
{yaml.safe_dump(card_metadata(about, kind, base_model), sort_keys=False).strip()}
---

# {TITLES[kind]} for {about.modality} ({about.dataset})

Trained by MaskLoom on {f"`{base_model}`" if base_model else "a Stable Diffusion backbone of the digest below"}.{conditioning}
{samples}
| | |
|---|---|
| data | {about.dataset}, {about.licence}; {rows} |
| image size | {about.image_size[0]} x {about.image_size[1]}, {about.channels} channel(s) |
| trained | {trained_parts(train)} |
| steps | {train.max_train_steps} of {train.train_batch_size} x {train.gradient_accumulation_steps} samples per process |
| learning rate | {train.learning_rate:g}, {train.lr_scheduler}, warm-up {train.lr_warmup_steps} |
| objective | {train.prediction_type or "the backbone's prediction type"}, min-SNR gamma {train.snr_gamma}, empty prompts {train.proportion_empty_prompts:g} |
| precision | {train.mixed_precision} |
| seed | {config.seed} |
| backbone | `{backbone}` |
| dataset digest | `{dataset.digest}` |
| code | `{git_sha()}` |

{usage(train, kind)}Citation of the data: {about.citation}

The model can only show what its training data shows, may repeat training images, and is not a medical device.
"""


def usage(train: TrainConfig, kind: str) -> str:
    """Return the sections about files and prompts; empty if diffusers' defaults suffice."""
    chunks, lora = train.prompt_chunks, LORA_FILES if kind == "lora" else ""
    if chunks is None or kind == "vae":
        return lora
    length = load_prompt_encoder(train).length
    return lora + PROMPT_CHUNKS.format(chunks=chunks, room=length - MARKS, length=length)


def card_metadata(about: Description, kind: str, base_model: str | None) -> dict[str, Any]:
    """Return the YAML header of the card, which the Hub reads."""
    return {
        **licence_metadata(about),
        **({"base_model": base_model} if base_model else {}),
        "library_name": "diffusers",
        "tags": [*TAGS, kind, TRAINING_TAG, "medical", "maskloom"],
        "inference": True,
    }


def trained_parts(train: TrainConfig) -> str:
    """Return the trained networks in words."""
    parts = [] if train.controlnet in ("none", "frozen") else [f"ControlNet ({train.controlnet})"]
    parts += [f"LoRA of rank {train.rank} on {', '.join(train.lora)}"] if train.lora else []
    parts += [] if train.sd_locked else ["the UNet's decoder"]
    parts += ["the VAE's decoder"] if train.vae_decoder else []
    return "; ".join(parts)
