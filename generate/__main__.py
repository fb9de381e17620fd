"""`accelerate launch -m generate --config FILE [--force] [key=value ...]`; plain `python -m generate` works as well."""

from maskloom.pipeline.cli import run_stage_command
from maskloom.pipeline.config.experiment import ExperimentConfig


def _stage(config: ExperimentConfig, force: bool) -> None:
    from maskloom.generate.generate import generate

    generate(config, force)


if __name__ == "__main__":
    run_stage_command(
        _stage,
        "Weave a synthetic dataset from masks and prompts, one for every generator of the configuration.",
        memory_advice="lower generate.batch_size, or set generate.mixed_precision=fp16 (bf16 on a CPU)",
    )
