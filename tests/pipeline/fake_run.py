"""A run folder as the stages leave it: real datasets written by the contract's own writer, records
and evaluations.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from scipy.ndimage import gaussian_filter

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.contract import Contract, Description, Parent
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.dataset.prompts import mask_attributes, render_prompt
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards
from maskloom.pipeline.files.atomic import json_text
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.run import Run
from tests.records import write_record

SIDE = 64
LABELS = ("round", "oval <b>wide</b>")
ROWS = {"train": 8, "validation": 3, "test": 3}


def description(origin: str = "real", **changes: Any) -> Description:
    """Return the description of a dataset of bright ellipses."""
    values: dict[str, Any] = {
        "dataset": "ellipses",
        "origin": origin,
        "modality": "test ultrasound",
        "channels": 1,
        "image_size": (SIDE, SIDE),
        "mask_classes": ("background", "lesion"),
        "palette": ((0, 0, 0), (255, 80, 80)),
        "labels": LABELS,
        "prompt_templates": ("{modality}, {size} {shape} lesion, {place}",),
        "conditioning": "mask",
        "preprocessing": {},
        "licence": "CC0-1.0",
        "citation": "none",
        "homepage": "https://example.org/",
    }
    return Description(**{**values, **changes})


def sample(sample_id: str, number: int, about: Description, **changes: Any) -> Sample:
    """Return an ellipse in speckle; the number fixes its place and its class."""
    rng = np.random.default_rng(number)
    height, width = about.image_size
    rows, columns = np.indices((height, width))
    centre, axes = rng.uniform(0.35, 0.65, 2) * (height, width), (width / 7, width / (7 if number % 2 == 0 else 4))
    inside = ((rows - centre[0]) / axes[0]) ** 2 + ((columns - centre[1]) / axes[1]) ** 2 <= 1
    mask = inside.astype(np.uint8)
    speckle = gaussian_filter(rng.rayleigh(60, (height, width)), 0.8)
    image = np.clip(speckle + 90 * gaussian_filter(inside.astype(float), 1.5), 0, 255).astype(np.uint8)
    image = image if about.channels == 1 else np.repeat(image[..., None], 3, axis=2)
    values = {"modality": about.modality, **mask_attributes(mask, about.mask_classes)}
    fields: dict[str, Any] = {
        "image": image,
        "mask": mask,
        "conditioning_image": conditioning_image(mask, image, about.conditioning, about.palette, paired=255 - image),
        "text": render_prompt(about.prompt_templates, sample_id, values),
        "label": number % 2 if about.labels else None,
        "sample_id": sample_id,
        "group_id": f"group-{sample_id}",
        "source": about.dataset,
        "origin": about.origin,
        "attributes": values,
    }
    return Sample(**{**fields, **changes})


def write_dataset(
    folder: Path,
    about: Description,
    rows: dict[str, list[Sample]],
    rejected: Sequence[dict[str, str]] = (),
    parent: Parent | None = None,
) -> Contract:
    """Write samples by split."""
    shards = plan_shards({split: len(samples) for split, samples in rows.items()}, rows_per_shard=5)
    writer = DatasetWriter(folder, about, shards, key="fake")
    writer.prepare_folder()
    for shard in shards:
        writer.write_shard(shard, rows[shard.split][shard.start : shard.stop])
    return writer.finish("card\n", rejected, config_hash="0" * 64, parent=parent)


def write_real(run: Run, **changes: Any) -> Contract:
    """Write the run's real dataset."""
    about = description(**changes)
    rows = {
        split: [sample(f"{split}-{i}", 100 * len(split) + i, about) for i in range(count)]
        for split, count in ROWS.items()
    }
    rejected = [{"path": f"raw/{i}.png", "reason": "mask is <empty>"} for i in range(3)]
    return write_dataset(run.dataset, about, rows, rejected)


def write_synthetic(
    run: Run,
    name: str,
    real: Contract,
    parents: Sequence[int] = range(ROWS["train"]),
    warped: bool = False,
    own_masks: bool = False,
    seeded: bool = True,
) -> Contract:
    """Write a synthetic dataset; `warped` gives each row another mask than its parent's,
    `own_masks` one that has no parent. Without a seed, it was made elsewhere.
    """
    about = real.description.model_copy(update={"origin": "synthetic"})
    rows = []
    for i in parents:
        number = 100 * len("train") + i + (1000 if warped or own_masks else 0)
        made = {"parent_id": None if own_masks else f"train-{i}", "generator": "f" * 64}
        made["seed"] = 7000 + i if seeded else None
        one = sample(f"{name}-{i}", number, about, **made)
        one.image = (
            np.ascontiguousarray(one.image[:, ::-1])
            if warped
            else np.clip(one.image.astype(int) + 9, 0, 255).astype(np.uint8)
        )
        rows.append(one)
    return write_dataset(
        run.synthetic / name, about, {"train": rows}, parent=Parent(path="../../dataset", digest=real.digest)
    )


