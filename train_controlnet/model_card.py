"""The model card of trained weights; `maskloom push` adds figures and provenance."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from maskloom.models.stable_diffusion.prompt_encoding import MARKS, load_prompt_encoder
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import ADAPTER_FILE, KOHYA_FILE
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.licence import licence_metadata
from maskloom.pipeline.files.provenance import git_sha
from maskloom.pipeline.hub.cards import TAGS, TRAINING_TAG, hub_base_model

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
TITLES = {"controlnet": "ControlNet", "lora": "LoRA adapters", "unet": "UNet", "vae": "VAE"}
"""Title of the card by weights folder."""


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
    # `pipe(prompt)` of diffusers encodes prompts as in training, unless they have several chunks.
    chunks = None if kind == "vae" else train.prompt_chunks
    length = load_prompt_encoder(train).length if chunks else 0
    data = ModelCardData(
        **licence_metadata(about),
        base_model=base_model,
        library_name="diffusers",
        tags=[*TAGS, kind, TRAINING_TAG, "medical", "maskloom"],
        inference=True,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        kind=kind,
        title=TITLES[kind],
        about=about,
        digest=dataset.digest,
        train=train,
        trained=trained_parts(train),
        rows=", ".join(
            f"{split} {splits[split].rows} rows in {splits[split].groups} groups"
            for split in dataset.contract.split_names
        ),
        colours=colours if about.conditioning in ("mask", "both") else "",
        grid=grid,
        seed=config.seed,
        backbone=backbone,
        code=git_sha(),
        adapter_file=ADAPTER_FILE,
        kohya_file=KOHYA_FILE,
        chunks=chunks,
        length=length,
        room=length - MARKS,
    )
    return f"{card}\n"


def trained_parts(train: TrainConfig) -> str:
    """Return the trained networks in words."""
    parts = [] if train.controlnet in ("none", "frozen") else [f"ControlNet ({train.controlnet})"]
    parts += [f"LoRA of rank {train.rank} on {', '.join(train.lora)}"] if train.lora else []
    parts += [] if train.sd_locked else ["the UNet's decoder"]
    parts += ["the VAE's decoder"] if train.vae_decoder else []
    return "; ".join(parts)
