"""Mask adherence: do sampled images show the masks that they were asked to show?

A small U-Net, trained on real images before the first step, reads the mask off each sampled image. Words can give a mask away (its class, its
place, its size), so each mask is sampled with the words of another image of its class: an image that follows the words only is no
more like the mask asked for than like the words' own mask, and that is the chance level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from maskloom.pipeline.dataset.contract import Contract
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

READER_FILE = "adherence.safetensors"


@dataclass(frozen=True)
class Reading:
    """Dice of each sampled image, (N,), the mean of the foreground classes.

    Attributes:
        asked: against the mask that was asked for.
        shuffled: against the mask that the words belong to.
        real: of the real images against their own masks: what the reader can see at best.
    """

    asked: NDArray[np.float64]
    shuffled: NDArray[np.float64]
    real: NDArray[np.float64]

    def figures(self) -> dict[str, float]:
        """Return the means under the names of the training log."""
        return {
            "adherence": float(self.asked.mean()),
            "adherence_shuffled": float(self.shuffled.mean()),
            "adherence_real": float(self.real.mean()),
        }


class AdherenceMeter:
    """Asks for the same masks, with the same words and from the same noise, whenever it is asked."""

    def __init__(
        self,
        of: Mapping[str, TrainingRows],
        config: ExperimentConfig,
        run: Run,
        contract: Contract,
        device: torch.device,
    ) -> None:
        """Choose the masks, and train the reader or take up the one that an earlier run trained.

        Raises:
            MaskLoomError: see `check_adherence`; or too few validation images have a mask with a foreground.
        """
        check_adherence(config.fine_tuning, contract)
        assert config.fine_tuning.adherence is not None
        self.options, self.about, self.device = config.fine_tuning.adherence, contract.description, str(device)
        rows = of["validation"].views.rows if "validation" in of else None
        asked = [] if rows is None else _asked_rows(rows, self.options.num_images, config.seed)
        if rows is None or len(asked) < LEAST_IMAGES:
            raise MaskLoomError(too_few_images(len(asked)))
        words = [rows[i]["text"] for i in np.roll(asked, 1).tolist()]
        seen = [rgb_array(rows[i]["conditioning_image"]) for i in asked]
        self.requests = [SampleRequest(*request) for request in zip(seen, words, strict=True)]
        images, self.masks = self._pictures(rows, asked)
        self.reader = self._reader(of["train"].views.rows, run.generator / READER_FILE, contract.digest, config.seed)
        self.real = self._dice(images, self.masks)
        say(f"mask adherence: the masks of real validation images are read at Dice {self.real.mean():.2f}")

    def reading(self, images: Sequence[Picture]) -> Reading:
        """Return the scores of the images, (H, W, 3) uint8, that were sampled for `requests`."""
        small = np.stack([self._small(Image.fromarray(image)) for image in images])
        return Reading(self._dice(small, self.masks), self._dice(small, np.roll(self.masks, 1, axis=0)), self.real)

    def _dice(self, images: Picture, masks: Picture) -> NDArray[np.float64]:
        """Return the mean Dice of the foreground classes, (N,), between what the reader sees and the masks."""
        predictions = predicted_masks(self.reader, images, self.device)
        return dice_scores(predictions, masks, len(self.about.mask_classes)).mean(axis=1)

    def _reader(self, rows: datasets.Dataset, path: Path, dataset: str, seed: int) -> nn.Module:
        """Return the U-Net from its file, if it was trained on the same images in the same way, or else trained and kept.

        Of a few widths, depths and rates this one read the demo's masks best for its time.
        """
        options = SegmenterOptions(
            image_size=self.options.image_size,
            channels=(16, 32, 64, 128),
            residual_units=0,
            steps=self.options.steps,
            batch_size=8,
            learning_rate=5e-3,
        )
        key = value_digest([dataset, len(rows), seed, options.model_dump(mode="json")])
        channels, classes = self.about.channels, len(self.about.mask_classes)
        owned = OwnedFolder(path.parent)
        if owned.problem(path.name) is None and _key(path) == key:
            reader = build_segmenter(options, channels, classes, seed)
            reader.load_state_dict(load_file(path))
            return reader.to(self.device).eval()
        most = options.steps * options.batch_size  # no more are ever seen
        numbers = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int).tolist()
        images, masks = self._pictures(rows, numbers)
        reader = train_segmenter(images, masks, classes, options, seed, self.device)
        with report_write_errors(path), owned.writing(path.name) as temporary:
            save_file({name: value.cpu() for name, value in reader.state_dict().items()}, temporary, {"key": key})
        return reader

    def _pictures(self, rows: datasets.Dataset, numbers: Sequence[int]) -> tuple[Picture, Picture]:
        """Return images (N, h, w, C) and masks (N, h, w) of the rows that have a mask, at the reader's size."""
        height, width = self.options.image_size
        chosen = (row for row in rows.select_columns(["image", "mask"]).select(numbers) if row["mask"] is not None)
        pairs = [
            (self._small(row["image"]), resize_mask(np.asarray(row["mask"]), (height, width)).mask) for row in chosen
        ]
        if not pairs:
            raise MaskLoomError("train.adherence: no train image has a mask to learn from; set train.adherence=null")
        images, masks = zip(*pairs, strict=True)
        return np.stack(images), np.stack(masks)

    def _small(self, image: Image.Image) -> Picture:
        """Return an image at the reader's size and in the dataset's channels, (h, w, C) uint8."""
        height, width = self.options.image_size
        kind = "L" if self.about.channels == 1 else "RGB"
        resized = np.asarray(image.convert(kind).resize((width, height), Image.Resampling.BILINEAR))
        return resized.reshape(height, width, self.about.channels)


def _key(path: Path) -> str | None:
    """Return what a reader's file says that it was trained on."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("key")


def _asked_rows(rows: datasets.Dataset, count: int, seed: int) -> list[int]:
    """Return rows whose mask has a foreground, drawn at random and then put in the order of their classes.

    So the row before a row, whose words it gets, is of its class, but for the first of each class.
    """
    masks, labels = rows.select_columns(["mask"]), rows.select_columns(["label"])
    order = torch.randperm(len(rows), generator=keyed_generator(seed, "adherence rows")).tolist()
    drawn = islice((i for i in order if _has_foreground(masks[i]["mask"])), count)
    return sorted(drawn, key=lambda i: -1 if labels[i]["label"] is None else labels[i]["label"])


def _has_foreground(mask: Image.Image | None) -> bool:
    return mask is not None and bool(np.asarray(mask).any())