def write_training_log(run: Run, steps: int = 400, stage: str = "train") -> None:
    """Write metrics.jsonl and pictures of a training, with a repeated step and a half-written last
    line.
    """
    folder = run.logs(stage)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(10, steps + 1, 10):
        values: dict[str, float] = {
            "step": step,
            "loss": 0.4 * math.exp(-step / 150) + 0.05,
            "lr": 5e-4 * (1 - step / steps),
        }
        if step % 100 == 0:
            values |= {"validation/loss": 0.1 + 20 / step, "validation/loss_bin_0": 0.3, "validation/loss_bin_1": 0.1}
        lines.append(json.dumps(values))
    lines.append('{"step": 410, "lo')
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "images").mkdir(exist_ok=True)
    for step in range(100, steps + 1, 100):
        pixels = np.random.default_rng(step).integers(0, 255, (SIDE, 4 * SIDE), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"step-{step:06d}.png")


def evaluation(metric: str = "help", **changes: Any) -> dict[str, Any]:
    """Return one evaluation as `evaluate` writes it."""
    values: dict[str, Any] = {
        "metric": metric,
        "version": "1",
        "question": f"Does it {metric}?",
        "verdict": f"{metric}: changed Dice by +0.012 [-0.004, 0.027]: no clear benefit.",
        "headline": False,
        "skipped": None,
        "tables": [
            {
                "title": "Dice by arm",
                "note": "Means over 3 seeds.",
                "columns": ["arm", "Dice", "difference", "n"],
                "rows": [
                    ["real", {"value": 0.70123, "low": 0.6811, "high": 0.7203}, None, 24],
                    [
                        "real + <synthetic>",
                        {"value": 0.71234, "low": 0.68999, "high": 0.7309},
                        {"value": 0.0111, "low": -0.004, "high": 0.0271},
                        24,
                    ],
                ],
            }
        ],
        "curves": [
            {
                "title": "Dice by share",
                "x_label": "share",
                "y_label": "Dice",
                "series": {"dice": [[0, 0.7], [0.5, 0.71], [1, 0.7]]},
            }
        ],
        "pictures": [],
        "warnings": ["Fewer than 2048 samples."],
        "limits": ["One test set, one scanner."],
        "values": {"dice": 0.7},
        "n": {"real train": 8, "test": 3},
        "seeds": [0, 1, 2],
        "inputs": {},
        "options": {"steps": 100},
    }
    return {**values, **changes}


def write_records(run: Run, stages: Sequence[str] = ("prepare", "train", "generate", "evaluate")) -> None:
    """Write a `stage.json` for each stage."""
    for stage in stages:
        write_record(
            run,
            stage,
            key="k" * 64,
            inputs={"dataset": "d" * 64},
            config_hash="c" * 64,
            maskloom="0.1.0",
            git_sha="0123456789abcdef-dirty",
            packages={"python": "3.11.9", "numpy": "2.0"},
            wall_seconds=83.2,
            peak_memory_mb=812.4,
            results={"rows": 14},
        )


def write_evaluation(run: Run, name: str, answer: dict[str, Any]) -> None:
    """Write an answer, as `evaluate` does."""
    OwnedFolder(run.evaluation).write_text(f"{name}.json", json_text(answer))


def write_config(folder: Path, **sections: Any) -> Path:
    """Write a configuration whose run lies beside it."""
    values = {
        "experiment": "fake",
        "run_dir": str(folder / "run"),
        "data": {"dataset": "phantom_bus", "image_size": SIDE},
        "train": {"pretrained_model_name_or_path": "none"},
        "report": {"images_per_class": 2},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def whole_run(folder: Path) -> tuple[Run, ExperimentConfig]:
    """Write a run in which every stage but the report has ended.

    Return it with its configuration.
    """
    config = load_experiment(write_config(folder), [])
    run = Run(config.run_folder)
    real = write_real(run)
    write_synthetic(run, "controlnet", real)
    write_synthetic(run, "text_only", real, parents=(0, 1), warped=True)
    write_training_log(run)
    write_records(run)
    with OwnedFolder(run.evaluation).writing("pictures/worst.png") as shot:
        shot.write_bytes(png_bytes(np.zeros((SIDE, 3 * SIDE), dtype=np.uint8)))
    picture = {"title": "Worst pairs", "caption": "synthetic | nearest", "path": "pictures/worst.png"}
    write_evaluation(run, "a_copies", evaluation("copy", pictures=[picture]))
    write_evaluation(run, "b_help", evaluation("help", headline=True))
    return run, config
