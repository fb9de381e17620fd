"""The configuration of an experiment, one section per stage."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from maskloom.pipeline.config.base import MAX_NAME, NAME_PATTERN, Plugins, Section, UserPath, plugin_options
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.config.evaluate import EvaluateConfig, ReportConfig
from maskloom.pipeline.config.filter import FILTERED, FilterConfig
from maskloom.pipeline.config.generate import GenerateConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError


class ExperimentConfig(Section):
    """The configuration of one experiment, one section per stage."""

    experiment: str = Field(pattern=NAME_PATTERN, max_length=MAX_NAME)
    run_dir: UserPath | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig
    train: TrainConfig | None = Field(None, description="null: do not fine-tune a backbone")
    baselines: Annotated[Plugins, plugin_options()] = Field(
        default_factory=dict,
        description="further generator architectures to train: file name in train_baselines/architectures -> its options",
    )
    generate: GenerateConfig = GenerateConfig()
    filter: FilterConfig | None = Field(None, description="null: do not filter synthetic images")
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @property
    def run_folder(self) -> Path:
        """The run folder: `run_dir`, by default `runs/EXPERIMENT`."""
        return self.run_dir or Path("runs") / self.experiment

    @property
    def synthetic_sets(self) -> list[str]:
        """Names of the synthetic datasets: one per generator, then their filtered forms."""
        names = list(self.generate.generators)
        return names if self.filter is None else [*names, *(f"{name}{FILTERED}" for name in names)]

    @model_serializer(mode="wrap")
    def _without_absent_filter(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an absent filter, so that `config.yaml` of a run without one is stable."""
        return {name: value for name, value in serialise(self).items() if name != "filter" or value is not None}

    @property
    def fine_tuning(self) -> TrainConfig:
        """The section `train`, which must exist.

        Raises:
            MaskLoomError: the configuration has no such section.
        """
        if self.train is None:
            raise MaskLoomError(
                "the configuration has no section `train`, which names the backbone; "
                "set train.pretrained_model_name_or_path"
            )
        return self.train
