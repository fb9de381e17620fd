"""The card that is saved beside the weights."""

from pathlib import Path

import yaml

from pipeline.config import ExperimentConfig
from pipeline.contract import Contract
from pipeline.provenance import git_sha


def model_card(config: ExperimentConfig, contract: Contract, pictures: Path | None) -> str:
    """Return the README.md of a trained ControlNet, with the metadata that the Hub reads."""
    about, train = contract.description, config.train
    metadata = {
        "license": "other",
        "license_name": about.licence,
        "base_model": train.pretrained_model_name_or_path,
        "tags": ["stable-diffusion", "diffusers", "controlnet", "diffusers-training", "medical", "maskloom"],
        "inference": True,
    }
    colours = ", ".join(f"{name} = rgb{colour}" for name, colour in zip(about.mask_classes, about.palette, strict=True))
    classes = f": {colours}" if about.conditioning in ("mask", "both") else ""
    rows = ", ".join(
        f"{split} {summary.rows} rows in {summary.groups} groups" for split, summary in contract.splits.items()
    )
    grid = "\n![conditioning | real | samples](samples.png)\n" if pictures else ""
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# ControlNet for {about.modality} ({about.dataset})

A ControlNet trained by MaskLoom on the frozen backbone `{train.pretrained_model_name_or_path}`.
The conditioning image is `{about.conditioning}`{classes}.
{grid}
| | |
|---|---|
| data | {about.dataset}, {about.licence}; {rows} |
| image size | {about.image_size[0]} x {about.image_size[1]}, {about.channels} channel(s) |
| steps | {train.max_train_steps} of {train.train_batch_size} x {train.gradient_accumulation_steps} samples a process |
| learning rate | {train.learning_rate:g}, {train.lr_scheduler}, warm-up {train.lr_warmup_steps} |
| objective | {train.prediction_type or "the backbone's prediction type"}, min-SNR gamma {train.snr_gamma}, empty prompts {train.proportion_empty_prompts:g} |
| precision | {train.mixed_precision} |
| dataset digest | `{contract.digest}` |
| code | `{git_sha()}` |

Citation of the data: {about.citation}

The model can only show what its training data shows, may repeat training images, and is not a medical device.
"""
