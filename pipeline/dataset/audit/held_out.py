"""Copies of held-out images among the images that shape a model: not by ids, but by what they show.

Train images and synthetic images are compared with validation, test and external images. Unlike
identical pixels (`findings.py`), this also finds copies that were encoded again, changed in contrast,
cropped, mirrored or turned (`pipeline.dataset.near_duplicates.copies`).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import uniform_filter

from maskloom.pipeline.dataset.audit.findings import Place, stated_threshold
from maskloom.pipeline.dataset.audit.pixels import BLACK, Pixels, decoded_image, is_blank
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.near_duplicates.copies import CopySearch, Match, copy_threshold
from maskloom.pipeline.dataset.near_duplicates.textures import SIDE, signature
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.parallel import available_cores, worker_count
from maskloom.pipeline.progress import progress

IMAGES_PER_TASK, READ_AT_ONCE = 400, 64
# Two real images are copies from this likeness on. The closest neighbouring slices of the MNI152
# template in two splits reach 0.79, different patients of PneumoniaMNIST 0.73.
REAL_COPY = 0.9
# Where groups were to unite near-duplicates, a pair that exceeds the dataset's threshold by this is one.
MARGIN = 0.1


@dataclass(frozen=True)
class HeldOutCopy:
    """An image that shapes a model, and the held-out image of which it is a copy.

    Attributes:
        likeness: correlation of the aligned images, at most 1.
        turned: whether the copy is mirrored or turned.
    """

    copy: Place
    original: Place
    likeness: float
    turned: bool


def find_held_out_copies(real: MaskPromptDataset, synthetic: Sequence[MaskPromptDataset]) -> list[HeldOutCopy]:
    """Return the train and synthetic images that are copies of held-out ones.

    Each is listed once, with the held-out image that it resembles most. Memory holds a few numbers
    per image; a temporary file of 110 kB per image is written.

    Args:
        real: the real dataset; its train split shapes models, every other split is held out.
        synthetic: synthetic datasets.

    Raises:
        MaskLoomError: an image cannot be decoded, or the temporary files cannot be written.
    """
    try:
        with TemporaryDirectory(prefix="maskloom-copies-") as folder:
            signatures = Path(folder) / "signatures.bin"
            places = write_signatures([real, *synthetic], signatures)
            known = sum(place.dataset == str(real.folder) for place in places)
            if not known:
                return []
            workers = worker_count(len(places) // IMAGES_PER_TASK, None)
            search = CopySearch.build(signatures, len(places), known, Path(folder) / "vectors.bin", workers)
            return _held_out_copies(search, places, real)
    except OSError as error:
        raise MaskLoomError(
            f"{gettempdir()}: images cannot be compared ({one_line(error)}); free space there, or set TMPDIR to another folder"
        ) from error


def write_signatures(datasets: Sequence[MaskPromptDataset], file: Path) -> list[Place]:
    """Write the signature of every image that is not blank, and return the places of these images.

    Padding does not count (`content_area`).

    Raises:
        MaskLoomError: an image cannot be decoded.
    """
    places = []
    total = sum(dataset.num_rows for dataset in datasets)
    with (
        file.open("wb") as records,
        progress("reading textures", total, "images") as advance,
        ThreadPoolExecutor(available_cores()) as threads,  # decoding and filters leave the interpreter free
    ):
        for dataset in datasets:
            for split in dataset.contract.split_names:
                rows = dataset.rows(split, ["image", "label", "sample_id", "group_id"])
                while batch := list(islice(rows, READ_AT_ONCE)):
                    found = threads.map(partial(_signature_of, dataset.folder), batch)
                    for row, texture in zip(batch, found, strict=True):
                        advance()
                        if texture is None:
                            continue
                        records.write(texture)
                        label = dataset.description.label_name(row["label"])
                        places.append(Place(str(dataset.folder), split, row["sample_id"], row["group_id"], label))
    return places


def _signature_of(folder: Path, row: Mapping[str, Any]) -> bytes | None:
    """Return the signature of a stored image; None if it is blank."""
    image = decoded_image(folder, row)
    if is_blank(image):
        return None
    grey = content_area(np.asarray(Image.fromarray(image).convert("L")))
    return signature((grey / np.float32(255)).astype(np.float32))


def content_area(grey: Pixels) -> Pixels:
    """Return an image, (H, W), without black or white rows and columns around it.

    Unlike `pixels.without_padding`, it also leaves out padding that is inverted or covered by noise.
    """
    thumbnail = np.asarray(Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    smooth = uniform_filter(thumbnail, 3)
    box = []
    for axis in (1, 0):
        lowest, highest = smooth.min(axis=axis), smooth.max(axis=axis)
        content = np.flatnonzero((highest > BLACK) & (lowest < 255 - BLACK))
        if not len(content):
            return grey
        side = grey.shape[1 - axis]
        box.append(slice(content[0] * side // SIDE, -(-(content[-1] + 1) * side // SIDE)))
    return np.ascontiguousarray(grey[tuple(box)])


def _held_out_copies(search: CopySearch, places: Sequence[Place], real: MaskPromptDataset) -> list[HeldOutCopy]:
    """Return the copies among the train images, then those among each synthetic dataset's images."""
    folders = np.array([place.dataset for place in places])
    is_train = np.array([place.split == "train" for place in places])
    is_real = folders == str(real.folder)
    held_out = np.flatnonzero(is_real & ~is_train)

    def of_matches(matches: Sequence[Match], threshold: float) -> list[HeldOutCopy]:
        best = {match.query: match for match in reversed(matches) if match.likeness >= threshold}
        return [
            HeldOutCopy(places[match.query], places[match.reference], match.likeness, match.turn > 0)
            for match in sorted(best.values(), key=lambda match: match.query)
        ]

    known = int(is_real.sum())
    matches = search.matches(np.flatnonzero(is_real & is_train), held_out)
    limit = real_threshold(real, known)
    found = of_matches(matches, limit)
    threshold = copy_threshold([match for match in matches if match.likeness < limit], known)
    for folder in dict.fromkeys(folders[~is_real].tolist()):
        found += of_matches(search.matches(np.flatnonzero(folders == folder), held_out), threshold)
    return found


def real_threshold(real: MaskPromptDataset, images: int) -> float:
    """Return the likeness from which a train image counts as a copy of a held-out one.

    Args:
        real: the real dataset; its contract may state a threshold calibrated on its unrelated images.
        images: number of its images.
    """
    detail = stated_threshold(real, "detail")
    return REAL_COPY if detail is None else max(copy_threshold([], images), detail + MARGIN)
