"""Find the training behind a synthetic dataset, what it was trained on, and its cost."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from maskloom.pipeline.config.filter import FILTERED
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.reading import Record, checked
from maskloom.pipeline.runs.record import StageRecord, read_record
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
    backbone = backbone_digest(record)
    generation = contract.description.preprocessing.get("generation") or {}
    return "train" if generation.get("weights", backbone) != backbone else None


def backbone_digest(record: StageRecord) -> str | None:
    """Return the digest of the backbone that `train` recorded, as a generator states it that uses nothing else.

    A tokenizer of its own is an input of its own, and is part of what the generator states.
    """
    found = {name: record.inputs[name] for name in ("backbone", "tokenizer") if name in record.inputs}
    return value_digest(found) if len(found) > 1 else found.get("backbone")


class TrainingStatement(Record):
    """What a synthetic dataset states about the training of its generator, from that training's own record.

    Attributes:
        stage: the stage that trained it, `train` or `baselines/NAME`; None: nothing was trained.
        dataset: digest of the dataset that it was trained on.
        weights: digest of the trained weights; of the backbone if nothing was trained.
    """

    stage: Annotated[str, Field(pattern=r"^(train|baselines/[A-Za-z0-9_]+)$")] | None
    dataset: str | None
    weights: str | None


UNTRAINED = "none"
"""What stands for the digest of weights that have not been trained."""


def weights_now(run: Run, stage: str) -> str:
    """Return the digest of the weights that a training of this run has left, or `UNTRAINED`."""
    return training_statement(run, stage).weights or UNTRAINED


def training_statement(run: Run, stage: str) -> TrainingStatement:
    """Return the statement about a training of this run; `stage` is `train` or `baselines/NAME`."""
    record = read_record(run, stage)
    if record is None:
        return TrainingStatement(stage=stage, dataset=None, weights=None)
    weights = record.results.get("weights_digest")
    return TrainingStatement(
        stage=stage, dataset=record.inputs.get("dataset"), weights=None if weights is None else str(weights)
    )


def require_same_training(run: Run, name: str, real: MaskPromptDataset, synthetic: MaskPromptDataset) -> None:
    """Check that a synthetic dataset was made from this real one, by a generator trained on it.

    A generator that was trained on another version may have learnt from images that are held out now.
    Datasets written before the contract stated the training are checked by the run's own record.

    Args:
        run: the run.
        name: name of the generator.
        real: the real dataset.
        synthetic: the synthetic dataset.

    Raises:
        MaskLoomError: the contract is damaged, or names no parent or generator, or another one;
            or the generator was trained on another dataset, or again since; or what the contract states
            of the training contradicts the records of this run.
    """
    folder, parent = synthetic.folder, synthetic.contract.parent
    if parent is None:
        raise MaskLoomError(
            f"{folder / CONTRACT_FILE}: names no real dataset (parent: null), so nothing shows that its images were not made "
            f"from held-out ones; generate the set from {real.folder}"
        )
    if parent.digest != real.digest:
        raise MaskLoomError(f"{folder}: made from another version of {real.folder}; run generate again")
    _require_generator(name, synthetic)
    stated = _stated_training(synthetic)
    if stated:
        _require_recorded_training(run, name.removesuffix(FILTERED), stated, synthetic)
    stage = stated.stage if stated else training_of(run, name, synthetic.contract)
    if stage is None:
        return
    recorded = training_statement(run, stage)
    require_trained_on(real, stage, stated.dataset if stated else recorded.dataset or real.digest, str(folder))
    if newer_training(run, synthetic):
        raise MaskLoomError(
            f"{folder}: made with other weights than those that {stage} has trained since; run generate again"
        )


def _require_generator(name: str, synthetic: MaskPromptDataset) -> None:
    """Check that the generator that a set's folder is named after made it; its filtered form has a suffix.

    `generate` has always stated it, and so does `judge` of the images that it reads.

    Raises:
        MaskLoomError: the contract states no generator, or another one.
    """
    generation = synthetic.description.preprocessing.get("generation")
    stated = generation.get("generator") if isinstance(generation, dict) else None
    if stated is None:
        raise MaskLoomError(
            f"{synthetic.folder / CONTRACT_FILE}: does not state the generator (description.preprocessing.generation.generator), "
            f"so nothing shows that {name} made these images; run generate again, or maskloom judge for images of another source"
        )
    if stated != name.removesuffix(FILTERED):
        raise MaskLoomError(
            f"{synthetic.folder}: made by {stated}, as its {CONTRACT_FILE} states, not by {name}; "
            "move it back to the folder of its generator, or run generate again"
        )


def _require_recorded_training(
    run: Run, generator: str, stated: TrainingStatement, synthetic: MaskPromptDataset
) -> None:
    """Check that a contract states the training that this run has recorded for the generator.

    A set that was copied from another run is only checked as far as this run knows its generator.

    Raises:
        MaskLoomError: the contract states the training of another generator, or none although the
            run trains this one, or one that the run that made the set has no record of.
    """
    generated = read_record(run, "generate")
    made_here = generated is not None and f"weights of {generator}" in generated.inputs
    if stated.stage is None:
        problem = _trained_after_all(run, generator, stated, synthetic, made_here)
    elif stated.stage not in ("train", f"baselines/{generator}"):
        problem = f"states the training of another generator, {stated.stage}"
    elif stated.stage == "train" and read_record(run, f"baselines/{generator}") is not None:
        problem = f"states that train trained its generator, but baselines/{generator} did, as this run has recorded"
    elif made_here and read_record(run, stated.stage) is None:
        problem = f"states that {stated.stage} trained its generator, but this run has no record of that training, so run it again"
    else:
        return
    if problem:
        where = f"{synthetic.folder / CONTRACT_FILE}: description.preprocessing.generation.training"
        raise MaskLoomError(f"{where}: {problem}; run generate again with --force")


def _trained_after_all(
    run: Run, generator: str, stated: TrainingStatement, synthetic: MaskPromptDataset, made_here: bool
) -> str:
    """Return what contradicts a statement that nothing was trained; empty if nothing does.

    Images of another source (`judge`) state no weights at all.
    """
    if read_record(run, f"baselines/{generator}") is not None:
        return f"states that nothing was trained, but this run has recorded baselines/{generator}"
    record = read_record(run, "train")
    backbone = None if record is None else backbone_digest(record)
    weights = {stated.weights, synthetic.description.preprocessing["generation"].get("weights")}
    if backbone is None or weights == {backbone} or (weights == {None} and not made_here):
        return ""
    return (
        "states that nothing was trained, but its weights are not those of the backbone that train has recorded (if the "
        "backbone was changed since, run train first)"
    )


def newer_training(run: Run, synthetic: MaskPromptDataset) -> str | None:
    """Return the stage that has trained other weights since a synthetic dataset was made; None if none has.

    Raises:
        MaskLoomError: what the contract states of the training is damaged.
    """
    stated = _stated_training(synthetic)
    if stated is None or stated.stage is None:
        return None
    return stated.stage if training_statement(run, stated.stage).weights not in (None, stated.weights) else None


def require_trained_on(real: MaskPromptDataset, stage: str, trained_on: str | None, where: str) -> None:
    """Check that a generator was trained on this very real dataset.

    Args:
        real: the real dataset as it is now.
        stage: the stage that trained the generator.
        trained_on: digest of the dataset that it was trained on.
        where: the synthetic dataset or the generator, for the error.

    Raises:
        MaskLoomError: it was trained on another one.
    """
    if trained_on != real.digest:
        raise MaskLoomError(
            f"{where}: its generator was trained ({stage}) on another version of {real.folder}, and may have learnt from images "
            f"that are held out now; run {stage.split('/')[0]} and generate again"
        )


def _stated_training(synthetic: MaskPromptDataset) -> TrainingStatement | None:
    """Return what a contract states; None if an older version wrote it.

    Raises:
        MaskLoomError: the statement is damaged.
    """
    generation = synthetic.description.preprocessing.get("generation")
    if not isinstance(generation, dict) or "training" not in generation:
        return None
    where = f"{synthetic.folder / CONTRACT_FILE}: description.preprocessing.generation.training"
    return checked(generation["training"], TrainingStatement, where, "run generate again with --force")


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
