"""Trained downstream models on disk, so that an interrupted evaluation does not train them again.

A file is named by all that its model and its scores depend on. Its digest is compared before it is
read: a damaged file is reported, and its model is trained again. Once the answer of a metric is
written, its models are deleted.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from maskloom.pipeline.errors import MaskLoomError, report_write_errors
from maskloom.pipeline.files.atomic import TEMPORARY_SUFFIX
from maskloom.pipeline.files.ownership import MANIFESTS, OwnedFolder
from maskloom.pipeline.progress import say

Stored = tuple[Mapping[str, NDArray[Any]], Mapping[str, str]]
"""The arrays of a model, and text that says what they are."""
NAME_DIGITS = 16  # of the digest in a file's name
MODEL_NAME = re.compile(rf"[a-z0-9_]+-[0-9a-f]{{{NAME_DIGITS}}}\.safetensors")


class ModelCache:
    """The downstream models in a folder: one file per model."""

    def __init__(self, folder: Path) -> None:
        """Store the folder; nothing is read or written."""
        self._owned = OwnedFolder(folder)
        self._read_back = 0

    def check(self) -> None:
        """Check that the folder may be written to; one without a readable manifest is emptied.

        Nothing but models that can be trained again lies under its name, so that damage never stops
        an evaluation. Files of other kinds stay.

        Raises:
            MaskLoomError: a file of another kind is in the way; see `OwnedFolder.check`.
        """
        try:
            self._owned.check()
            self._owned.files()
        except MaskLoomError as error:
            if not self._is_only_models():
                raise
            say(f"{error}; training these models again")
            shutil.rmtree(self._owned.path)
        self._remove_folders()

    def _remove_folders(self) -> None:
        """Remove empty folders where models belong."""
        for one in self._owned.path.glob("*.safetensors"):
            if one.is_dir() and not one.is_symlink():
                if any(one.iterdir()):
                    raise MaskLoomError(f"{one}: a folder with files in it, where a model belongs; move it away")
                say(f"{one}: a folder where a model belongs; training this model again")
                one.rmdir()

    def _is_only_models(self) -> bool:
        """Whether nothing but models, their leftovers and the manifest lies in the folder."""
        path = self._owned.path
        if path.is_symlink() or not path.is_dir():
            return False
        return all(
            (MODEL_NAME.fullmatch(one.name) or one.match(MANIFESTS) or one.name.endswith(TEMPORARY_SUFFIX))
            and not one.is_symlink()
            and one.is_file()
            for one in path.iterdir()
        )

    def stored(self, metric: str, key: str, train: Callable[[], Stored]) -> Stored:
        """Return a model: the one on disk, or `train()`, which is kept.

        Args:
            metric: file name of the metric.
            key: digest of all that the model and its scores depend on.
            train: trains and scores the model.

        Raises:
            MaskLoomError: the folder may not be written to, or the disk is full.
        """
        name = f"{metric}-{key[:NAME_DIGITS]}.safetensors"
        kept = self._read(name)
        if kept is None:
            kept = train()
            self._write(name, kept)
        else:
            self._read_back += 1
        return kept

    def finish(self, metric: str) -> None:
        """Say how many models of a metric were read back, and delete its models."""
        if self._read_back:
            say(f"{metric}: {self._read_back} model(s) that are already trained read back, not trained again")
        self._read_back = 0
        self._owned.remove([name for name in self._owned.files() if name.rpartition("-")[0] == metric])

    def clear(self) -> None:
        """Delete all models, and the folder if nothing else is in it."""
        if self._owned.is_marked():
            self._owned.delete()

    def _read(self, name: str) -> Stored | None:
        """Return the model in a file; None if there is none or it is damaged."""
        from safetensors import safe_open

        path = self._owned.path / name
        if not path.is_file() or name not in self._owned.files():
            return None
        problem = self._owned.problem(name)
        if problem is not None:
            say(f"{problem}; training this model again")
            return None
        with safe_open(path, framework="numpy") as file:
            return {one: file.get_tensor(one) for one in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)

    def _write(self, name: str, model: Stored) -> None:
        from safetensors.numpy import save

        self._owned.claim()
        self._owned.check_name(name)
        arrays, notes = model
        with report_write_errors(self._owned.path / name), self._owned.writing(name) as temporary:
            temporary.write_bytes(save(dict(arrays), dict(notes)))
