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
from maskloom.pipeline.dataset.groups import group_sentence
from maskloom.pipeline.files.formatting import counts_text, duration_text, number_text
from maskloom.pipeline.files.private_paths import without_places
from maskloom.pipeline.filter_summary import FilterSummary
from maskloom.pipeline.report.curves import curve_description, line_chart, training_curves
from maskloom.pipeline.report.forest import forest_description, forest_plot
from maskloom.pipeline.report.gallery import NEAREST_SIDE, image_grids
from maskloom.pipeline.report.pictures import embedded_file, embedded_image, svg_uri
from maskloom.pipeline.report.scorecard import scorecard
from maskloom.pipeline.report.sources import Sources, Training, class_counts, rejection_counts
from maskloom.pipeline.results import Interval, Table, cell_text
from maskloom.pipeline.runs.answers import current_answers
from maskloom.pipeline.runs.trainings import newer_training

TEMPLATES = Path(__file__).with_name("templates")
PAGE = "page.html.j2"
PICTURE_SCALE = 4  # a figure of several panels may be this many times as wide as a single image
VALIDATION_PICTURES = 4
MOST_ROWS = 40  # a longer table scrolls in a box of its own
MOST_COLUMNS = 8  # a wider table is shown in parts, one below the other
# Names of conditioning images on the page, by `data.conditioning`; any other is a mask.
CONDITIONS = {"edges": "edge map", "foreground": "foreground map", "image": "paired image"}


def page_renderer(config: ExperimentConfig, sources: Sources, notices: Sequence[str] = ()) -> Callable[[int], str]:
    """Return a function that renders the page for a longest image side in pixels.

    The sources are read only once, here.

    Args:
        config: the configuration of the run.
        sources: the parts of the run.
        notices: sentences to show beside the verdict.
    """
    template = template_environment().get_template(PAGE)
    context = template_variables(config, sources, notices)

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
    """Return the indices of the columns with only numbers and gaps, which are right-aligned."""
    numbers = {
        index for row in table.rows for index, cell in enumerate(row) if isinstance(cell, int | float | Interval)
    }
    words = {index for row in table.rows for index, cell in enumerate(row) if isinstance(cell, str | bool)}
    return numbers - words


