"""What a model repository says about itself on the Hub: the card that `train` wrote, completed with figures and provenance.

Metadata follow the Hub's specification (huggingface/hub-docs, modelcard.md).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Contract, Description, read_contract
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import file_digest
from maskloom.pipeline.files.formatting import duration_text, markdown_table
from maskloom.pipeline.files.reading import read_model
from maskloom.pipeline.results import Cell, Evaluation, Interval, Table, cell_text, read_evaluations
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.trainings import training_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ("stable-diffusion", "diffusers")
TRAINING_TAG = "diffusers-training"
LOADING = {
    "controlnet": ("ControlNetModel", 'controlnet = ControlNetModel.from_pretrained("{repo_id}")'),
    "lora": (
        "StableDiffusionPipeline",
        'pipe = StableDiffusionPipeline.from_pretrained({base})\npipe.load_lora_weights("{repo_id}")',
    ),
    "unet": ("UNet2DConditionModel", 'unet = UNet2DConditionModel.from_pretrained("{repo_id}")'),
    "vae": ("AutoencoderKL", 'vae = AutoencoderKL.from_pretrained("{repo_id}")'),
}
"""By weights folder: the diffusers class that loads it, and how."""
TEXT_TO_IMAGE = "text-to-image"
LIBRARY = "diffusers"
MODELS = "maskloom.models"
SHOWN_TABLES = 1  # of each question: the metric's main one
SPREAD = "standard deviation"  # a column of this name belongs to the figure beside it and is none of its own


def licence_metadata(about: Description) -> dict[str, str]:
    """Return the card's licence: weights have none of their own, so that of the data is named.

    The Hub takes identifiers from its list, or `other` with an id in small letters and a link.
    """
    name = _slug(about.licence)
    link = {"license_link": about.homepage} if re.match(r"https?://", about.homepage) else {}
    return {"license": "other", "license_name": name, **link}


def hub_base_model(identity: str) -> str | None:
    """Return the Hub id in a backbone's identity (`pipeline.files.atomic.model_digest`); None where it is a local folder's digest.

    Where a folder lies tells nothing elsewhere, and something about the machine.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name, at, _ = identity.partition("@")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if at else None


@dataclass(frozen=True)
class Weights:
    """Trained weights that become a model repository.

    Attributes:
        name: one of `LOADING`, or an architecture of the stage `baselines`.
        folder: where they lie.
        stage: that trained them, `train` or `baselines/NAME`.
        record: its `stage.json`.
    """

    name: str
    folder: Path
    stage: str
    record: Mapping[str, Any]

    @property
    def base_model(self) -> str | None:
        """The Hub id of the backbone; None where there is none, or only a local one."""
        return hub_base_model(self.record["inputs"].get("backbone", ""))

    @property
    def tags(self) -> tuple[str, ...]:
        """What the Hub finds them by."""
        return (*TAGS, self.name, TRAINING_TAG) if self.name in LOADING else (LIBRARY, self.name.replace("_", "-"))

    def files(self) -> list[Path]:
        """Return the files of weights."""
        return sorted(self.folder.rglob("*.safetensors"))


def completed_card(text: str, weights: Weights, repo_id: str, run: Run, notes: list[str]) -> str:
    """Return the README.md of a model repository.

    Args:
        text: the card that was written beside the weights.
        weights: the weights.
        repo_id: where they go.
        run: the run.
        notes: gains a sentence where the run's evaluation is left out.
    """
    from huggingface_hub import ModelCard

    contract = read_contract(run.dataset)
    try:
        card = ModelCard(text)
    except ValueError as error:
        raise MaskLoomError(
            f"{weights.folder / 'README.md'}: its metadata cannot be read ({error}); run {weights.stage.split('/')[0]} again"
        ) from None
    metadata = {
        **licence_metadata(contract.description),
        "base_model": weights.base_model,
        "library_name": LIBRARY,
        "tags": list(dict.fromkeys([*weights.tags, *card.data.get("tags", [])])),
    }
    evaluations, own_sets = current_evaluations(run, weights, contract, notes)
    if results := eval_results(evaluations, own_sets, contract.description.dataset, _task(run, weights)):
        metadata |= {"model_name": repo_id.split("/")[-1], "eval_results": results}
    for key, value in metadata.items():
        card.data[key] = value
    sections = [
        card.text.strip(),
        _usage(weights, repo_id),
        *([_evaluation_section(evaluations)] if evaluations else []),
        _provenance_section(weights),
    ]
    card.text = "\n" + "\n\n".join(sections) + "\n"
    return str(card)


def current_evaluations(
    run: Run, weights: Weights, real: Contract, notes: list[str]
) -> tuple[list[Evaluation], list[str]]:
    """Return what was measured on images of these very weights, and the names of the synthetic sets that they made.

    Figures of other images, or of images older than the weights, are left out.
    """
    sets = {p.parent.name: read_contract(p.parent) for p in sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))}
    measured = [one for one in read_evaluations(run.evaluation) if not one.skipped]
    digests = {"real": real.digest, **{name: contract.digest for name, contract in sets.items()}}
    fitting = [one for one in measured if one.is_about(digests)]
    own = [name for name, contract in sets.items() if training_of(run, name, contract) == weights.stage]
    newest = max(path.stat().st_mtime for path in weights.files())
    made = min(((run.synthetic / name / CONTRACT_FILE).stat().st_mtime for name in own), default=0.0)
    if measured and (not fitting or made < newest):
        notes.append(
            "the evaluation is of other images than these weights' and is left out of the card; run generate and evaluate again"
        )
        return [], []
    return fitting, own


