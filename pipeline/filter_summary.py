"""What the filter did to a generator's images: in `RUN/filter/NAME.json` and in the filtered dataset's contract."""

from typing import Self

from pydantic import Field

from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Count
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.files.reading import Record, checked

FILTER_KEY = "filter"
"""In the `preprocessing` of a filtered dataset's description."""


class SubsetCounts(Record):
    """What became of the images of a class, or of the images with small lesions.

    Attributes:
        name: of the class.
        images: generated images.
        rejected: those that at least one criterion rejected at first.
        rejected_by: the same by criterion; an image may be rejected by several.
        unfilled: rows for which every further draw was rejected as well.
    """

    name: str
    images: Count
    rejected: Count
    rejected_by: dict[str, Count]
    unfilled: Count


class FilterSummary(Record):
    """What the filter did to a generator's images.

    Attributes:
        generator: its name.
        digest: of the unfiltered dataset.
        acceptance: share of real validation images that was to be accepted.
        accepted: share that was accepted.
        accepted_unseen: the same with thresholds chosen without the images' own groups.
        validation_images: number of validation images.
        thresholds: by criterion.
        not_applied: criteria that do not apply to the dataset.
        images, kept, refilled: rows of the unfiltered set; kept at once; kept after another draw.
        draws: images drawn in the place of rejected ones.
        subsets: counts by class, and of small lesions.
        warnings: sentences for the user.
    """

    generator: str
    digest: str
    acceptance: float = Field(gt=0, lt=1)
    accepted: float = Field(ge=0, le=1)
    accepted_unseen: float | None
    validation_images: Count
    thresholds: dict[str, float]
    not_applied: list[str]
    images: Count
    kept: Count
    refilled: Count
    draws: Count
    subsets: list[SubsetCounts]
    warnings: list[str]

    @classmethod
    def of(cls, dataset: MaskPromptDataset) -> Self | None:
        """Return the summary in a dataset's contract; None if the dataset is not filtered.

        Raises:
            MaskLoomError: it is damaged.
        """
        stated = dataset.description.preprocessing.get(FILTER_KEY)
        where = f"{dataset.folder / CONTRACT_FILE}: description.preprocessing.{FILTER_KEY}"
        return None if stated is None else checked(stated, cls, where, "run filter again with --force")

    def sentence(self) -> str:
        """Return the counts as one sentence."""
        return (
            f"{self.kept} of {self.images} images were accepted at once, {self.refilled} after another draw ({self.draws} draws), "
            f"and {self.images - self.kept - self.refilled} could not be replaced"
        )
