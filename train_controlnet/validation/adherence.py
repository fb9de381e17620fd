"""Mask adherence: do sampled images show the masks that they were conditioned on?

A small U-Net, trained on real images before the first step, segments each sampled image. A prompt
can give its mask away (class, place, size), so each mask is sampled with the prompt of another
image of the same class. An image that follows only its prompt is no closer to the requested mask
than to the mask of the prompt: the latter is the chance level.

This watches a training. `evaluate.metrics.faithfulness` measures the same of finished images, with
models that have not seen the masks they judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from maskloom.models.segmenter import SegmenterOptions, build_segmenter, dice_scores, predicted_masks, train_segmenter
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import rgb_array
from maskloom.pipeline.dataset.masks import resize_mask
from maskloom.pipeline.errors import MaskLoomError, report_write_errors
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import keyed_generator
from maskloom.train_controlnet.data.augmentation import Picture
from maskloom.train_controlnet.data.rows import TrainingRows
from maskloom.train_controlnet.validation.samples import SampleRequest
from maskloom.train_controlnet.validation.verdict import LEAST_IMAGES, check_adherence, too_few_images

SEGMENTER_FILE = "adherence.safetensors"


@dataclass(frozen=True)
class Reading:
    """Dice of each sampled image, (N,), averaged over the foreground classes.

    Attributes:
        asked: against the requested mask.
        shuffled: against the mask that the prompt belongs to.
        real: of the real images against their own masks: the best that the segmentation model can
            read.
    """

    asked: NDArray[np.float64]
    shuffled: NDArray[np.float64]
    real: NDArray[np.float64]

    def figures(self) -> dict[str, float]:
        """Return the means under their names in the training log."""
        return {
            "adherence": float(self.asked.mean()),
            "adherence_shuffled": float(self.shuffled.mean()),
            "adherence_real": float(self.real.mean()),
        }


@dataclass(frozen=True)
class ImageFormat:
    """What the segmentation model sees.

    Attributes:
        size: (height, width) in pixels.
        channels: 1 (grey) or 3 (RGB).
    """

    size: tuple[int, int]
    channels: int

    def convert(self, image: Image.Image) -> Picture:
        """Return an image at this size and in these channels, (h, w, C) uint8."""
        height, width = self.size
        kind = "L" if self.channels == 1 else "RGB"
        resized = np.asarray(image.convert(kind).resize((width, height), Image.Resampling.BILINEAR))
        return resized.reshape(height, width, self.channels)

    def convert_rows(self, rows: datasets.Dataset, numbers: Sequence[int]) -> tuple[Picture, Picture]:
        """Return images (N, h, w, C) and masks (N, h, w) of the numbered rows that have a mask.

        Raises:
            MaskLoomError: none has one.
        """
        chosen = (row for row in rows.select_columns(["image", "mask"]).select(numbers) if row["mask"] is not None)
        pairs = [(self.convert(row["image"]), resize_mask(np.asarray(row["mask"]), self.size).mask) for row in chosen]
        if not pairs:
            raise MaskLoomError("train.adherence: no train image has a mask to learn from; set train.adherence=null")
        images, masks = zip(*pairs, strict=True)
        return np.stack(images), np.stack(masks)


class AdherenceMeter:
    """Scores images that were sampled for the same masks and prompts at every validation.

    Attributes:
        requests: the samples to draw, each a mask with the prompt of another image.
        masks: (N, h, w) uint8, the requested masks at the size that the segmentation model sees.
        real: (N,) Dice of the real images of these masks.
    """

    def __init__(
        self,
        segmenter: nn.Module,
        seen: ImageFormat,
        requests: Sequence[SampleRequest],
        images: Picture,
        masks: Picture,
        classes: int,
        device: str,
    ) -> None:
        """Store the segmentation model and the requests, and score the real images.

        Args:
            segmenter: the trained segmentation model, on the device.
            seen: size and channels of its images.
            requests: the samples to draw.
            images: (N, h, w, C) uint8, the real images of the requested masks.
            masks: (N, h, w) uint8 class indices.
            classes: number of classes, background included.
            device: where the segmentation model runs.
        """
        self.segmenter, self.seen, self.device = segmenter, seen, device
        self.requests, self.masks, self.classes = requests, masks, classes
        self.real = self._dice(images, masks)

    def reading(self, images: Sequence[Picture]) -> Reading:
        """Return the scores of the images, (H, W, 3) uint8, that were sampled for `requests`."""
        converted = np.stack([self.seen.convert(Image.fromarray(image)) for image in images])
        of_prompts = np.roll(self.masks, 1, axis=0)
        return Reading(self._dice(converted, self.masks), self._dice(converted, of_prompts), self.real)

    def _dice(self, images: Picture, masks: Picture) -> NDArray[np.float64]:
        """Return Dice of the segmented images, (N,), averaged over the foreground classes."""
        predictions = predicted_masks(self.segmenter, images, self.device)
        return dice_scores(predictions, masks, self.classes).mean(axis=1)


def prepare_adherence(
    config: ExperimentConfig,
    run: Run,
    dataset: MaskPromptDataset,
    rows: Mapping[str, TrainingRows],
    device: torch.device,
) -> AdherenceMeter:
    """Choose masks and prompts, and train the segmentation model or load that of an earlier run.

    Args:
        config: the experiment, with `train.adherence` set.
        run: its `generator` folder keeps the segmentation model.
        dataset: the real dataset.
        rows: the training's rows by split.
        device: where the segmentation model runs.

    Raises:
        MaskLoomError: see `check_adherence`; or too few validation images have a mask with a
            foreground, or no train image has a mask.
    """
    check_adherence(config.fine_tuning, dataset)
    options, about = config.fine_tuning.adherence, dataset.description
    assert options is not None
    held_out = rows["validation"].views.rows if "validation" in rows else None
    asked = [] if held_out is None else adherence_rows(held_out, options.num_images, config.seed)
    if held_out is None or len(asked) < LEAST_IMAGES:
        raise MaskLoomError(too_few_images(len(asked)))
    prompts = [held_out[i]["text"] for i in np.roll(asked, 1).tolist()]
    conditioning = [rgb_array(held_out[i]["conditioning_image"]) for i in asked]
    requests = [SampleRequest(*request) for request in zip(conditioning, prompts, strict=True)]
    seen, classes = ImageFormat(options.image_size, about.channels), len(about.mask_classes)
    images, masks = seen.convert_rows(held_out, asked)
    file = run.generator / SEGMENTER_FILE
    segmenter = adherence_segmenter(config, dataset, rows["train"].views.rows, seen, file, device)
    meter = AdherenceMeter(segmenter, seen, requests, images, masks, classes, str(device))
    say(f"mask adherence: the masks of real validation images are read at Dice {meter.real.mean():.2f}")
    return meter


def adherence_rows(rows: datasets.Dataset, count: int, seed: int) -> list[int]:
    """Return numbers of rows whose mask has a foreground: drawn at random, then sorted by class.

    The row before a row, whose prompt it gets, is therefore of its class, except for the first row
    of each class.
    """
    masks, labels = rows.select_columns(["mask"]), rows.select_columns(["label"])
    order = torch.randperm(len(rows), generator=keyed_generator(seed, "adherence rows")).tolist()

    def with_foreground() -> Iterator[int]:
        for number in order:
            mask = masks[number]["mask"]
            if mask is not None and np.asarray(mask).any():
                yield number

    drawn = islice(with_foreground(), count)
    return sorted(drawn, key=lambda i: -1 if labels[i]["label"] is None else labels[i]["label"])


def adherence_segmenter(
    config: ExperimentConfig,
    dataset: MaskPromptDataset,
    rows: datasets.Dataset,
    seen: ImageFormat,
    file: Path,
    device: torch.device,
) -> nn.Module:
    """Return the U-Net from its file if it was trained alike, otherwise train and save it.

    Of several widths, depths and learning rates, these gave the best Dice on the demo for their
    time.

    Args:
        config: the experiment, with `train.adherence` set.
        dataset: the real dataset.
        rows: the rows of its train split to learn from.
        seen: size and channels of the images.
        file: where the weights are kept.
        device: where it is trained.

    Raises:
        MaskLoomError: no train image has a mask, or the file cannot be written.
    """
    settings, classes = config.fine_tuning.adherence, len(dataset.description.mask_classes)
    assert settings is not None
    options = SegmenterOptions(
        image_size=settings.image_size,
        channels=(16, 32, 64, 128),
        residual_units=0,
        steps=settings.steps,
        batch_size=8,
        learning_rate=5e-3,
    )
    key = value_digest([dataset.digest, len(rows), config.seed, options.model_dump(mode="json")])
    owned = OwnedFolder(file.parent)
    if owned.problem(file.name) is None:
        with safe_open(file, framework="pt") as saved:
            trained_alike = (saved.metadata() or {}).get("key") == key
        if trained_alike:
            segmenter = build_segmenter(options, seen.channels, classes, config.seed)
            segmenter.load_state_dict(load_file(file))
            return segmenter.to(device).eval()
    most = min(options.steps * options.batch_size, len(rows))  # training sees no more
    images, masks = seen.convert_rows(rows, np.linspace(0, len(rows) - 1, most).astype(int).tolist())
    segmenter, _ = train_segmenter(images, masks, classes, options, config.seed, str(device))
    with report_write_errors(file), owned.writing(file.name) as temporary:
        save_file({name: value.cpu() for name, value in segmenter.state_dict().items()}, temporary, {"key": key})
    return segmenter
