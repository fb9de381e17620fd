"""The prepared dataset of a run, as far as it is the one that the configuration describes."""

import json
from collections.abc import Mapping
from typing import Any

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.differences import differences, differences_list
from maskloom.pipeline.runs.run import Run


def matching_dataset(config: ExperimentConfig) -> MaskPromptDataset | None:
    """Return the dataset of the run; None if there is none, or a stale one, which is said.

    `prepare` would write a stale dataset again, so its sizes and prompts are not those of the training.

    Raises:
        MaskLoomError: the contract of the dataset is damaged.
    """
    folder = Run(config.run_folder).dataset
    if not (folder / CONTRACT_FILE).is_file():
        return None
    dataset = MaskPromptDataset.open(folder)
    if differing := differing_from(config, dataset.description):
        say(f"{folder} is stale ({differences_list(differing)}): planned for the configuration")
        return None
    return dataset


def differing_from(config: ExperimentConfig, about: Description) -> dict[str, tuple[Any, Any]]:
    """Return the settings with which a dataset was prepared and that are others now.

    Returns:
        (value of the dataset, value now) by key of the section `data`, or `seed`. Settings that the
        dataset does not state are left out: it may come from elsewhere.
    """
    now = _settings(config)
    stated = {**about.preprocessing, **about.model_dump(mode="json", include={"dataset", "image_size", "conditioning"})}
    stated["buckets"] = [list(size) for size in about.buckets]
    there = {key: stated[key] for key in now if key in stated}
    return dict(differences(there, {key: now[key] for key in there}))


def _settings(config: ExperimentConfig) -> Mapping[str, Any]:
    """Return the settings that a description states, as its JSON spells them."""
    data = config.data
    told = data.model_dump(
        mode="json", include={"dataset", "buckets", "conditioning", "resize_mode", "splits", "options"}
    )
    settings: Mapping[str, Any] = json.loads(json.dumps({"image_size": data.image_size, **told, "seed": config.seed}))
    return settings
