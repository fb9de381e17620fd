"""Predictions of nnU-Net or of any other model, as a table of cases like that of our own models.

    FOLDER/ARM/SEED/CASE.png    masks of one model: class indices, one file per test image
    FOLDER/ARM/SEED.csv         or a classifier's probabilities: `sample_id`, a column per class

`ARM` is a name such as `real` or `real_synthetic`; `SEED` ends with a number, as in `0` or
`fold_0`; `CASE` is the sample id, as `maskloom export --format nnunet` writes it. Masks are
compared at their own size, one for all models: the true ones are resized to it as for our own models.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.evaluate.downstream.cases import (
    PROBABILITY,
    TRUTH,
    ScoredTestSet,
    TrainedModel,
    trained_cases,
    write_cases,
)
from maskloom.evaluate.downstream.compare import arm_scores, score_names
from maskloom.evaluate.inputs import ImageSet
from maskloom.evaluate.scores.segmentation import SegmentationScores
from maskloom.pipeline.dataset.contract import EXTERNAL_PREFIX
from maskloom.pipeline.dataset.exporter import safe_name
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError, excerpt
from maskloom.pipeline.files.atomic import atomic_path
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.named_files import NamedFile

Floats = NDArray[np.float64]
LAYOUT = "give a folder ARM/SEED/CASE.png (masks) or ARM/SEED.csv (probabilities), such as real/0/benign-1.png"
SUM_TOLERANCE = 1e-3
"""Probabilities of a case may differ by so much from a sum of 1."""


@dataclass(frozen=True)
class Cases:
    """The test images that are scored: their ids and groups."""

    samples: Sequence[str]
    groups: Sequence[str]


def read_predictions(folder: Path, dataset: Path, split: str, tolerance: float) -> ScoredTestSet:
    """Return the scores of predictions on a split of a dataset.

    Args:
        folder: the predictions.
        dataset: folder of the real mask-and-prompt dataset.
        split: `test`, or an external test set such as `external_udiat`.
        tolerance: of surface Dice, in pixels.

    Raises:
        MaskLoomError: the tolerance is no number; the dataset is invalid or lacks the split;
            the layout is another one; a case is missing, superfluous or unreadable; masks differ in
            size; or a value is no class index or probability.
    """
    if not 0 <= tolerance < np.inf:
        raise MaskLoomError(f"--surface-tolerance {tolerance}: give a number of pixels, 0 or more")
    models, suffix = find_models(folder)
    test = _open_test(dataset, split)
    metric, score = (
        ("downstream_segmentation", _mask_scores(test, tolerance))
        if suffix == ".png"
        else ("downstream_classification", _probability_scores(test))
    )
    kept = _cases(test, suffix)
    trained = {
        arm: {seed: TrainedModel([], {test.name: score(path, kept)}) for seed, path in sorted(by_seed.items())}
        for arm, by_seed in models.items()
    }
    return trained_cases(metric, trained, {test.name: kept})[0]


def find_models(folder: Path) -> tuple[dict[str, dict[int, Path]], str]:
    """Return the predictions of each model by arm and seed, and their kind: `.png` or `.csv`.

    Raises:
        MaskLoomError: the layout is another one, or two models of an arm have the same seed.
    """
    if not folder.is_dir():
        raise MaskLoomError(f"{folder}: no such folder of predictions; {LAYOUT}")
    models: dict[str, dict[int, Path]] = {}
    kinds = set()
    for arm in sorted(path for path in folder.iterdir() if path.is_dir()):
        for path in sorted(arm.iterdir()):
            if not path.is_dir() and path.suffix.lower() != ".csv":
                continue
            kinds.add(".png" if path.is_dir() else ".csv")
            seed = _seed_of(path)
            if seed in models.setdefault(arm.name, {}):
                raise MaskLoomError(
                    f"{path}: arm {arm.name!r} has another model of seed {seed}; give each its own number"
                )
            models[arm.name][seed] = path
        if arm.name not in models:
            raise MaskLoomError(f"{arm}: no predictions in it; remove it, or {LAYOUT}")
    if not models:
        raise MaskLoomError(f"{folder}: no predictions in it; {LAYOUT}")
    if len(kinds) > 1:
        raise MaskLoomError(f"{folder}: holds both masks and probabilities; give each its own folder")
    return models, kinds.pop()


def _seed_of(path: Path) -> int:
    number = re.search(r"(\d{1,9})$", path.stem if path.suffix.lower() == ".csv" else path.name)
    if number is None:
        raise MaskLoomError(f"{path}: its name must end with the model's seed, such as 0 or fold_0; {LAYOUT}")
    return int(number[1])


def _open_test(dataset: Path, split: str) -> ImageSet:
    """Return the test set, named as an evaluation names it.

    Raises:
        MaskLoomError: the dataset is invalid or has no such test set.
    """
    verified = verify_quickly(dataset)
    known = [one for one in verified.contract.split_names if one == "test" or one.startswith(EXTERNAL_PREFIX)]
    if split not in known:
        raise MaskLoomError(f"{dataset}: no test set {split!r}; it has {', '.join(known) or 'none'}")
    name = f"real {split}" if split == "test" else f"external test set {split.removeprefix(EXTERNAL_PREFIX)}"
    return ImageSet(name, verified, split)


def _cases(test: ImageSet, suffix: str) -> Cases:
    """Return the images of a test set that have a mask, or a label.

    Raises:
        MaskLoomError: there are none.
    """
    has_target = test.masks((8, 8))[1] if suffix == ".png" else test.labels >= 0
    kept = np.flatnonzero(has_target).tolist()
    if not kept:
        what = "mask" if suffix == ".png" else "label"
        raise MaskLoomError(f"{test.dataset.folder}: no image of its {test.split} split has a {what}")
    samples, groups = test.columns["sample_id"], test.groups
    return Cases([samples[i] for i in kept], [groups[i] for i in kept])


def _mask_scores(test: ImageSet, tolerance: float) -> Callable[[Path, Cases], dict[str, Floats]]:
    """Return a function that scores a folder of predicted masks, and refuses one of another size than the first."""
    classes = test.dataset.description.mask_classes
    if len(classes) < 2:
        raise MaskLoomError(f"{test.dataset.folder}: its masks have no class besides the background")
    known: dict[str, Path] = {}

    def score(folder: Path, cases: Cases) -> dict[str, Floats]:
        predictions = read_masks(folder, cases.samples, len(classes))
        size = f"{predictions.shape[2]} x {predictions.shape[1]}"
        if not known:
            say(f"import-predictions: masks are compared at {size} pixels, the size of the predictions")
        elif size not in known:  # distances are in pixels, and small masks lose detail
            other, first = next(iter(known.items()))
            raise MaskLoomError(
                f"{folder}: its masks have {size} pixels, those of {first} {other}; write all models' masks at one size"
            )
        known.setdefault(size, folder)
        masks, present = test.masks((predictions.shape[1], predictions.shape[2]))
        scored = SegmentationScores.of(masks[present], classes, tolerance)
        return scored.scores(predictions, masks[present])

    return score


def read_masks(folder: Path, samples: Sequence[str], classes: int) -> NDArray[np.uint8]:
    """Return the predicted masks of a folder, (N, H, W), in the order of the samples.

    Files other than PNG are ignored, as nnU-Net leaves some.

    Raises:
        MaskLoomError: a file is missing, superfluous, unreadable, no grey image or of another size
            than the others, or a value is no class index.
    """
    names = [f"{safe_name(sample)}.png" for sample in samples]
    found = {path.name for path in folder.iterdir() if path.suffix == ".png"}
    if missing := [name for name in names if name not in found]:
        raise MaskLoomError(f"{folder / missing[0]}: no such file, and {len(missing) - 1} more are missing; {LAYOUT}")
    if others := sorted(found - set(names)):
        raise MaskLoomError(f"{folder / others[0]}: no test image has this name; remove it, or give another --split")
    masks = [_read_mask(folder / name, classes) for name in names]
    for name, mask in zip(names, masks, strict=True):
        if mask.shape != masks[0].shape:
            raise MaskLoomError(
                f"{folder / name}: {mask.shape[1]} x {mask.shape[0]} pixels, and {names[0]} has "
                f"{masks[0].shape[1]} x {masks[0].shape[0]}; predict all images at one size"
            )
    return np.stack(masks)


def _read_mask(path: Path, classes: int) -> NDArray[np.uint8]:
    try:
        with Image.open(path, formats=["PNG"]) as image:  # other formats may be lossy, or hold fractions
            mask = np.asarray(image)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise MaskLoomError(f"{path}: not a readable PNG file ({excerpt(error)})") from error
    if mask.ndim != 2:
        raise MaskLoomError(f"{path}: a colour image; write class indices, one number per pixel")
    if mask.max(initial=0) >= classes:
        raise MaskLoomError(f"{path}: holds the value {mask.max()}; write class indices from 0 to {classes - 1}")
    return mask.astype(np.uint8)


def _probability_scores(test: ImageSet) -> Callable[[Path, Cases], dict[str, Floats]]:
    """Return a function that reads a table of probabilities as the rows of a classifier."""
    labels = test.dataset.description.labels
    if len(labels) < 2:
        raise MaskLoomError(f"{test.dataset.folder}: it has no image-level classes to distinguish")
    truth = test.labels[test.labels >= 0]

    def score(path: Path, cases: Cases) -> dict[str, Floats]:
        probabilities = read_probabilities(path, cases.samples, labels)
        found = {f"{PROBABILITY}{name}": probabilities[:, k] for k, name in enumerate(labels)}
        return found | {f"{TRUTH}{name}": (truth == k).astype(np.float64) for k, name in enumerate(labels)}

    return score


def read_probabilities(path: Path, samples: Sequence[str], labels: Sequence[str]) -> Floats:
    """Return the probabilities of a table, (N, K), in the order of the samples and labels.

    Raises:
        MaskLoomError: the file is unreadable; a column, a case or a number is missing; a column or a case
            stands there twice; a row is longer than the header; a case is no test image; or its probabilities
            do not sum to 1.
    """
    rows: dict[str, Mapping[str, str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            columns = list(table.fieldnames or [])
            if repeated := [name for name in ("sample_id", *labels) if columns.count(name) > 1]:
                raise MaskLoomError(f"{path}: column {repeated[0]!r} stands there twice; keep one of them")
            if lacking := [name for name in ("sample_id", *labels) if name not in columns]:
                raise MaskLoomError(
                    f"{path}: column {lacking[0]!r} is missing; it needs sample_id, {', '.join(labels)}, with commas between"
                )
            for row in table:
                sample = row.get("sample_id") or ""
                if None in row:
                    raise MaskLoomError(f"{path}: {sample!r}: its row has more values than there are columns")
                if sample in rows:
                    raise MaskLoomError(f"{path}: two rows for sample_id {sample!r}")
                rows[sample] = row
    except (OSError, ValueError, csv.Error) as error:
        raise MaskLoomError(f"{path}: not a readable CSV file ({excerpt(error)})") from error
    if missing := [sample for sample in samples if sample not in rows]:
        raise MaskLoomError(f"{path}: no row for {missing[0]!r}, and {len(missing) - 1} more are missing")
    if others := sorted(rows.keys() - set(samples)):
        raise MaskLoomError(f"{path}: no test image is called {others[0]!r}; remove it, or give another --split")
    return np.array([_probabilities(path, rows[sample], sample, labels) for sample in samples])


def _probabilities(path: Path, row: Mapping[str, str], sample: str, labels: Sequence[str]) -> list[float]:
    try:
        values = [float(row[name]) for name in labels]
    except (TypeError, ValueError):
        raise MaskLoomError(f"{path}: {sample!r}: a probability is not a number") from None
    if not (all(0 <= value <= 1 for value in values) and abs(sum(values) - 1) <= SUM_TOLERANCE):
        raise MaskLoomError(f"{path}: {sample!r}: its values are no probabilities from 0 to 1 that sum to 1")
    return values


def write_imported(file: NamedFile, cases: ScoredTestSet) -> None:
    """Write a table of cases where the user wants it, and say what each arm reached.

    Raises:
        MaskLoomError: another file is in the way.
    """
    file.check()
    with atomic_path(file.path) as temporary:
        write_cases(temporary, [cases], file.mark)
    headline = score_names(cases)[0]
    reached = [
        f"{one.arm} {headline} {one.value:.3f} ({len(one.by_seed)} models)"
        for one in arm_scores(cases, [headline])
        if one.value is not None
    ]
    say(f"{file.path}: {len(cases.samples)} cases of the {cases.test_set}; {', '.join(reached)}")
