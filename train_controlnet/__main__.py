"""`accelerate launch -m train_controlnet --config configs/demo.yaml [--force] [key=value ...]`."""

from pipeline.cli import run_stage_command
from pipeline.config import ExperimentConfig


def _stage(config: ExperimentConfig, force: bool) -> None:
    from train_controlnet.train import train_stage

    train_stage(config, force)


if __name__ == "__main__":
    run_stage_command(_stage, "Train a ControlNet on a frozen Stable Diffusion backbone.")
