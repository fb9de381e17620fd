"""Find the training behind a synthetic dataset, and its cost."""

from __future__ import annotations

from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import RECORD_FILE, Run
from maskloom.pipeline.runs.training_log import METRICS_FILE, read_metrics


def training_of(run: Run, name: str, contract: Contract) -> str | None:
    """Return the stage that trained a generator, `baselines/NAME` or `train`.

    Args:
        run: the run.
        name: name of the generator, which is also that of its architecture.
        contract: contract of its synthetic dataset.

    Returns:
        The stage, or None if the generator uses only the weights of the backbone.
    """
    if (run.logs(f"baselines/{name}") / RECORD_FILE).is_file():
        return f"baselines/{name}"
    record = read_record(run, "train")
    if record is None:
        return None
    backbone = record.inputs.get("backbone")
    generation = contract.description.preprocessing.get("generation") or {}
    return "train" if generation.get("weights", backbone) != backbone else None


def training_cost(run: Run, stage: str) -> dict[str, float]:
    """Return the cost of a training, as far as it was recorded.

    Returns:
        `trained parameters` of all networks; `samples seen`; `training seconds` of its steps,
        summed over interruptions, without start-up, caches, validation and checkpoints; `peak
        memory in MB` of the GPU, or else of the process.
    """
    record = read_record(run, stage)
    if record is None:
        return {}
    trained, samples = record.results.get("trained_parameters"), record.results.get("samples_seen")
    found: dict[str, float] = {}
    if trained is not None:
        found["trained parameters"] = sum(trained.values()) if isinstance(trained, dict) else trained
    if samples is not None:
        found["samples seen"] = samples
    lines = [line for line in read_metrics(run.logs(stage) / METRICS_FILE) if "samples_per_second" in line]
    if lines and samples:
        samples_per_step = samples / lines[-1]["step"]
        # Each line contains the rate since the line before.
        steps = [0, *(line["step"] for line in lines)]
        found["training seconds"] = sum(
            (line["step"] - before) * samples_per_step / line["samples_per_second"]
            for before, line in zip(steps[:-1], lines, strict=True)
        )
        found["peak memory in MB"] = max(line["peak_memory_mb"] for line in lines)
    return found
