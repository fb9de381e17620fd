"""Known controls: would the checks of this evaluation notice, in this dataset?

Copies of training images and held-out images are planted among images that pose as synthetic, and
masks are shuffled. The checks that an evaluation makes are then made on them, with the run's own
data and settings. Planted images lie in a temporary folder; the run's synthetic sets are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from maskloom.evaluate.copies import copy_judge
from maskloom.evaluate.downstream.masked import masked_images
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.leaks import held_out_judge, leaked_in
from maskloom.evaluate.metrics.faithfulness import Options as FaithfulnessOptions
from maskloom.evaluate.metrics.faithfulness import derangement, score_set, train_fold_models
from maskloom.evaluate.scores.statistics import Bootstrap, weighted_mean
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.dataset.audit.limits import NEAR_LIMIT
from maskloom.pipeline.dataset.audit.pixels import is_blank
from maskloom.pipeline.dataset.contract import Parent
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.results import MetricResult, Table, cell_text

VERSION = 8
QUESTION = "Do the checks of this evaluation notice what they are meant to find, in this dataset?"
PLANTED = 20  # images per control
FEWEST_FOUND = 0.95  # share of the planted images from which a control is caught
SHIFTED = 0.06  # of the side
PADDED = 0.8  # of the side that a padded copy keeps
BLURRED = 1.5 / 128  # standard deviation, of the side
JPEG_QUALITY = 20

Pixels = NDArray[np.uint8]
Change = Callable[[Pixels, np.random.Generator], Pixels]


class Options(Section):
    """What the controls depend on besides the data."""

    faithfulness: FaithfulnessOptions | None = None


@dataclass(frozen=True)
class Control:
    """What became of one control.

    Attributes:
        name: what was done, in words.
        result: what was found, in words, or why the control is not applicable.
        caught: whether the check noticed; None where the control is not applicable.
        planted, found: numbers of images; None where none were planted.
        named: how many of the found ones were named together with their original.
    """

    name: str
    result: str
    caught: bool | None
    planted: int | None = None
    found: int | None = None
    named: int | None = None

    def __str__(self) -> str:
        """Return the control with its result."""
        return f"{self.name}: {self.result}"

    @property
    def state(self) -> str:
        """Whether it was caught, and what follows if not."""
        if self.caught is None:
            return "not applicable"
        return "yes" if self.caught else f"NO: this check is {'partly ' if self.found else ''}blind in this dataset"


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Run every control.

    Raises:
        MaskLoomError: an image cannot be decoded, the temporary files cannot be written, or the
            training of the segmentation model failed.
    """
    try:
        with TemporaryDirectory(prefix="maskloom-controls-") as folder:
            planted = [*copy_controls(inputs, Path(folder)), *leak_controls(inputs, Path(folder))]
    except OSError as error:
        raise MaskLoomError(
            f"{gettempdir()}: control images cannot be written ({one_line(error)}); free space there, or set TMPDIR to another folder"
        ) from error
    controls = [*planted, mask_control(inputs, options.faithfulness)]
    return MetricResult(
        question=QUESTION,
        verdict=_verdict(controls),
        tables=[_table(controls)],
        warnings=[
            f"{one}; {one.state.removeprefix('NO: ')}, so what it does not find may be there"
            for one in controls
            if one.caught is False
        ],
        limits=["A control that is caught shows that such images are found, not that every kind of copy would be."],
        values={one.name: asdict(one) for one in controls},
        n={"real train": len(inputs.train), "planted": sum(one.planted or 0 for one in controls)},
    )


def copy_controls(inputs: EvaluationInputs, folder: Path) -> list[Control]:
    """Return whether copies of training images are found among synthetic ones (`evaluate.copies`)."""
    planted = {
        name: PlantedSet.write(folder / f"copies-{number}", inputs, inputs.train, change)
        for number, (name, change) in enumerate(COPIES.items())
    }
    rows = {
        name: copy_judge(inputs).copies_in(ImageSet(name, one.dataset, "train")) for name, one in planted.items() if one
    }
    pairs = {name: {row.sample_id: row.original for row in found} for name, found in rows.items()}
    return [_planted_control(name, one, pairs.get(name, {}), "training") for name, one in planted.items()]


