"""Which training made a synthetic set, and what it took."""

from __future__ import annotations

from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import RECORD_FILE, Run
from maskloom.pipeline.runs.training_log import METRICS_FILE, read_metrics


def training_of(run: Run, name: str, contract: Contract) -> str | None:
    """Return the stage that trained a generator: `baselines/NAME` or `train`; None where its weights are the backbone's alone.

    Args:
        run: the run.
        name: the generator's; an architecture has the same one.
        contract: of its synthetic set.
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
    """Return what a training took, as far as it was recorded.

    Returns:
        `trained parameters` over all networks; `samples seen`; `training seconds` of its steps,
        over all interruptions, without start-up, caches, validation and checkpoints; `peak memory
        in MB`, of the device where it is a GPU, else of the process.
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
        found["training seconds"] = _seconds(lines, samples / lines[-1]["step"])
        found["peak memory in MB"] = max(line["peak_memory_mb"] for line in lines)
    return found


def _seconds(lines: list[dict[str, float]], samples_a_step: float) -> float:
    """Return the time of the steps: each line tells the rate since the one before."""
    steps = [0, *(line["step"] for line in lines)]
    pairs = zip(steps[:-1], lines, strict=True)
    return sum((line["step"] - before) * samples_a_step / line["samples_per_second"] for before, line in pairs)
