"""What the user gives to `judge`: a prepared dataset, a run, or a folder of raw images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from maskloom.pipeline.config.base import with_home
from maskloom.pipeline.dataset.contract import CONTRACT_FILE
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import check_places
from maskloom.pipeline.runs.run import Run

Role = Literal["real", "synthetic"]


@dataclass(frozen=True)
class Given:
    """A folder of images.

    Attributes:
        role: the option that names it, and what its images are.
        folder: the folder that is read: of a run, its dataset.
        prepared: whether it is a mask-and-prompt dataset.
    """

    role: Role
    folder: Path
    prepared: bool


def given_folder(role: Role, path: Path) -> Given:
    """Return what lies at a path.

    Raises:
        MaskLoomError: it is no folder or holds no file, or is a run without such a dataset, or with several.
    """
    path = with_home(path)
    if not path.is_dir():
        what = "is a file; give the folder that holds it" if path.exists() else "no such folder"
        raise MaskLoomError(f"--{role} {path}: {what}")
    if not any(one.is_file() or one.is_symlink() for one in path.rglob("*")):
        raise MaskLoomError(f"--{role} {path}: the folder is empty, or holds empty folders only; give one with images")
    if (path / CONTRACT_FILE).is_file():
        return Given(role, path, prepared=True)
    run = Run(path)
    if not (run.dataset / CONTRACT_FILE).is_file():
        return Given(role, path, prepared=False)
    if role == "real":
        return Given(role, run.dataset, prepared=True)
    sets = sorted(file.parent for file in run.synthetic.glob(f"*/{CONTRACT_FILE}"))
    if len(sets) != 1:
        shown = ", ".join(map(str, sets)) or "none"
        raise MaskLoomError(f"--synthetic {path}: a run with {len(sets)} synthetic sets; give one of them: {shown}")
    return Given(role, sets[0], prepared=True)


def require_apart(real: Given, synthetic: Given, out: Path) -> None:
    """Check that no folder lies in another one.

    Raises:
        MaskLoomError: the synthetic images are, or hold, or lie among the real ones, or the result would.
    """
    ours, theirs = real.folder.resolve(), synthetic.folder.resolve()
    if ours == theirs:
        raise MaskLoomError(f"--synthetic {synthetic.folder}: is the folder of --real; give the synthetic images")
    if ours in theirs.parents or theirs in ours.parents:
        inner, outer = (synthetic, real) if ours in theirs.parents else (real, synthetic)
        raise MaskLoomError(
            f"--{inner.role} {inner.folder}: lies in --{outer.role} {outer.folder}; keep real and synthetic images apart"
        )
    check_places({"--real": real.folder, "--synthetic": synthetic.folder}, [out])
