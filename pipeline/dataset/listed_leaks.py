"""What stopped a training or an evaluation is looked up before images leave a run.

`logs/audit/DIGEST-leaked.jsonl` of a run (`pipeline.runs.leak_list`) states the pixels of each image that leaks, so
that they are known in every dataset that was made with them: filtered, combined, or copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from maskloom.pipeline.dataset.audit.pixels import decoded_image, pixel_digest
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import LeakedImages, MaskLoomError
from maskloom.pipeline.files.reading import read_line

SHOWN = 3  # images that the error names
LISTS = "logs/audit/*-leaked.jsonl"  # of a run
REMEDY = (
    "damaged, or written by an earlier version, so nothing says which synthetic images show held-out ones: delete it, and evaluate "
    "again before images leave the run"
)


class ListedLeak(BaseModel):
    """What a line of a list says that is needed here.

    Attributes:
        image_pixels: digest of the pixels of the image that leaks.
        shows, shows_split: sample id and split of the image that it shows.
    """

    image_pixels: str
    shows: str
    shows_split: str


def require_no_listed_leak(dataset: MaskPromptDataset, folders: Iterable[Path]) -> None:
    """Check that no train image of a dataset is in a list of leaks.

    Args:
        dataset: a synthetic or combined one.
        folders: of datasets whose runs keep the lists: `RUN/dataset` or `RUN/synthetic/NAME`.

    Raises:
        LeakedImages: some are; names the first ones and the list.
        MaskLoomError: a list is damaged.
    """
    places = [folder.resolve() for folder in folders]
    runs = dict.fromkeys(run for place in places for run in (place.parent, place.parent.parent))
    lists = [path for run in runs for path in sorted(run.glob(LISTS)) if path.is_file()]
    shows = {pixels: (text, path) for path in lists for pixels, text in _listed(path).items()}
    rows = dataset.rows("train", ["sample_id", "image"]) if shows else []
    found = [
        (row["sample_id"], *shows[pixels])
        for row in rows
        if (pixels := pixel_digest(decoded_image(dataset.folder, row)).hex()) in shows
    ]
    if found:
        named = [f"{sample} shows {text}" for sample, text, _ in found[:SHOWN]]
        more = [f"and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
        raise LeakedImages(
            f"{dataset.folder}: {len(found)} image(s) stopped a training or an evaluation as copies of held-out images: "
            f"{', '.join(named + more)}; {found[0][2]} lists them",
            "leave these images out where the set was made, and make it again",
        )


def _listed(path: Path) -> dict[str, str]:
    """Return what the images of a list show, by the digest of their pixels.

    Raises:
        MaskLoomError: it is damaged, empty, or of an earlier version.
    """
    lines = [
        read_line(line, ListedLeak, f"{path}:{number}", REMEDY)
        for number, line in enumerate(path.read_bytes().splitlines(), start=1)
    ]
    if not lines:
        raise MaskLoomError(f"{path}: empty: {REMEDY}")
    return {line.image_pixels: f"{line.shows} ({line.shows_split})" for line in lines}
