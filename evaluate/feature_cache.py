"""Features on disk, so that the next evaluation does not compute them again.

A file is named by all that its features depend on. Its digest is compared before it is read: a
damaged file is reported and computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.errors import report_write_errors
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.progress import say

Features = NDArray[np.float32]
NAME_DIGITS = 16  # of each digest in a file's name


class FeatureCache:
    """The features in a folder: one file per split of a dataset and extractor."""

    def __init__(self, folder: Path) -> None:
        """Store the folder; nothing is read or written."""
        self._owned = OwnedFolder(folder)

    def check(self) -> None:
        """Check that the folder may be written to; see `OwnedFolder.check` for the errors."""
        self._owned.check()

    def keep_only(self, datasets: Collection[str]) -> None:
        """Delete the features of all datasets but those with these digests."""
        known = {digest[:NAME_DIGITS] for digest in datasets}
        self._owned.remove([name for name in self._owned.files() if name.partition("-")[0] not in known])

    def features(
        self, dataset: str, split: str, extractor: Sequence[object], compute: Callable[[], Features]
    ) -> Features:
        """Return the features of a split, (N, D): those on disk, or `compute()`, which is kept.

        Args:
            dataset: digest of the dataset.
            split: name of its split.
            extractor: all else that the features depend on, such as the digest of the network's weights.
            compute: returns the features, float32.

        Raises:
            MaskLoomError: the folder may not be written to, or the disk is full.
        """
        name = f"{dataset[:NAME_DIGITS]}-{split}-{value_digest([dataset, split, *extractor])[:NAME_DIGITS]}.npy"
        kept = self._read(name)
        if kept is None:
            kept = compute()
            self._write(name, kept)
        return kept

    def _read(self, name: str) -> Features | None:
        """Return the features in a file; None if there is none or it is damaged."""
        path = self._owned.path / name
        if not path.is_file() or name not in self._owned.files():
            return None
        problem = self._owned.problem(name)
        if problem is not None:
            say(f"{problem}; computing the features again")
            return None
        features: Features = np.load(path, allow_pickle=False)
        return features

    def _write(self, name: str, features: Features) -> None:
        self._owned.claim()
        self._owned.check_name(name)
        with (
            report_write_errors(self._owned.path / name),
            self._owned.writing(name) as temporary,
            temporary.open("wb") as file,
        ):
            np.save(file, features, allow_pickle=False)
