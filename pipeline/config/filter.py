"""The section `filter`, which keeps the synthetic images that pass for real ones."""

from typing import Annotated

from pydantic import Field

from maskloom.pipeline.config.base import Plugins, Section, plugin_options
from maskloom.pipeline.plugins import default_plugins

DEFAULT_CRITERIA = default_plugins("maskloom.evaluate.filtering.criteria")
FILTERED = "-filtered"
"""Ending of the names of filtered datasets, after the generator's name."""


class FilterConfig(Section):
    """`filter`: synthetic datasets -> filtered ones, and the reason for every rejected image."""

    criteria: Annotated[Plugins, plugin_options(*DEFAULT_CRITERIA)] = Field(
        {name: {} for name in DEFAULT_CRITERIA},
        description="file name in evaluate/filtering/criteria -> its options",
    )
    acceptance: float = Field(
        0.95, gt=0, lt=1, description="share of real validation images that all criteria together accept"
    )
    rounds: int = Field(3, ge=0, le=100, description="how often a rejected image is drawn again; 0: never")
