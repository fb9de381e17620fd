"""`python -m evaluate --config FILE [--force] [key=value ...]`."""

from maskloom.pipeline.cli import run_stage_command
from maskloom.pipeline.config.experiment import ExperimentConfig


def _stage(config: ExperimentConfig, force: bool) -> None:
    from maskloom.evaluate.evaluate import evaluate

    evaluate(config, force)


if __name__ == "__main__":
    run_stage_command(
        _stage,
        "Ask the configured questions of every synthetic dataset; one JSON file a question.",
        memory_advice="lower batch_size or image_size in the options of the metric that was running (evaluate.metrics.NAME)",
    )
