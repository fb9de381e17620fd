"""The sections `evaluate` and `report`."""

from typing import Annotated, Literal

from pydantic import Field

from maskloom.pipeline.config.base import Plugins, Section, plugin_options
from maskloom.pipeline.config.bounds import Shown
from maskloom.pipeline.plugins import default_plugins

DEFAULT_METRICS = default_plugins("maskloom.evaluate.metrics")


class EvaluateConfig(Section):
    """`evaluate`: the metrics to compute for every synthetic dataset."""

    metrics: Annotated[Plugins, plugin_options(*DEFAULT_METRICS)] = Field(
        {name: {} for name in DEFAULT_METRICS},
        description="file name in evaluate/metrics -> its options",
    )
    on_copies: Literal["drop", "stop", "keep"] = Field(
        "drop",
        description="synthetic images that are copies of training images: left out of downstream training, export and combine; an error; or kept",
    )


class ReportConfig(Section):
    """`report`: the content of the page."""

    title: str | None = None
    images_per_class: Shown = Field(4, ge=1)
