"""Render the page's template."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.files.formatting import counts_text, duration_text, number_text
from maskloom.pipeline.files.private_paths import without_places
from maskloom.pipeline.report.curves import line_chart, training_curves
from maskloom.pipeline.report.gallery import NEAREST_SIDE, image_grids
from maskloom.pipeline.report.pictures import embedded_file, embedded_image, svg_uri
from maskloom.pipeline.report.sources import Sources, Training, class_counts, rejection_counts
from maskloom.pipeline.results import Curve, Interval, Table, cell_text, read_evaluations

TEMPLATE = "template.html.j2"
PICTURE_SCALE = 4  # a picture of several panels may be this many times as wide as a grid's image
VALIDATION_PICTURES = 4
# What the page calls a conditioning image, by `data.conditioning`; any other is a mask.
CONDITIONS = {"edges": "edge map", "foreground": "foreground map", "image": "paired image"}


def page_renderer(config: ExperimentConfig, sources: Sources) -> Callable[[int], str]:
    """Return a function that renders the page for a longest image side in pixels; the sources are read only once."""
    template = _environment().get_template(TEMPLATE)
    context = _context(config, sources)

    def render(side: int) -> str:
        return template.render(
            **context,
            embed=partial(embedded_image, side=side),
            picture=partial(embedded_file, side=side * PICTURE_SCALE),
        )

    return render


def evenly_chosen(items: Sequence[Path], count: int) -> list[Path]:
    """Return at most `count` items, evenly spaced, including the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def numeric_columns(table: Table) -> set[int]:
    """Return the indices of the columns that contain only numbers and gaps; they are right-aligned."""
    numbers = {
        index for row in table.rows for index, cell in enumerate(row) if isinstance(cell, int | float | Interval)
    }
    words = {index for row in table.rows for index, cell in enumerate(row) if isinstance(cell, str | bool)}
    return numbers - words


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        cell=cell_text, number=number_text, duration=duration_text, pretty=_pretty_json, counts=counts_text
    )
    environment.filters["numeric_columns"] = numeric_columns
    environment.globals["chart"] = _chart
    return environment


def _chart(curve: Curve) -> str:
    return svg_uri(line_chart(curve))


def _pretty_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)


def _context(config: ExperimentConfig, sources: Sources) -> dict[str, Any]:
    """Return the variables of the template."""
    about = sources.real.description if sources.real else None
    condition = CONDITIONS.get(about.conditioning, "mask") if about else "mask"
    return {
        "title": config.report.title or f"MaskLoom: {config.experiment}",
        "config": config,
        "missing": sources.missing(),
        "evaluations": read_evaluations(sources.run.evaluation),
        "evaluation_folder": sources.run.evaluation,
        "grids": image_grids(sources.real, sources.synthetic, config.report.images_per_class) if sources.real else {},
        "generators": list(sources.synthetic),
        "maskless": [name for name, dataset in sources.synthetic.items() if not _saw_masks(dataset)],
        "nearest_side": NEAREST_SIDE,
        "about": about,
        "condition": condition,
        "drawn": condition != "paired image",  # in few, exact colours
        "trainings": {stage: _training_summary(stage, one) for stage, one in sources.trainings.items()},
        "datasets": _dataset_summaries(sources),
        "records": sources.records,
        "config_text": yaml.safe_dump(
            without_places(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True
        ),
    }


def _training_summary(stage: str, training: Training) -> dict[str, Any]:
    """Return a training's curves and sample grids: several over time for `train`, only the last for other architectures."""
    curves, unreadable = training_curves(training.metrics) if training.metrics else ([], 0)
    pictures = evenly_chosen(training.pictures, VALIDATION_PICTURES) if stage == "train" else training.pictures[-1:]
    return {"curves": curves, "unreadable_lines": unreadable, "pictures": pictures}


def _saw_masks(dataset: MaskPromptDataset) -> bool:
    """Return whether a synthetic dataset's generator was conditioned on masks; true if the dataset does not state it."""
    return bool(dataset.description.preprocessing.get("generation", {}).get("uses_mask", True))


def _dataset_summaries(sources: Sources) -> list[dict[str, Any]]:
    """Return counts and rejections of the real dataset, then of each synthetic one."""
    named = {"real": sources.real} if sources.real else {}
    named |= {f"synthetic: {name}": dataset for name, dataset in sources.synthetic.items()}
    return [_dataset_summary(name, dataset) for name, dataset in named.items()]


def _dataset_summary(name: str, dataset: MaskPromptDataset) -> dict[str, Any]:
    counts = class_counts(dataset)
    reasons, rarer = rejection_counts(dataset.folder)
    return {
        "name": name,
        "contract": dataset.contract,
        "counts": counts,
        "classes": sorted({label for row in counts.values() for label in row}, key=_order_of(dataset)),
        "reasons": reasons,
        "rarer": rarer,
    }


def _order_of(dataset: MaskPromptDataset) -> Callable[[str], int]:
    """Return a sort key: the contract's order of labels, rows without a class last."""
    labels = dataset.description.labels
    return lambda name: labels.index(name) if name in labels else len(labels)
