"""Which settings may differ when a training is resumed: every other one is part of a checkpoint's
identity.
"""

from collections.abc import Iterator
from importlib import import_module

import pytest

from maskloom.pipeline.config.base import RESUMABLE
from maskloom.pipeline.config.train import LoopConfig, TrainConfig
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.training.resuming import training_identity
from maskloom.train_backbone.config import DenoiserConfig, VaeConfig
from maskloom.train_baselines.train import PACKAGE

DECIDING = {"validation_steps", "validation_samples", "validation_timestep_bins"}
MAY_DIFFER = DECIDING | {
    "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logging_steps", "report_to", "tracker_project_name",
    "dataloader_num_workers", "num_validation_images", "adherence", "vae_decoder", "validation_prompt", "validation_image",
    "gradient_checkpointing", "unet_gradient_checkpointing",
}  # fmt: skip


def trainings() -> Iterator[type[LoopConfig]]:
    yield from (LoopConfig, TrainConfig, VaeConfig, DenoiserConfig)
    for name in plugin_names(PACKAGE):
        yield import_module(f"{PACKAGE}.{name}").Options


@pytest.mark.parametrize("model", list(trainings()), ids=lambda model: f"{model.__module__}.{model.__name__}")
@pytest.mark.parametrize(("patience", "may_differ"), [(None, MAY_DIFFER), (3, MAY_DIFFER - DECIDING)])
def test_each_setting_may_differ_or_is_part_of_the_identity(
    model: type[LoopConfig], patience: int | None, may_differ: set[str]
) -> None:
    config = model.model_construct(pretrained_model_name_or_path="a/b", early_stopping_patience=patience)
    fields = set(model.model_fields)
    assert config.resumable_settings == may_differ & fields
    identity = training_identity(config, 7, {"dataset": "digest"}, 2)
    assert identity.keys() == {"dataset", "seed", "processes"} | (fields - may_differ)


def test_a_changed_default_keeps_the_mark() -> None:
    class Slower(LoopConfig):
        logging_steps: int = 100
        rank: int = 4

    assert RESUMABLE not in Slower.model_fields["logging_steps"].metadata
    assert Slower().resumable_settings == LoopConfig().resumable_settings
