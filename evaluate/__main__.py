"""`python -m evaluate --config FILE [--force] [key=value ...]`."""

from evaluate.evaluate import evaluate
from pipeline.cli import run_stage_command

if __name__ == "__main__":
    run_stage_command(evaluate, "Ask the configured questions of every synthetic dataset; one JSON file a question.")