def _task(run: Run, weights: Weights) -> str:
    """Return the Hub's name for what they do: with a backbone they read words, an architecture draws from masks or from noise."""
    if weights.name in LOADING:
        return TEXT_TO_IMAGE
    folder = run.synthetic / weights.name
    about = read_contract(folder).description.preprocessing if (folder / CONTRACT_FILE).is_file() else {}
    how = about.get("generation") or {}
    return (
        "image-to-image"
        if how.get("uses_mask") and how.get("mask_source") != "drawn"
        else "unconditional-image-generation"
    )


def eval_results(
    evaluations: Iterable[Evaluation], own_sets: Sequence[str], dataset: str, task: str
) -> list[EvalResult]:
    """Return the figures of the shown tables' rows that name one of the sets, for the Hub's `model-index`."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=_slug(column),
            metric_name=f"{column} ({'; '.join(words)})",
            metric_value=value,
            metric_args=bounds,
        )
        for evaluation in evaluations
        for table in evaluation.tables[:SHOWN_TABLES]
        for row in table.rows
        if (words := [cell for cell in row if isinstance(cell, str)]) and _names_one(words, own_sets)
        for column, value, bounds in _figures(table, row)
    ]


def _names_one(words: Sequence[str], names: Sequence[str]) -> bool:
    return any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", word) for name in names for word in words)


def _figures(table: Table, row: Sequence[Cell]) -> Iterable[tuple[str, float, dict[str, float] | None]]:
    """Yield column, value and interval of a row's measured figures; counts are none."""
    for column, cell in zip(table.columns, row, strict=True):
        if SPREAD in column:
            continue
        if isinstance(cell, Interval) and cell.value is not None:
            bounds = None if cell.low is None or cell.high is None else {"low": cell.low, "high": cell.high}
            yield column, cell.value, bounds
        elif isinstance(cell, float):
            yield column, cell, None


def _usage(weights: Weights, repo_id: str) -> str:
    if weights.name in LOADING:
        name, line = LOADING[weights.name]
        base = f'"{weights.base_model}"' if weights.base_model else "BACKBONE"
        lines = [f"from diffusers import {name}", "", line.format(repo_id=repo_id, base=base)]
    else:
        found = {path.parent.name: _class_name(path) for path in sorted(weights.folder.glob("*/config.json"))}
        lines = [
            *(f"from {_module(name)} import {name}" for name in dict.fromkeys(found.values())),
            "",
            *(f'{part} = {name}.from_pretrained("{repo_id}", subfolder="{part}")' for part, name in found.items()),
        ]
    return "\n".join(["## Use", "", "```python", *lines, "```"])


class NetworkConfig(BaseModel):
    """What of a network's `config.json` is shown."""

    class_name: str = Field(alias="_class_name", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")


def _class_name(config: Path) -> str:
    return read_model(config, NetworkConfig, "run baselines again with --force").class_name


def _module(class_name: str) -> str:
    """Return where a network's class comes from: this project's models, else diffusers."""
    spec = find_spec(MODELS)
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else []:
        for path in sorted(Path(folder).glob("*.py")):
            if re.search(rf"^class {class_name}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
                return f"{MODELS}.{path.stem}"
    return LIBRARY


def _evaluation_section(evaluations: Sequence[Evaluation]) -> str:
    """Return each question's verdict with its main table."""
    lines = ["## Evaluation"]
    for one in evaluations:
        lines += ["", f"### {one.question}", "", one.verdict, *(f"\nWarning: {warning}" for warning in one.warnings)]
        for table in one.tables[:SHOWN_TABLES]:
            lines += ["", *markdown_table(table.columns, [[cell_text(cell) for cell in row] for row in table.rows])]
            lines += ["", table.note] if table.note else []
    return "\n".join(lines)


def _provenance_section(weights: Weights) -> str:
    record = weights.record
    digests = [
        [f"SHA-256 of `{path.relative_to(weights.folder).as_posix()}`", f"`{file_digest(path)}`"]
        for path in weights.files()
    ]
    rows = [
        ["code", f"MaskLoom {record['maskloom']}, commit `{record['git_sha']}`"],
        ["configuration", f"`{record['config_hash']}`"],
        *([name, f"`{value}`"] for name, value in record["inputs"].items()),
        ["packages", ", ".join(f"{name} {version}" for name, version in record["packages"].items())],
        ["training", f"{duration_text(record['wall_seconds'])}, peak memory {record['peak_memory_mb']:.0f} MB"],
        *digests,
    ]
    return "\n".join(["## Provenance", "", *markdown_table(["", ""], rows)])


def _slug(text: str) -> str:
    """Return text in small ASCII letters, digits, dots and hyphens, as the Hub's identifiers are."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9.]+", "-", plain.lower()).strip("-.")
