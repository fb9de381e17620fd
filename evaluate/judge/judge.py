"""`judge`: one command from two folders, real and synthetic images, to a verdict.

It prepares the real images, writes the synthetic ones as a set made elsewhere, and runs the stages
`evaluate` and `report` in a run of its own. The questions, the checks for leaks and copies, and the
page are theirs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.judge.given import Given, given_folder, require_apart
from maskloom.evaluate.judge.importing import NAME, import_set, record_stop
from maskloom.evaluate.judge.reading import (
    SYNTHETIC_KEY,
    check_keys,
    guessed_data,
    prepare,
    read_synthetic,
    synthetic_values,
)
from maskloom.evaluate.judge.remarks import few_groups_remark
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.config.base import with_home
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import merged, parsed_override, read_values, validated
from maskloom.pipeline.dataset.contract import CONTRACT_FILE
from maskloom.pipeline.dataset.copies import COPIES_FILE
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import LeakedImages, MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, whole_folder
from maskloom.pipeline.progress import say
from maskloom.pipeline.report.stage import write_report
from maskloom.pipeline.results import read_evaluations
from maskloom.pipeline.runs.leaks import SYNTHETIC_FIX
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.sample_files import sample_files, write_sample_files
from maskloom.pipeline.runs.stage import Stage, open_run

CONFIG = Path("configs/judge.yaml")
REMEDY = (
    "take these images out of the synthetic folder, and ask who made them whether held-out images were among what they "
    "trained on; then run the same command again: a stronger search may follow that finds further ones"
)


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        real, synthetic: the folders.
        out: the run folder; None: that of the configuration, `runs/judged`.
        config: the configuration to start from.
        size: side of the images to which raw real ones are resized, or None.
        seeds: trainings per arm, or None.
        overrides: `key=value`; keys that begin with `synthetic.` are about reading the synthetic images.
    """

    real: Path
    synthetic: Path
    out: Path | None = None
    config: Path = CONFIG
    size: int | None = None
    seeds: int | None = None
    overrides: Sequence[str] = ()


def judge(request: Request, force: bool) -> float:
    """Write `OUT`: the real dataset, the synthetic set, the evaluation and the report.

    Returns:
        The share of the synthetic files, from 0 to 1, that could not be used and were not judged.

    Raises:
        MaskLoomError: a folder or an option is wrong, or the folders do not fit each other.
        LeakedImages: a synthetic image shows a held-out one, or a copy is to stop the evaluation.
        typer.Exit: images could not be read; `prepare` has said why.
    """
    real, synthetic = given_folder("real", request.real), given_folder("synthetic", request.synthetic)
    own = [one for one in request.overrides if not one.startswith(SYNTHETIC_KEY)]
    check_keys([one for one in request.overrides if one.startswith(SYNTHETIC_KEY)])
    stated = read_values(request.config, own)
    out = with_home(request.out) if request.out else validated(stated, ExperimentConfig, str(request.config)).run_folder
    require_apart(real, synthetic, out)
    values = experiment_values(request, real, out, own)
    config = validated(values, ExperimentConfig, str(request.config))
    for name, options in config.evaluate.metrics.items():
        open_question(name, options)
    run = open_run(config)
    if real.prepared:
        copy_real(run, real, force)
    else:
        prepare(values, force)
    dataset = verify_quickly(run.dataset)
    if remark := few_groups_remark(dataset):
        say(remark)
    with real_images_stay(run):
        try:
            images = judged_images(request, synthetic, dataset, config, force)
            import_set(run, dataset, images, synthetic.folder, force, states_masks(request, synthetic, images))
            evaluate(config, force)
        except LeakedImages as leak:
            remove_results(run)
            if SYNTHETIC_FIX in leak.remedy:
                record_stop(run, leak)
            raise LeakedImages(leak.found, leak.remedy.replace(SYNTHETIC_FIX, REMEDY), leak.files) from None
        write_report(config, force)
    left_out = images.contract.rejected
    if left_out:
        print(f"{left_out} of {images.num_rows + left_out} synthetic files could not be used and were not judged:")
        print(
            f"  what follows says nothing about them, nor whether they are copies; why: {images.folder}/rejected.jsonl"
        )
    print_verdicts(run)
    return left_out / (images.num_rows + left_out)


