"""The model card that a push sends: the card that training wrote, with figures and provenance.

Metadata follow the Hub's specification (huggingface/hub-docs, modelcard.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import BaseModel, Field

from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Contract, read_contract
from maskloom.pipeline.dataset.licence import hub_identifier, licence_metadata
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import file_digest
from maskloom.pipeline.files.formatting import duration_text, markdown_table
from maskloom.pipeline.files.reading import read_model
from maskloom.pipeline.results import CONTROLS, Evaluation, Interval, Table, cell_text, read_evaluations
from maskloom.pipeline.runs.answers import is_current
from maskloom.pipeline.runs.record import StageRecord
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.trainings import training_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
TAGS = ("stable-diffusion", "diffusers")
TRAINING_TAG = "diffusers-training"
LOADING = {
    "controlnet": "ControlNetModel",
    "lora": "StableDiffusionPipeline",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
"""By weights folder: the class of diffusers that loads it."""
LIBRARY, MODELS = "diffusers", "maskloom.models"
SHOWN_TABLES = 1  # of each question: the metric's main one
SPREAD = "standard deviation"  # such a column belongs to the figure beside it


@dataclass(frozen=True)
class Weights:
    """Trained weights that become a model repository.

    Attributes:
        name: one of `LOADING`, or a generator architecture of the stage `baselines`.
        folder: of their files.
        record: of the stage that trained them, `train` or `baselines/NAME`.
        files: the `*.safetensors` that are pushed, relative to the folder.
    """

    name: str
    folder: Path
    record: StageRecord
    files: tuple[str, ...]


class NetworkConfig(BaseModel):
    """The part of a network's `config.json` that the card shows."""

    class_name: str = Field(alias="_class_name", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")


def hub_base_model(identity: str) -> str | None:
    """Return the Hub id in a backbone's identity (`pipeline.files.atomic.model_digest`).

    None for a local folder: its path means nothing elsewhere, and says something of the machine.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, at, _ = identity.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if at else None


def completed_card(text: str, weights: Weights, repo_id: str, run: Run) -> tuple[str, list[str]]:
    """Return the README.md of a model repository, and notes for the user.

    Args:
        text: the card that was written beside the weights.
        weights: the weights.
        repo_id: the repository.
        run: the run.

    Raises:
        MaskLoomError: the text's metadata cannot be read.
    """
    from huggingface_hub import RepoCard

    contract, record = read_contract(run.dataset), weights.record
    evaluations, own_sets, notes = current_evaluations(run, weights, contract)
    card = _with_metadata(text, weights, contract)
    task = "text-to-image" if weights.name in LOADING else architecture_task(run, weights.name)
    if results := eval_results(evaluations, own_sets, contract.description.dataset, task):
        card.data["model_name"], card.data["eval_results"] = repo_id.split("/")[-1], results
    completed = RepoCard.from_template(
        card.data,
        template_path=str(TEMPLATE),
        text=card.text.strip(),
        repo_id=repo_id,
        name=weights.name,
        loader=LOADING.get(weights.name),
        networks={} if weights.name in LOADING else _networks(weights.folder),
        evaluations=evaluations,
        shown_tables=SHOWN_TABLES,
        as_markdown=lambda table: "\n".join(
            markdown_table(table.columns, [[cell_text(cell) for cell in row] for row in table.rows])
        ),
        record=record,
        duration=duration_text(record.wall_seconds),
        digests={name: file_digest(weights.folder / name) for name in weights.files},
    )
    return str(completed), notes


def _with_metadata(text: str, weights: Weights, contract: Contract) -> ModelCard:
    """Return the card that training wrote, with licence, base model, library and tags."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        again = f"run {weights.record.stage.split('/')[0]} again"
        raise MaskLoomError(
            f"{weights.folder / 'README.md'}: its metadata cannot be read ({one_line(error)}); {again}"
        ) from None
    is_diffusion = weights.name in LOADING
    tags = (*TAGS, weights.name, TRAINING_TAG) if is_diffusion else (LIBRARY, weights.name.replace("_", "-"))
    metadata = {
        **licence_metadata(contract.description),
        "base_model": hub_base_model(weights.record.inputs.get("backbone", "")),
        "library_name": LIBRARY,
        "tags": list(dict.fromkeys([*tags, *card.data.get("tags", [])])),
    }
    for key, value in metadata.items():
        card.data[key] = value
    return card


def current_evaluations(run: Run, weights: Weights, real: Contract) -> tuple[list[Evaluation], list[str], list[str]]:
    """Return evaluations of these weights' images, their synthetic datasets, and notes.

    Evaluations of other images, or of images older than the weights, are left out.
    """
    sets = {p.parent.name: read_contract(p.parent) for p in sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))}
    measured = [one for one in read_evaluations(run.evaluation) if not one.skipped and one.metric != CONTROLS]
    digests = {"real": real.digest, **{name: contract.digest for name, contract in sets.items()}}
    fitting = [one for one in measured if is_current(run, one, digests)]
    own = [name for name, contract in sets.items() if training_of(run, name, contract) == weights.record.stage]
    newest = max((weights.folder / name).stat().st_mtime for name in weights.files)
    made = min(((run.synthetic / name / CONTRACT_FILE).stat().st_mtime for name in own), default=0.0)
    if measured and (not fitting or made < newest):
        note = (
            "the evaluation is of other images than these weights' and is left out of the card; "
            "run generate and evaluate again"
        )
        return [], [], [note]
    return fitting, own, []