def page_wide(table: Table) -> list[Table]:
    """Return a table in parts of at most `MOST_COLUMNS` columns, each with the leading columns of words."""
    count = len(table.columns)
    numeric = numeric_columns(table)
    leading = next((index for index in range(count) if index in numeric), 1) or 1
    room = MOST_COLUMNS - leading
    if count <= MOST_COLUMNS or room < 1:
        return [table]
    parts = -(-(count - leading) // room)
    size = -(-(count - leading) // parts)
    chosen = [[*range(leading), *range(first, min(first + size, count))] for first in range(leading, count, size)]
    return [
        table.model_copy(
            update={
                "columns": [table.columns[index] for index in indices],
                "rows": [[row[index] for index in indices] for row in table.rows],
            }
        )
        for indices in chosen
    ]


def template_environment() -> Environment:
    """Return the environment of the templates: autoescaped, with the filters and charts that they use."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        cell=cell_text,
        number=number_text,
        duration=duration_text,
        counts=counts_text,
        numeric_columns=numeric_columns,
        page_wide=page_wide,
        pretty=partial(json.dumps, indent=2, sort_keys=True, ensure_ascii=False, default=str),
    )
    environment.globals["most_rows"] = MOST_ROWS
    environment.globals["chart"] = lambda curve: svg_uri(line_chart(curve))
    environment.globals["forest_chart"] = lambda forest: svg_uri(forest_plot(forest))
    environment.filters["described"] = forest_description
    environment.filters["chart_described"] = curve_description
    return environment


def template_variables(config: ExperimentConfig, sources: Sources, notices: Sequence[str] = ()) -> dict[str, Any]:
    """Return the variables of the template."""
    about = sources.real.description if sources.real else None
    condition = CONDITIONS.get(about.conditioning, "mask") if about else "mask"
    generation = {name: one.description.preprocessing.get("generation", {}) for name, one in sources.synthetic.items()}
    datasets = {"real": sources.real} if sources.real else {}
    datasets |= {f"synthetic: {name}": dataset for name, dataset in sources.synthetic.items()}
    digests = {name: dataset.digest for name, dataset in sources.synthetic.items()}
    digests |= {"real": sources.real.digest} if sources.real else {}
    evaluations, remarks = current_answers(sources.run, digests)
    trains = config.train is not None or bool(config.baselines)
    grids = image_grids(sources.real, sources.synthetic, config.report.images_per_class) if sources.real else {}
    shown = [one for rows in grids.values() for row in rows for one in row.shown.values() if one]
    return {
        "title": config.report.title or f"MaskLoom: {config.experiment}",
        "config": config,
        "seeds": seeds_in_words(config, sources),
        "trains": trains,
        "missing": [*unjudged_parts(sources), *sources.missing(trains), *stale_parts(sources), *remarks, *notices],
        "evaluations": evaluations,
        "scorecard": scorecard(sources, evaluations),
        "evaluation_folder": sources.run.evaluation,
        "grids": grids,
        "made_elsewhere": any(one.made_elsewhere for one in shown),
        "generators": list(sources.synthetic),
        "maskless": [name for name, settings in generation.items() if not settings.get("uses_mask", True)],
        "nearest_side": NEAREST_SIDE,
        "about": about,
        "groups": group_sentence(about.dataset) if about else "",
        "condition": condition,
        "exact_colours": condition != "paired image",
        "trainings": {stage: _training_summary(stage, one) for stage, one in sources.trainings.items()},
        "datasets": [_dataset_summary(name, dataset) for name, dataset in datasets.items()],
        "records": sources.records,
        "config_text": yaml.safe_dump(
            without_places(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True
        ),
    }


def seeds_in_words(config: ExperimentConfig, sources: Sources) -> str:
    """Return the seed of the experiment, or that of each stage where they differ."""
    seeds = {stage: record["seed"] for stage, record in sources.records.items() if record.get("seed") is not None}
    if len(set(seeds.values())) < 2:
        return f"seed {next(iter(seeds.values()), config.seed)}"
    return f"seeds: {', '.join(f'{stage} {seed}' for stage, seed in seeds.items())}"


def unjudged_parts(sources: Sources) -> list[str]:
    """Return sentences on sets made elsewhere: files that no question covers, and sets that were stopped before."""
    results = sources.records.get("generate", {}).get("results", {})
    left_out = {
        name: found["left_out"] for name, found in results.items() if isinstance(found, dict) and "left_out" in found
    }
    return [
        f"synthetic/{name}: {count} of {results[name]['images'] + count} files could not be used and were not judged."
        for name, count in left_out.items()
        if count
    ] + [stop for name in left_out for stop in results[name].get("stops", [])]


def stale_parts(sources: Sources) -> list[str]:
    """Return a sentence for each synthetic dataset whose generator has been trained again since."""
    trained = {name: newer_training(sources.run, dataset) for name, dataset in sources.synthetic.items()}
    return [
        f"synthetic/{name}: made with other weights than {stage} has trained since; run maskloom generate."
        for name, stage in trained.items()
        if stage
    ]


def _training_summary(stage: str, training: Training) -> dict[str, Any]:
    """Return a training's curves and sample grids: several over time for `train`, else the last."""
    curves, unreadable = training_curves(training.metrics) if training.metrics else ([], 0)
    pictures = evenly_chosen(training.pictures, VALIDATION_PICTURES) if stage == "train" else training.pictures[-1:]
    return {"curves": curves, "unreadable_lines": unreadable, "pictures": pictures}


def _dataset_summary(name: str, dataset: MaskPromptDataset) -> dict[str, Any]:
    """Return a dataset's counts by split and class, in the contract's order, its rejections and notes."""
    order = {label: place for place, label in enumerate(dataset.description.labels)}
    counts = class_counts(dataset)
    classes = {label for row in counts.values() for label in row}
    reasons, rarer = rejection_counts(dataset.folder)
    return {
        "name": name,
        "contract": dataset.contract,
        "counts": counts,
        "classes": sorted(classes, key=lambda label: order.get(label, len(order))),
        "filtered": FilterSummary.of(dataset),
        "reasons": reasons,
        "notes": dataset.description.preprocessing.get("generation", {}).get("notes", []),
        "rarer": rarer,
    }