def leak_controls(inputs: EvaluationInputs, folder: Path) -> list[Control]:
    """Return whether held-out images are found among synthetic ones, by either check that looks for them.

    The checks: `pipeline.runs.copies` and `evaluate.leaks`.
    """
    held_out = next((one for one in (inputs.test, inputs.validation) if len(one)), None)
    if inputs.real.num_rows + PLANTED * len(LEAKS) > NEAR_LIMIT:
        reason = f"not applicable: beyond {NEAR_LIMIT} images only identical ones are looked for"
        return [Control(name, reason, None) for name in LEAKS]
    from maskloom.pipeline.dataset.audit.held_out import find_held_out_copies

    planted = {
        name: PlantedSet.write(folder / f"leaks-{number}", inputs, held_out, change)
        for number, (name, change) in enumerate(LEAKS.items())
    }
    pairs: dict[str, dict[str, str]] = {name: {} for name in planted}
    if judge := held_out_judge(inputs):
        for name, one in planted.items():
            found = leaked_in(inputs, judge, ImageSet(name, one.dataset, "train")) if one else []
            pairs[name] = {row.sample_id: row.original for row in found}
    folders = {str(one.dataset.folder): name for name, one in planted.items() if one}
    for leak in find_held_out_copies(inputs.real, [one.dataset for one in planted.values() if one]):
        if leak.copy.dataset in folders:
            pairs[folders[leak.copy.dataset]].setdefault(leak.copy.sample_id, leak.original.sample_id)
    return [_planted_control(name, one, pairs[name], "held-out") for name, one in planted.items()]


def mask_control(inputs: EvaluationInputs, options: FaithfulnessOptions | None) -> Control:
    """Return whether faithfulness falls where real images get the masks of others.

    The images are those of the test split, or of the train split, segmented by the models that were
    not trained on their groups, where no test image has a mask with a foreground. As in `faithfulness`,
    images with an empty mask are left out. The fall is caught if its interval
    over groups lies above 0.
    """
    name = "masks shuffled"
    if options is None:
        return Control(name, "not applicable: faithfulness is not among evaluate.metrics", None)
    train, test = (masked_images(inputs, one, options.image_size) for one in (inputs.train, inputs.test))
    masked = (test if len(test.with_foreground()) else train).with_foreground()
    if len(train) < 2 or len(masked) < 2 or len(inputs.classes) < 2:
        return Control(name, "not applicable: fewer than two images have masks with a foreground", None)
    partner = derangement(len(masked), np.random.default_rng(inputs.seed))
    models = train_fold_models(inputs, train, options)
    own, other = (
        score_set(name, one, models, inputs, options).dice.mean(axis=1)
        for one in (masked, replace(masked, masks=masked.masks[partner]))
    )
    fall = Bootstrap(masked.groups, options.resamples, inputs.seed).interval(weighted_mean(own - other))
    caught = fall.low is not None and fall.low > 0
    change = f"{'falls' if caught else 'goes'} from {own.mean():.2f} to {other.mean():.2f}"
    return Control(name, f"faithfulness (Dice) {change}, a fall of {cell_text(fall)}", caught)


@dataclass(frozen=True)
class PlantedSet:
    """Images that pose as synthetic, and the real image of each.

    Attributes:
        dataset: a synthetic dataset in a temporary folder.
        originals: sample id of the real image, by that of the planted one.
    """

    dataset: MaskPromptDataset
    originals: Mapping[str, str]

    @classmethod
    def write(
        cls, folder: Path, inputs: EvaluationInputs, source: ImageSet | None, change: Change
    ) -> PlantedSet | None:
        """Write changed images of a real split; None where it has none to compare.

        Uniform images are not chosen: a copy of one cannot be told from any other.
        """
        if source is None or not len(source):
            return None
        random = np.random.default_rng([inputs.seed, PLANTED])
        rows = np.sort(random.permutation(len(source))[: 2 * PLANTED]).tolist()
        pixels = [image[..., 0] if image.shape[-1] == 1 else image for image in source.images(rows=rows)]
        named = zip((source.columns["sample_id"][row] for row in rows), pixels, strict=True)
        chosen = [(name, image) for name, image in named if not is_blank(image)][:PLANTED]
        if not chosen:
            return None
        samples = [_sample(number, name, change(image, random)) for number, (name, image) in enumerate(chosen)]
        _write_dataset(folder, inputs.real, samples)
        return cls(MaskPromptDataset.open(folder), {one.sample_id: str(one.parent_id) for one in samples})


def _sample(number: int, original: str, image: Pixels) -> Sample:
    return Sample(
        image=np.ascontiguousarray(image),
        mask=None,
        conditioning_image=np.zeros((*image.shape[:2], 3), dtype=np.uint8),
        text="control",
        label=None,
        sample_id=f"planted-{number:02d}",
        group_id=f"planted-{number:02d}",
        source="control",
        origin="synthetic",
        attributes={},
        parent_id=original,
        generator="control",
        seed=0,
    )


