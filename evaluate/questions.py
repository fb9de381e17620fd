"""The questions of an evaluation: metrics with their checked options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from maskloom.evaluate import controls
from maskloom.evaluate.scores.features import ExtractorOptions, check_extractor, extractor_digests
from maskloom.models.network_options import NetworkOptions
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.plugins import load_plugin
from maskloom.pipeline.results import CONTROLS
from maskloom.pipeline.runs.run import Run

PACKAGE = "maskloom.evaluate.metrics"


@dataclass(frozen=True)
class Question:
    """A metric of the configuration, with its checked options."""

    name: str
    module: ModuleType
    options: Section

    @property
    def identity(self) -> list[Any]:
        """What the answer depends on besides the data: name, version, options."""
        return [self.name, self.module.VERSION, self.options.model_dump(mode="json")]

    @property
    def reads_weights(self) -> bool:
        """Whether this metric itself reads the weights that the stage `train` leaves."""
        return hasattr(self.module, "own_inputs")

    def own_inputs(self, run: Run, config: ExperimentConfig) -> dict[str, str]:
        """Return the digests of what this metric alone reads, by name: `own_inputs` of its file, and a vision model.

        Raises:
            MaskLoomError: trained weights are damaged, or a vision model cannot be read.
        """
        find = getattr(self.module, "own_inputs", None)
        model = extractor_digests(self.options) if isinstance(self.options, ExtractorOptions) else {}
        return model if find is None else {**find(run, config), **model}


def open_question(name: str, options: dict[str, Any] | None) -> Question:
    """Return a metric with its options checked.

    Raises:
        MaskLoomError: the metric or an option is unknown (the error suggests the nearest one), or a
            value is invalid.
    """
    module = load_plugin(PACKAGE, name, "metric")
    return Question(name, module, validated(options or {}, module.Options, f"evaluate.metrics.{name}"))


def check_question(name: str, options: dict[str, Any] | None) -> None:
    """Check a metric's options, and that its feature extractor and its network can be used here.

    Raises:
        MaskLoomError: see `open_question`; or a package of the feature extractor or the network is missing.
    """
    question = open_question(name, options)
    if isinstance(question.options, ExtractorOptions):
        check_extractor(question.options)
    if isinstance(question.options, NetworkOptions):
        question.options.check_packages()


def controls_question(questions: Sequence[Question]) -> Question:
    """Return the known controls as a question, with the options of the metrics that they test."""
    options = next((one.options for one in questions if one.name == "faithfulness"), None)
    return Question(CONTROLS, controls, controls.Options(faithfulness=options))
