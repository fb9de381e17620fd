"""The description of a prepared dataset that its contract holds."""

from collections.abc import Sequence
from typing import Any

from maskloom.data_prep.sources import Source
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.near_duplicates.search import METHOD, Threshold
from maskloom.pipeline.files.atomic import file_digest


def describe_dataset(sources: Sequence[Source], config: ExperimentConfig, threshold: Threshold | None) -> Description:
    """Return what is true of all rows: format, classes, preprocessing, licence.

    Args:
        sources: the main dataset and the external ones.
        config: the experiment.
        threshold: of near-duplicates; None if they were not searched for.
    """
    data, main = config.data, sources[0].info
    return Description(
        dataset=data.dataset,
        origin="real",
        modality=main.modality,
        channels=main.channels,
        image_size=data.image_size,
        buckets=tuple(data.sizes[1:]),
        mask_classes=main.mask_classes,
        palette=main.palette,
        labels=main.labels,
        prompt_templates=main.prompt_templates,
        conditioning=data.conditioning,
        preprocessing=_preprocessing(sources, config, threshold),
        licence=main.licence,
        citation=main.citation,
        homepage=main.homepage,
    )


def _preprocessing(sources: Sequence[Source], config: ExperimentConfig, threshold: Threshold | None) -> dict[str, Any]:
    data, intensity, stain = config.data, config.data.intensity, config.data.stain
    stated: dict[str, Any] = {
        "resize_mode": data.resize_mode,
        "resampling": "image: antialiased bicubic; mask: nearest neighbour, a class that would vanish keeps one pixel",
        "intensity": "as the dataset says"
        if intensity is None
        else intensity.model_dump(mode="json", exclude_none=True),
        "stain": None,
        "duplicates": sources[0].duplicates,
        "near_duplicates": None if threshold is None else {"method": METHOD, **threshold.stated()},
        "splits": data.splits.model_dump(),
        "seed": config.seed,
        "options": data.options,
    }
    if stain is not None:  # name and digest of the reference, without its local path
        path = stain.reference
        reference = "published reference vectors" if path is None else f"{path.name} ({file_digest(path)[:16]})"
        stated["stain"] = {"method": stain.method, "reference": reference}
    if len(sources) > 1:
        stated["external"] = {
            source.name: {
                "licence": source.info.licence,
                "citation": source.info.citation,
                "homepage": source.info.homepage,
            }
            for source in sources[1:]
        }
    return stated