def architecture_task(run: Run, name: str) -> str:
    """Return the Hub's task of an architecture of `baselines`: from masks or from noise."""
    folder = run.synthetic / name
    about = read_contract(folder).description.preprocessing if (folder / CONTRACT_FILE).is_file() else {}
    how = about.get("generation") or {}
    from_masks = how.get("uses_mask") and how.get("mask_source") != "drawn"
    return "image-to-image" if from_masks else "unconditional-image-generation"


def eval_results(
    evaluations: Iterable[Evaluation], own_sets: Sequence[str], dataset: str, task: str
) -> list[EvalResult]:
    """Return the figures of the shown tables' rows that name one of the sets, for `model-index`."""
    from huggingface_hub import EvalResult

    names = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, own_sets))})(?![\w-])")
    rows = [
        (table, row, [cell for cell in row if isinstance(cell, str)])
        for evaluation in evaluations
        for table in evaluation.tables[:SHOWN_TABLES]
        for row in table.rows
    ]
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=hub_identifier(column),
            metric_name=f"{column} ({'; '.join(words)})",
            metric_value=value,
            metric_args=bounds,
        )
        for table, row, words in rows
        if own_sets and any(map(names.search, words))
        for column, value, bounds in _figures(table, row)
    ]


def _figures(table: Table, row: Sequence[object]) -> Iterator[tuple[str, float, dict[str, float] | None]]:
    """Yield column, value and interval of a row's measured figures; counts are not measured."""
    for column, cell in zip(table.columns, row, strict=True):
        if SPREAD in column:
            continue
        if isinstance(cell, Interval) and cell.value is not None:
            bounds = None if cell.low is None or cell.high is None else {"low": cell.low, "high": cell.high}
            yield column, cell.value, bounds
        elif isinstance(cell, float):
            yield column, cell, None


def _networks(folder: Path) -> dict[str, tuple[str, str]]:
    """Return module and class of an architecture's networks, by folder."""
    configs = sorted(folder.glob("*/config.json"))
    classes = [read_model(path, NetworkConfig, "run baselines again with --force").class_name for path in configs]
    return {path.parent.name: (_module(name), name) for path, name in zip(configs, classes, strict=True)}


def _module(class_name: str) -> str:
    """Return the module of a network's class: in this project's models, otherwise diffusers."""
    spec = find_spec(MODELS)
    folders = (spec and spec.submodule_search_locations) or []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*.py"))):
        if re.search(rf"^class {class_name}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{MODELS}.{path.stem}"
    return LIBRARY
