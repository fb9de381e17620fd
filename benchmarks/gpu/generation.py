"""Our generator against a plain loop over diffusers' pipeline: same weights, steps, guidance and batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from benchmarks._plain_pipeline import plain_pipeline
from benchmarks.gpu.experiment import experiment, forget_memory, peak_mib, synchronise
from benchmarks.gpu.setup import Setup
from maskloom.generate.conditions import ConditionReader
from maskloom.generate.generate import open_generator
from maskloom.generate.generator import Condition
from maskloom.generate.planning import plan_rows, read_parents
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.precision import DTYPES

Batch = Sequence[Condition]


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Return images per second and peak memory; reading conditions and writing images are left out."""
    config = experiment(setup, setup.run)
    batches = condition_batches(config)
    forget_memory(setup.device)
    generate = (our_generator if item == "generate" else plain_loop)(setup, config)
    generate(batches[0])  # chooses kernels
    synchronise(setup.device)
    start = time.perf_counter()
    for batch in batches[1:]:
        generate(batch)
    synchronise(setup.device)
    images = sum(len(batch) for batch in batches[1:])
    return {
        "images_per_second": images / (time.perf_counter() - start),
        "images": images,
        "peak_mib": peak_mib(setup.device),
    }


def condition_batches(config: ExperimentConfig) -> list[Batch]:
    """Return the conditions of all images in batches."""
    dataset = MaskPromptDataset.open(config.run_folder / "dataset")
    parents, size = read_parents(dataset), config.generate.batch_size
    reader = ConditionReader(dataset, config, parents)
    rows = plan_rows(parents, dataset.description.labels, config.generate, config.seed)
    conditions = [reader.resolve(row).condition for row in rows]
    return [conditions[start : start + size] for start in range(0, len(conditions), size)]


def our_generator(setup: Setup, config: ExperimentConfig) -> Callable[[Batch], Any]:
    """Return the generator `controlnet`, loaded."""
    generator = open_generator(config, Run(setup.run), "controlnet")
    generator.load(torch.device(setup.device), MaskPromptDataset.open(setup.run / "dataset").description)
    return generator.images


def plain_loop(setup: Setup, config: ExperimentConfig) -> Callable[[Batch], Any]:
    """Return what one would write by hand with diffusers."""
    from diffusers import UniPCMultistepScheduler

    how = config.generate
    controlnet, dtype = setup.run / "generator" / "controlnet", DTYPES[how.mixed_precision]
    pipe = plain_pipeline(str(setup.backbone), controlnet, dtype, setup.device, local_files_only=True)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)

    def images(batch: Batch) -> Any:
        return pipe(
            prompt=[condition.text for condition in batch],
            image=[Image.fromarray(condition.conditioning_image) for condition in batch],
            num_inference_steps=how.num_inference_steps,
            guidance_scale=how.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(condition.seed) for condition in batch],
        ).images

    return images
