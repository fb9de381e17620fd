"""A Stable Diffusion pipeline of full size with random weights: what it costs to train and sample is real.

    python -m benchmarks.random_backbone sd15 OUT [--form fp16] [--seed 0] [--tiny]

OUT becomes a folder that `StableDiffusionPipeline.from_pretrained` opens (`--form folder`, or `fp16`: weights of
half precision, as the variant of that name), or a file in Stable Diffusion's original layout (`single-file`, for
`sd15`). The architecture is that of `models/stable_diffusion/settings`, which ship with the project; the tokenizer is
that of the bundled backbone, whose token numbers fit, and pads to as many tokens as the text encoder takes. Nothing is
downloaded.
`--tiny` keeps the kinds of all layers and makes them a few channels wide, to try a command on before a GPU is at hand.
"""

from __future__ import annotations

import json
import shutil
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer

from maskloom.models.stable_diffusion.original_layout import write_original
from maskloom.models.stable_diffusion.source import INDEX, ORIGINAL, SETTINGS, WEIGHTS, BackboneSource, read_settings
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import write_json
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.command import run_command

TOKENIZER = Path(__file__).resolve().parent.parent / "assets" / "nano-sd" / "tokenizer"
TINY: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
    | {"attention_head_dim": 2, "cross_attention_dim": 32},
    "vae": {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32}
    | {"num_attention_heads": 4, "num_hidden_layers": 2},
}
"""What `--tiny` changes in the settings of each part."""
ABSENT = {
    "requires_safety_checker": False,
    **{name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")},
}


class Architecture(NamedTuple):
    """What tells apart the pipelines of one generation.

    Attributes:
        generation: folder in `models/stable_diffusion/settings`.
        latent_side: of the images that the UNet was trained on, in latent pixels of 8.
        prediction_type: what the UNet predicts.
    """

    generation: str
    latent_side: int
    prediction_type: str


ARCHITECTURES = {
    "sd15": Architecture("sd1", 64, "epsilon"),
    "sd21-base": Architecture("sd2", 64, "epsilon"),
    "sd21": Architecture("sd2", 96, "v_prediction"),
}


class Name(StrEnum):
    """Names of `ARCHITECTURES`."""

    SD15 = "sd15"
    SD21_BASE = "sd21-base"
    SD21 = "sd21"


class Form(StrEnum):
    """What is written."""

    FOLDER = "folder"
    FP16 = "fp16"
    SINGLE_FILE = "single-file"


def main(
    name: Annotated[Name, typer.Argument(help="the architecture")],
    out: Annotated[Path, typer.Argument(help="folder, or .safetensors file, that does not exist yet")],
    form: Annotated[Form, typer.Option(help="what is written")] = Form.FOLDER,
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="layers a few channels wide")] = False,
) -> None:
    """Write a pipeline."""
    if out.exists():
        raise MaskLoomError(f"{out}: exists; name a new place")
    with TemporaryDirectory() as scratch:
        settings = write_tiny_settings(Path(scratch)) if tiny else ORIGINAL
        write_random_backbone(ARCHITECTURES[name], out, form, seed, settings)
    say(f"wrote {out}")


def write_tiny_settings(folder: Path) -> Path:
    """Write the settings of each generation with layers a few channels wide, and return the folder."""
    for generation in {one.generation for one in ARCHITECTURES.values()}:
        shutil.copytree(ORIGINAL / generation, folder / generation)
        for part, changes in TINY.items():
            file = folder / generation / part / SETTINGS[part]
            write_json(file, read_settings(file) | changes)
    return folder


def write_random_backbone(
    architecture: Architecture, out: Path, form: Form = Form.FOLDER, seed: int = 0, settings: Path = ORIGINAL
) -> None:
    """Write a pipeline with random weights, one network in memory at a time.

    Args:
        architecture: of the networks.
        out: folder or file.
        form: see `Form`.
        seed: of the weights.
        settings: folder with a folder of settings per generation.

    Raises:
        MaskLoomError: a single file of another generation than 1.x is asked for.
    """
    if form != Form.SINGLE_FILE:
        _write_folder(architecture, out, "fp16" if form == Form.FP16 else None, seed, settings)
        return
    if architecture.generation != "sd1":
        raise MaskLoomError(
            "--form single-file: written for sd15 alone, as the text encoder of 2.x has another layout there; use folder or fp16"
        )
    with TemporaryDirectory(dir=out.parent) as scratch:
        _write_folder(architecture, Path(scratch), None, seed, settings)
        write_original(Path(scratch), out)


def _write_folder(architecture: Architecture, folder: Path, variant: str | None, seed: int, settings: Path) -> None:
    import torch
    from transformers import CLIPTokenizer

    from maskloom.models.stable_diffusion.loading import KINDS, new_network

    original = settings / architecture.generation
    for part in WEIGHTS:
        torch.manual_seed(seed)
        network: Any = new_network(KINDS[part], BackboneSource(str(original)), part)
        if part == "unet":
            network.register_to_config(sample_size=architecture.latent_side)
        network = network.half() if variant else network
        network.save_pretrained(folder / part, variant=variant)
        del network
    tokens = read_settings(original / "text_encoder" / SETTINGS["text_encoder"])["max_position_embeddings"]
    CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=tokens).save_pretrained(folder / "tokenizer")
    scheduler = Path("scheduler") / SETTINGS["scheduler"]
    write_json(
        folder / scheduler, read_settings(original / scheduler) | {"prediction_type": architecture.prediction_type}
    )
    write_json(folder / INDEX, ABSENT | json.loads((original / INDEX).read_text(encoding="utf-8")))


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