def experiment_values(request: Request, real: Given, out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of the run, unvalidated: the file, what the folders say, then the overrides.

    Raises:
        MaskLoomError: the real folder cannot be read, or `--size` is given for a prepared dataset.
    """
    if real.prepared:
        about = MaskPromptDataset.open(real.folder).description
        if request.size is not None:
            height, width = about.image_size
            raise MaskLoomError(
                f"--size {request.size}: {real.folder} is prepared already, at {height} x {width}; leave --size out"
            )
        data: dict[str, Any] = {
            "dataset": about.dataset,
            "image_size": list(about.image_size),
            "conditioning": about.conditioning,
        }
    else:
        stated = _stated([one.removeprefix("data.") for one in overrides if one.startswith("data.")], "data.")
        data = guessed_data(real, stated) | ({"image_size": request.size} if request.size else {})
    between: dict[str, Any] = {"run_dir": str(out), "data": data, "generate": {"generators": {NAME: {}}}}
    if request.seeds is not None:
        metrics = read_values(request.config, list(overrides)).get("evaluate", {}).get("metrics", {})
        trained = [name for name in metrics if "seeds" in open_question(name, {}).module.Options.model_fields]
        between["evaluate"] = {"metrics": {name: {"seeds": request.seeds} for name in trained}}
    return read_values(request.config, list(overrides), between)


def copy_real(run: Run, real: Given, force: bool) -> None:
    """Copy a prepared dataset into the run, so that the run is whole.

    Raises:
        MaskLoomError: the dataset is damaged, or is not a real one.
    """
    dataset = verify_quickly(real.folder)
    if dataset.description.origin != "real":
        raise MaskLoomError(
            f"--real {real.folder}: a {dataset.description.origin} dataset; give the real one, that images are compared with"
        )
    stage = Stage(run, "prepare", {"dataset": dataset.digest}, ["copied"], [run.dataset])
    if stage.skips(force):
        return
    with stage.recorded() as results, whole_folder(run.dataset) as folder:
        for name in [*dataset.contract.files, CONTRACT_FILE]:
            if (real.folder / name).is_file():  # rejected.jsonl is not published with a dataset
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(real.folder / name, folder / name)
        write_sample_files(run.dataset, sample_files(real.folder).items())
        results["rows"] = {split: part.rows for split, part in dataset.contract.splits.items()}


def judged_images(
    request: Request, synthetic: Given, real: MaskPromptDataset, config: ExperimentConfig, force: bool
) -> MaskPromptDataset:
    """Return the dataset of the images to judge, verified.

    Raises:
        MaskLoomError: it is damaged, or an override does not apply.
        typer.Exit: the images could not be read.
    """
    given = [one.removeprefix(SYNTHETIC_KEY) for one in request.overrides if one.startswith(SYNTHETIC_KEY)]
    if synthetic.prepared:
        if given:
            raise MaskLoomError(f"{SYNTHETIC_KEY}{given[0]}: {synthetic.folder} is prepared already; leave it out")
        return verify_quickly(synthetic.folder)
    place = config.run_folder / "cache" / f"given-{value_digest(str(synthetic.folder.resolve()))[:8]}"
    stated = _stated(given, SYNTHETIC_KEY)
    return read_synthetic(synthetic_values(synthetic, real.description, place, config.seed, stated), force)


def states_masks(request: Request, synthetic: Given, images: MaskPromptDataset) -> bool:
    """Whether the user has said what the synthetic mask values mean, or reads a layout that says it itself."""
    key = f"{SYNTHETIC_KEY}options.mask_values"
    by_class = isinstance((images.description.preprocessing.get("options") or {}).get("masks"), dict)
    has_key = not synthetic.prepared and images.description.dataset in ("folder", "hf_folder") and not by_class
    return not has_key or any(one.startswith((f"{key}=", f"{key}.")) for one in request.overrides)


def _stated(overrides: Sequence[str], section: str) -> dict[str, Any]:
    """Return overrides of a section, given without its name, as nested mappings."""
    values: dict[str, Any] = {}
    for override in overrides:
        values = merged(values, parsed_override(override), f"override {section}{override}")
    return values


def remove_results(run: Run) -> None:
    """Delete the report and the answers about earlier images: they say nothing about those that leak.

    The list of copies stays: each of its sets is named by its digest.
    """
    OwnedFolder(run.folder).remove([run.report.name])
    if run.evaluation.is_dir():
        answers = OwnedFolder(run.evaluation)
        answers.remove([name for name in answers.files() if name != COPIES_FILE])


@contextmanager
def real_images_stay(run: Run) -> Iterator[None]:
    """Where the block refuses, say that the prepared real images stay, so that the next try need not read them."""
    try:
        yield
    except (MaskLoomError, typer.Exit):
        say(
            f"judge: the real images stay in {run.dataset}, prepared; the same command uses them again, as long as "
            "neither they nor the settings change"
        )
        raise


def print_verdicts(run: Run) -> None:
    """Print the verdict of each question, and where the report is."""
    for answer in read_evaluations(run.evaluation):
        print(f"{answer.question}\n  {answer.verdict}")
    print(f"Report: {run.report}")
    say(f"judge: images and figures are in {run.folder}")
