"""`accelerate launch -m generate --config FILE [--force] [key=value ...]`; plain `python -m generate` works as well."""

from generate.generate import generate
from pipeline.cli import run_stage_command

if __name__ == "__main__":
    run_stage_command(
        generate, "Weave a synthetic dataset from masks and prompts, one for every generator of the configuration."
    )
