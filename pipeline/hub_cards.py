"""What a model repository says about itself on the Hub: the card that `train` wrote, completed with figures and provenance.

Metadata follow the Hub's specification (huggingface/hub-docs, modelcard.md).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.contract import CONTRACT_FILE, Contract, Description, read_contract
from pipeline.errors import MaskLoomError
from pipeline.files import file_digest
from pipeline.report.evaluation import Cell, Evaluation, Interval, Table, cell_text, read_evaluations
from pipeline.report.formatting import duration_text
from pipeline.runs import Run

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
TASK = "text-to-image"
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
    """Return the Hub id in a backbone's identity (`pipeline.files.model_digest`); None where it is a local folder's digest.

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


def completed_card(text: str, kind: str, repo_id: str, run: Run, record: dict[str, Any], notes: list[str]) -> str:
    """Return the README.md of a model repository.

    Args:
        text: the card that was written beside the weights.
        kind: the weights' folder, one of `LOADING`.
        repo_id: where it goes.
        run: the run.
        record: the training's `stage.json`.
        notes: gains a sentence where the run's evaluation is left out.
    """
    from huggingface_hub import ModelCard

    contract = read_contract(run.dataset)
    base_model = hub_base_model(record["inputs"].get("backbone", ""))
    try:
        card = ModelCard(text)
    except ValueError as error:
        raise MaskLoomError(
            f"{run.generator / kind / 'README.md'}: its metadata cannot be read ({error}); run train again"
        ) from None
    metadata = {
        **licence_metadata(contract.description),
        "base_model": base_model,
        "library_name": "diffusers",
        "tags": list(dict.fromkeys([*TAGS, kind, TRAINING_TAG, *card.data.get("tags", [])])),
    }
    evaluations, own_sets = current_evaluations(run, run.generator / kind, record, contract, notes)
    if results := eval_results(evaluations, own_sets, contract.description.dataset):
        metadata |= {"model_name": repo_id.split("/")[-1], "eval_results": results}
    for key, value in metadata.items():
        card.data[key] = value
    sections = [
        card.text.strip(),
        _usage(kind, repo_id, base_model),
        *([_evaluation_section(evaluations)] if evaluations else []),
        _provenance_section(record, run.generator / kind),
    ]
    card.text = "\n" + "\n\n".join(sections) + "\n"
    return str(card)


def current_evaluations(
    run: Run, weights: Path, record: dict[str, Any], real: Contract, notes: list[str]
) -> tuple[list[Evaluation], list[str]]:
    """Return what was measured on images of these very weights, and the names of the synthetic sets that they made.

    A set was made by what was trained if its weights are not the backbone's alone. Figures of other images, or of images
    older than the weights, are left out.
    """
    sets = {p.parent.name: read_contract(p.parent) for p in sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))}
    measured = [one for one in read_evaluations(run.evaluation) if not one.skipped]
    digests = {"real": real.digest, **{name: contract.digest for name, contract in sets.items()}}
    fitting = [
        one for one in measured if isinstance(one.inputs, dict) and one.inputs and one.inputs.items() <= digests.items()
    ]
    own = [name for name, contract in sets.items() if _made_by_training(contract, record)]
    newest = max(path.stat().st_mtime for path in weights.glob("*.safetensors"))
    made = min(((run.synthetic / name / CONTRACT_FILE).stat().st_mtime for name in own), default=0.0)
    if measured and (not fitting or made < newest):
        notes.append(
            "the evaluation is of other images than these weights' and is left out of the card; run generate and evaluate again"
        )
        return [], []
    return fitting, own


def _made_by_training(contract: Contract, record: dict[str, Any]) -> bool:
    backbone = record["inputs"].get("backbone")
    generation = contract.description.preprocessing.get("generation") or {}
    return generation.get("weights", backbone) != backbone


def eval_results(evaluations: Iterable[Evaluation], own_sets: Sequence[str], dataset: str) -> list[EvalResult]:
    """Return the figures of the shown tables' rows that name one of the sets, for the Hub's `model-index`."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=TASK,
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


def _usage(kind: str, repo_id: str, base_model: str | None) -> str:
    name, line = LOADING[kind]
    base = f'"{base_model}"' if base_model else "BACKBONE"
    return f"## Use\n\n```python\nfrom diffusers import {name}\n\n{line.format(repo_id=repo_id, base=base)}\n```"


def _evaluation_section(evaluations: Sequence[Evaluation]) -> str:
    """Return each question's verdict with its main table."""
    lines = ["## Evaluation"]
    for one in evaluations:
        lines += ["", f"### {one.question}", "", one.verdict, *(f"\nWarning: {warning}" for warning in one.warnings)]
        for table in one.tables[:SHOWN_TABLES]:
            lines += ["", *_markdown(table.columns, [[cell_text(cell) for cell in row] for row in table.rows])]
            lines += ["", table.note] if table.note else []
    return "\n".join(lines)


def _provenance_section(record: dict[str, Any], weights: Path) -> str:
    rows = [
        ["code", f"MaskLoom {record['maskloom']}, commit `{record['git_sha']}`"],
        ["configuration", f"`{record['config_hash']}`"],
        *([name, f"`{value}`"] for name, value in record["inputs"].items()),
        ["packages", ", ".join(f"{name} {version}" for name, version in record["packages"].items())],
        ["training", f"{duration_text(record['wall_seconds'])}, peak memory {record['peak_memory_mb']:.0f} MB"],
        *([f"SHA-256 of `{path.name}`", f"`{file_digest(path)}`"] for path in sorted(weights.glob("*.safetensors"))),
    ]
    return "\n".join(["## Provenance", "", *_markdown(["", ""], rows)])


def _slug(text: str) -> str:
    """Return text in small ASCII letters, digits, dots and hyphens, as the Hub's identifiers are."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9.]+", "-", plain.lower()).strip("-.")


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
