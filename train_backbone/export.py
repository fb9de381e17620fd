"""Export of the trained parts as a StableDiffusionPipeline folder with card and sample grid."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.files.ownership import whole_folder
from maskloom.pipeline.files.provenance import git_sha
from maskloom.pipeline.files.reading import read_object
from maskloom.train_backbone.architecture import new_scheduler
from maskloom.train_backbone.config import BackboneConfig
from maskloom.train_backbone.vocabulary import CLIP_FILES

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
SAMPLE_STEPS, SAMPLE_GUIDANCE, SAMPLES_PER_PROMPT = 20, 3.0, 2
MAX_PROMPTS = 12


def new_pipeline(
    config: BackboneConfig,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    """Return the parts as a pipeline, without safety checker: none exists for medical images."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(config.architecture),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_pipeline(
    pipe: StableDiffusionPipeline, tokenizer_folder: Path, folder: Path, card: str, grid: Image.Image
) -> None:
    """Write weights in fp16 safetensors, tokenizer, README.md and samples.png, atomically.

    Args:
        pipe: the pipeline in float32; it is not changed.
        tokenizer_folder: holds `vocab.json` and `merges.txt`, which are copied.
        folder: the output folder, replaced if it exists.
        card: the text of README.md.
        grid: the sample grid.
    """
    with whole_folder(folder) as unfinished:
        copy.deepcopy(pipe).to(dtype=torch.float16).save_pretrained(unfinished, safe_serialization=True)
        for name in CLIP_FILES:
            (unfinished / "tokenizer" / name).write_bytes((tokenizer_folder / name).read_bytes())
        # Without this, transformers would load the text encoder, and nothing else, in fp16.
        config_file = unfinished / "text_encoder" / "config.json"
        settings = {**read_object(config_file, "run the recipe again"), "dtype": "float32"}
        config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        grid.save(unfinished / "samples.png", optimize=True)


def sample_prompts(texts: Sequence[Sequence[str]], labels: Sequence[Sequence[int | None]]) -> list[str]:
    """Return up to `MAX_PROMPTS` training prompts, from every class of every source in turn."""
    by_class: dict[tuple[int, int | None], list[str]] = {}
    for source, (prompts, classes) in enumerate(zip(texts, labels, strict=True)):
        for prompt, label in zip(prompts, classes, strict=True):
            found = by_class.setdefault((source, label), [])
            if prompt not in found:
                found.append(prompt)
    turns = max(len(found) for found in by_class.values())
    ordered = [found[turn] for turn in range(turns) for found in by_class.values() if turn < len(found)]
    return ordered[:MAX_PROMPTS]


@torch.no_grad()
def sample_grid(pipe: StableDiffusionPipeline, prompts: Sequence[str], seed: int) -> Image.Image:
    """Return a grey sample grid, generated from text alone: two prompts per line."""
    scheduler = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config(scheduler.config)
    rows = [
        pipe(
            [prompt] * SAMPLES_PER_PROMPT,
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=SAMPLE_GUIDANCE,
            generator=torch.Generator().manual_seed(seed + number),
        ).images
        for number, prompt in enumerate(prompts)
    ]
    pipe.scheduler = scheduler
    side = rows[0][0].width
    # Two prompts per line keep the grid from becoming tall and narrow.
    lines = -(-len(rows) // 2)
    grid = Image.new("L", (2 * SAMPLES_PER_PROMPT * side, lines * side))
    for number, row in enumerate(rows):
        for place, image in enumerate(row):
            grid.paste(image.convert("L"), (((number % 2) * SAMPLES_PER_PROMPT + place) * side, number // 2 * side))
    return grid


def model_card(
    config: BackboneConfig, contracts: Sequence[Contract], prompts: Sequence[str], facts: dict[str, Any]
) -> str:
    """Return the README.md.

    Args:
        config: the recipe.
        contracts: the contracts of the training datasets.
        prompts: the prompts of the sample grid.
        facts: figures of the training by name, such as last losses and parameter counts.
    """
    card = ModelCard.from_template(
        ModelCardData(
            license="mit",
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=["stable-diffusion", "medical", "maskloom"],
        ),
        template_path=str(TEMPLATE),
        size=config.architecture.image_size,
        architecture=config.architecture,
        denoiser=config.denoiser,
        sample_steps=SAMPLE_STEPS,
        guidance=SAMPLE_GUIDANCE,
        prompts=prompts,
        contracts=contracts,
        parts=[(f"VAE, crops of {config.vae.pixels} px", config.vae), ("UNet + text encoder", config.denoiser)],
        facts=facts,
        code=git_sha(),
    )
    return f"{card}\n"