def _write_dataset(folder: Path, real: MaskPromptDataset, samples: Sequence[Sample]) -> None:
    description = real.description.model_copy(update={"origin": "synthetic"})
    (shard,) = plan_shards({"train": len(samples)}, len(samples))
    writer = DatasetWriter(folder, description, [shard], "controls")
    writer.prepare_folder()
    writer.write_shard(shard, samples)
    writer.finish("", [], "", Parent(path=str(real.folder), digest=real.digest))


def unchanged(image: Pixels, random: np.random.Generator) -> Pixels:
    """Return the image."""
    return image


def mirrored(image: Pixels, random: np.random.Generator) -> Pixels:
    """Return the image with left and right exchanged."""
    return image[:, ::-1]


def cropped(image: Pixels, random: np.random.Generator, share: float = 0.1) -> Pixels:
    """Return a random crop of the image, without a share of its sides, resized to its size."""
    height, width = image.shape[:2]
    top, left = (random.integers(0, max(1, round(side * share)) + 1) for side in (height, width))
    return _resized(image[top:, left:][: round(height * (1 - share)), : round(width * (1 - share))], height, width)


def shifted(image: Pixels, random: np.random.Generator) -> Pixels:
    """Return the image moved down and to the right; its edge fills the rest."""
    height, width = image.shape[:2]
    moved = [(max(1, round(SHIFTED * side)), 0) for side in (height, width)]
    return np.pad(image, [*moved, *[(0, 0)] * (image.ndim - 2)], mode="edge")[:height, :width]


def padded(image: Pixels, random: np.random.Generator, grey: int = 0) -> Pixels:
    """Return the image at `PADDED` of its size, in the middle of a uniform one."""
    height, width = image.shape[:2]
    rows, columns = round(PADDED * height), round(PADDED * width)
    top, left = (height - rows) // 2, (width - columns) // 2
    around = np.full_like(image, grey)
    around[top : top + rows, left : left + columns] = _resized(image, rows, columns)
    return around


def blurred(image: Pixels, random: np.random.Generator) -> Pixels:
    """Return the image after a Gaussian filter."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLURRED * max(image.shape[:2]))))


def compressed(image: Pixels, random: np.random.Generator) -> Pixels:
    """Return the image after JPEG at `JPEG_QUALITY`."""
    file = BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(file))


def _resized(image: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BICUBIC))


COPIES: dict[str, Change] = {
    "copies of training images": unchanged,
    "copies of training images, cropped by 10 %": cropped,
    "copies of training images, mirrored": mirrored,
}
LEAKED = "held-out images among synthetic ones"
LEAKS: dict[str, Change] = {
    LEAKED: unchanged,
    f"{LEAKED}, mirrored": mirrored,
    f"{LEAKED}, cropped by 10 %": cropped,
    f"{LEAKED}, cropped by 20 %": partial(cropped, share=0.2),
    f"{LEAKED}, shifted by 6 %": shifted,
    f"{LEAKED}, padded with black": padded,
    f"{LEAKED}, padded with grey": partial(padded, grey=128),
    f"{LEAKED}, blurred": blurred,
    f"{LEAKED}, compressed by JPEG": compressed,
}


def _planted_control(name: str, planted: PlantedSet | None, pairs: Mapping[str, str], kind: str) -> Control:
    """Return a control's outcome.

    Args:
        name: of the control.
        planted: the images, or None.
        pairs: the original that the check named, by planted image.
        kind: of the originals.
    """
    if planted is None:
        return Control(name, f"not applicable: there is no {kind} image that is not uniform", None)
    count, found = len(planted.originals), len(pairs)
    named = sum(planted.originals[sample] == original for sample, original in pairs.items())
    return Control(name, f"{found} of {count} found", found >= FEWEST_FOUND * count, count, found, named)


def _verdict(controls: Sequence[Control]) -> str:
    """Return the verdict, what was not caught first."""
    missed, caught, other = ([one for one in controls if one.caught is state] for state in (False, True, None))
    parts = [f"NOT CAUGHT in this dataset: {'; '.join(map(str, missed))}."] if missed else []
    parts += [f"Controls caught: {'; '.join(map(str, caught))}."] if caught else []
    return " ".join([*parts, *(f"{one.name[0].upper()}{one.name[1:]}: {one.result}." for one in other)])


def _table(controls: Sequence[Control]) -> Table:
    return Table(
        title="Known controls",
        note=f"Planted images are caught if {FEWEST_FOUND:.0%} of them are found; shuffled masks if the fall's interval is above 0.",
        columns=["control", "result", "with their original", "caught"],
        rows=[[one.name, one.result.removeprefix("not applicable: "), one.named, one.state] for one in controls],
    )
