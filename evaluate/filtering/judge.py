"""Judges synthetic images by all criteria, with thresholds from real validation images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.filtering.calibration import Calibration, calibrate, rejections
from maskloom.evaluate.filtering.criterion import Criterion, Scores
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.features import ExtractorOptions, check_extractor
from maskloom.pipeline import __version__
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.filter import FilterConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.plugins import load_plugin

PACKAGE = "maskloom.evaluate.filtering.criteria"


@dataclass(frozen=True)
class CriterionPlugin:
    """A criterion of the configuration, with its checked options."""

    name: str
    module: ModuleType
    options: Section

    @property
    def identity(self) -> list[Any]:
        """What the scores depend on besides the data: name, version, options."""
        return [self.name, self.module.VERSION, self.options.model_dump(mode="json")]


def require_criteria(config: ExperimentConfig) -> FilterConfig:
    """Return the section `filter`, which must exist and name a criterion.

    Raises:
        MaskLoomError: it does not.
    """
    if config.filter is None:
        raise MaskLoomError("the configuration has no section `filter`; set filter={}")
    if not config.filter.criteria:
        raise MaskLoomError("filter.criteria is empty; name at least one, for example filter.criteria.realism={}")
    return config.filter


def open_criteria(config: ExperimentConfig) -> list[CriterionPlugin]:
    """Return the criteria of the configuration.

    Raises:
        MaskLoomError: see `require_criteria`; or a criterion or an option is unknown (the error
            suggests the nearest one), or a value is invalid.
    """
    return [open_criterion(name, options) for name, options in require_criteria(config).criteria.items()]


def open_criterion(name: str, options: dict[str, Any]) -> CriterionPlugin:
    """Return a criterion with its options checked; see `open_criteria` for the errors."""
    module = load_plugin(PACKAGE, name, "criterion")
    return CriterionPlugin(name, module, validated(options, module.Options, f"filter.criteria.{name}"))


def check_criterion(name: str, options: dict[str, Any]) -> None:
    """Check a criterion's options, and that its feature extractor can be used here.

    Raises:
        MaskLoomError: see `open_criteria`; or the package of the feature extractor is missing.
    """
    plugin = open_criterion(name, options)
    if isinstance(plugin.options, ExtractorOptions):
        check_extractor(plugin.options)


@dataclass(frozen=True)
class Judgement:
    """What the criteria say about the images of a set.

    Attributes:
        scores: by criterion.
        rejected: by criterion, (N,) whether it rejects each image.
    """

    scores: Mapping[str, Scores]
    rejected: Mapping[str, NDArray[np.bool_]]

    @property
    def accepted(self) -> NDArray[np.bool_]:
        """(N,) whether all criteria accept each image."""
        return ~np.any(list(self.rejected.values()), axis=0)


class Judge:
    """Scores image sets by all criteria; scores are kept on disk, so that a killed run continues."""

    def __init__(
        self,
        inputs: EvaluationInputs,
        plugins: list[CriterionPlugin],
        acceptance: float,
        cache: FeatureCache | None = None,
    ) -> None:
        """Store what to judge by; nothing is computed.

        Args:
            inputs: the real images; test images are never read.
            plugins: the criteria.
            acceptance: share of real validation images that all criteria together accept.
            cache: keeps the scores; None: in memory only.

        Raises:
            MaskLoomError: there are no validation images.
        """
        if not len(inputs.validation):
            raise MaskLoomError(
                f"{inputs.real.folder}: the validation split is empty, and the filter's thresholds are chosen on it; "
                "set data.splits.validation and prepare again"
            )
        self.inputs, self.plugins, self.acceptance, self.cache = inputs, plugins, acceptance, cache
        self._criteria: dict[str, Criterion] = {one.name: one.module.Criterion(inputs, one.options) for one in plugins}

    @cached_property
    def calibration(self) -> Calibration:
        """The thresholds."""
        validation = self.inputs.validation
        scores = {one.name: self._scores(one, validation) for one in self.plugins}
        fixed = {name: one.threshold for name, one in self._criteria.items() if one.threshold is not None}
        free = [one for one in self.plugins if one.name not in fixed]
        reference = {one.name: self._scores(one, self.inputs.train) for one in free}
        weights = {one.name: self._criteria[one.name].weight for one in free}
        return calibrate(scores, reference, weights, fixed, validation.groups, self.acceptance)

    def judge(self, image_set: ImageSet) -> Judgement:
        """Return what all criteria that apply to the dataset say about each image of a set."""
        thresholds = self.calibration.thresholds
        scores = {one.name: self._scores(one, image_set) for one in self.plugins if one.name in thresholds}
        rejected = dict(zip(thresholds, rejections(scores, thresholds), strict=True))
        return Judgement(scores, rejected)

    def _scores(self, plugin: CriterionPlugin, image_set: ImageSet) -> Scores:
        """Return the scores of a set as float64 with the precision of float32, as on disk."""

        def compute() -> NDArray[np.float32]:
            return self._criteria[plugin.name].scores(image_set).astype(np.float32)[:, None]

        if self.cache is None or not len(image_set):
            return compute()[:, 0].astype(np.float64)
        depends_on = [__version__, plugin.identity, self.inputs.real.digest, self.inputs.seed, self.inputs.device]
        digest = value_digest([image_set.dataset.digest])
        return self.cache.features(digest, image_set.split, depends_on, compute)[:, 0].astype(np.float64)
