"""Manifests: which files MaskLoom wrote, and may therefore delete or overwrite, and their digests.

Every folder that MaskLoom writes to contains `.maskloom.json`. It marks the folder as MaskLoom's
and lists the digest of every file that was written there. A file is listed before it gets its name,
so that an interruption never leaves an unlisted file. A file that no manifest lists is the user's
and is never deleted or overwritten. Processes that write to the same folder keep one manifest each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Annotated

from maskloom.pipeline import __version__
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import (
    LOCK_FILE,
    TEMPORARY_SUFFIX,
    atomic_path,
    content_digest,
    flush_files,
    sole_maker,
    value_digest,
    write_json,
)
from maskloom.pipeline.files.reading import Record, inside, read_model

MANIFEST = ".maskloom.json"
MANIFESTS = ".maskloom*.json"
OUTGOING_SUFFIX = ".maskloom-old"  # of a folder that is just being replaced
COPIES = f"if this is a copy, copy the hidden files {MANIFESTS} as well (cp -a, rsync -a)"
# These are neither MaskLoom's nor the user's.
SYSTEM_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", LOCK_FILE})


class Manifest(Record):
    """The content of a manifest; `digest` covers the other fields, so that damage is detected."""

    maskloom: str
    files: dict[Annotated[str, inside("folder")], str]
    digest: str


class OwnedFolder:
    """A folder that MaskLoom writes to."""

    def __init__(self, path: Path, process: int = 0) -> None:
        """Store the path; nothing is read or written.

        Args:
            path: the folder.
            process: index of this process among those that write to the folder at the same time.
        """
        self.path = path
        self._own = path / (f".maskloom-{process}.json" if process else MANIFEST)

    def is_marked(self) -> bool:
        """Return whether MaskLoom has marked the folder as its own."""
        return any(self.path.glob(MANIFESTS))

    def check(self) -> None:
        """Check that the folder may be written to: it is missing, empty or marked.

        Raises:
            MaskLoomError: the path is a file or a broken link, the folder contains files that
                MaskLoom did not write, or its manifest is damaged.
        """
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self.path.is_dir():
            raise MaskLoomError(f"{self.path}: not a folder, and MaskLoom writes a folder there; move it away")
        if self.is_marked():
            self.files()  # a damaged manifest is reported before anything is changed
            return
        foreign = [name for name in sorted(path.name for path in self.path.iterdir()) if not _is_ignored(name)]
        if foreign:
            raise MaskLoomError(
                f"{self.path}: holds files that MaskLoom did not write ({_shown(foreign)}) and has no {MANIFEST}; "
                f"nothing was changed: move them away, or choose another run_dir or output; {COPIES}"
            )

    def claim(self) -> None:
        """Create the folder if it is missing, and mark it; see `check` for the errors."""
        self.check()
        self.mark()

    def mark(self) -> None:
        """Create the folder if it is missing, and mark it, whatever it contains."""
        if not self._own.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            write_manifest(self._own, {})

    def files(self) -> dict[str, frozenset[str]]:
        """Return the known digests of every file that was written, by its path in the folder.

        A file usually has one digest. It has several if processes of different runs wrote it in
        turn.

        Raises:
            MaskLoomError: a manifest is damaged.
        """
        known: dict[str, set[str]] = {}
        for path in sorted(self.path.glob(MANIFESTS)):
            for name, digest in read_manifest(path).items():
                known.setdefault(name, set()).add(digest)
        return {name: frozenset(digests) for name, digests in known.items()}

    def digests(self, subfolder: str = "") -> dict[str, str]:
        """Return the digest of each file when it was written, by its path in the folder.

        Args:
            subfolder: restricts the result to this subfolder; empty: all files.
        """
        prefix = f"{subfolder}/" if subfolder else ""
        listed = {name: known for name, known in self.files().items() if name.startswith(prefix)}
        return {name: min(known) if len(known) == 1 else self._present(name, known) for name, known in listed.items()}

    def problem(self, name: str) -> str | None:
        """Return what is wrong with a file, or None if it is unchanged."""
        known = self.files().get(name)
        if known is None:
            return f"{self.path / name}: not a file that MaskLoom wrote"
        return file_problem(self.path / name, known)

    def check_name(self, name: str) -> None:
        """Check that a file may be written.

        Raises:
            MaskLoomError: the file exists, and MaskLoom did not write it.
        """
        target = self.path / name
        if (target.exists() or target.is_symlink()) and name not in self.files():
            raise MaskLoomError(
                f"{target}: in the way, and MaskLoom did not write it; nothing was changed: "
                "move it away, then run the same command again"
            )

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary file, which is listed and renamed to `name` if the block succeeds.

        Raises:
            MaskLoomError: the file exists, and MaskLoom did not write it.
        """
        self.check_name(name)
        with atomic_path(self.path / name) as temporary:
            yield temporary
            listed = read_manifest(self._own) if self._own.exists() else {}
            write_manifest(self._own, {**listed, name: content_digest(temporary)})

    def write_text(self, name: str, text: str) -> None:
        """Write a text file; see `writing`."""
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def remove(self, names: Sequence[str]) -> None:
        """Delete files that MaskLoom wrote, and folders that become empty; keep all other files."""
        listed = self.files()
        gone = [name for name in names if name in listed]
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
        _remove_empty_folders(self.path, gone)
        for path in sorted(self.path.glob(MANIFESTS)):
            rest = {name: digest for name, digest in read_manifest(path).items() if name not in gone}
            write_manifest(path, rest)

    def clear(self, subfolder: str = "") -> None:
        """Delete every file that MaskLoom wrote in the folder or in a subfolder; keep the mark."""
        self.remove(list(self.digests(subfolder)))

    def delete(self) -> None:
        """Delete every file that MaskLoom wrote, and the folder if no file of the user is in it.

        Raises:
            MaskLoomError: the folder is not MaskLoom's.
        """
        if not self.path.is_dir():
            return
        self.check()
        if not self.path.is_symlink() and not foreign_files(self.path):
            outgoing = self.path.with_name(f".{self.path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
            self.path.rename(outgoing)  # so that its name never refers to a half-deleted folder
            shutil.rmtree(outgoing)
            return
        self.clear()

    def _present(self, name: str, known: frozenset[str]) -> str:
        """Return which of several known digests the file has now; any of them if it has none."""
        path = self.path / name
        return found if path.is_file() and (found := content_digest(path)) in known else min(known)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which replaces `path` if the block succeeds.

    An existing folder must be MaskLoom's. Its files are deleted only when the new ones are
    complete; the user's own files in it are kept.

    Raises:
        MaskLoomError: what exists at `path` is not MaskLoom's, or another process is writing there.
    """
    check_replaceable(path)
    with sole_maker(path):
        restore_outgoing(path)
        temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.mkdir()
        try:
            yield temporary
            seal_folder(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        put_in_place(temporary, path)


def check_replaceable(path: Path) -> None:
    """Check that a folder may replace what exists at a path.

    Raises:
        MaskLoomError: it is not MaskLoom's, or is a link, whose target would be left behind.
    """
    if path.is_symlink():
        raise MaskLoomError(
            f"{path}: a link, and MaskLoom replaces folders whole; let run_dir or output name the real folder"
        )
    OwnedFolder(path).check()


def seal_folder(folder: Path) -> None:
    """Flush every file of a folder to the disk and write its manifest."""
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [name for name in names if not PurePosixPath(name).match(MANIFESTS)]
    flush_files([folder / name for name in names])
    write_manifest(folder / MANIFEST, {name: content_digest(folder / name) for name in names})


def put_in_place(new: Path, path: Path) -> None:
    """Rename a finished folder to `path`, and keep the user's files from the folder it replaces.

    Raises:
        MaskLoomError: the existing folder is not MaskLoom's, or one of the user's files has the
            same name as a new one.
    """
    restore_outgoing(path)
    check_replaceable(path)
    if not path.is_dir():
        new.rename(path)
        return
    kept = foreign_files(path)
    for name in kept:
        if (new / name).exists():
            raise MaskLoomError(f"{path / name}: in the way, and MaskLoom did not write it; move it away")
    for name in kept:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
    outgoing = _outgoing(path)
    path.rename(outgoing)
    new.rename(path)
    _finish_replacement(outgoing, path)


def restore_outgoing(path: Path) -> None:
    """Recover after a process was killed between the renames of `put_in_place`.

    If nothing exists at `path`, the replaced folder gets its name back. Otherwise the new folder is
    in place, and only the user's own files still have to be moved.

    Raises:
        MaskLoomError: one of the user's files has the name of a new file.
    """
    outgoing = _outgoing(path)
    if not OwnedFolder(outgoing).is_marked():
        return
    if path.exists():
        _finish_replacement(outgoing, path)
    else:
        outgoing.rename(path)


def _outgoing(path: Path) -> Path:
    return path.with_name(f".{path.name}{OUTGOING_SUFFIX}")


def _finish_replacement(outgoing: Path, path: Path) -> None:
    """Move the user's files from a replaced folder to the new one, then delete the old folder."""
    for name in foreign_files(outgoing):
        if (path / name).exists():
            raise MaskLoomError(f"{outgoing / name}: your file, and {path / name} has the same name; move it away")
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (outgoing / name).rename(path / name)
    gone = path.with_name(f".{path.name}.gone{TEMPORARY_SUFFIX}")
    shutil.rmtree(gone, ignore_errors=True)
    outgoing.rename(gone)  # half deleted, it could not be distinguished from a folder of the user
    shutil.rmtree(gone)


def foreign_files(folder: Path) -> list[str]:
    """Return the files and links in a folder that MaskLoom did not write, as relative paths."""
    listed = OwnedFolder(folder).files()
    paths = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if name not in listed and not _is_ignored(name)]


def delete_folder(path: Path) -> None:
    """Delete a folder that MaskLoom wrote, such as a checkpoint; see `OwnedFolder.delete`."""
    OwnedFolder(path).delete()


def file_problem(path: Path, known: frozenset[str] | str) -> str | None:
    """Return what is wrong with a file that should have this content, or None.

    Args:
        path: the file.
        known: its digest, or several allowed ones.
    """
    expected = {known} if isinstance(known, str) else known
    if not path.is_file():
        return f"{path}: missing"
    return None if content_digest(path) in expected else f"{path}: changed since it was written"


def check_places(inputs: Mapping[str, Path | None], outputs: Sequence[Path]) -> None:
    """Check that no input lies inside an output and no output inside an input, with links resolved.

    Args:
        inputs: files and folders that are read, by the key or option that names them.
        outputs: files and folders that are written.

    Raises:
        MaskLoomError: an input and an output overlap; the error names the key and both paths.
    """
    for key, given in inputs.items():
        if given is None:
            continue
        place = given.resolve()
        for output in outputs:
            target = output.resolve()
            if place == target or place in target.parents or target in place.parents:
                relation = "is" if place == target else "holds" if place in target.parents else "lies in"
                named = key if str(given) in key else f"{key}={given}"
                raise MaskLoomError(
                    f"{named}: {relation} {output}, which is written to; nothing was changed: "
                    "keep what is read and what is written apart (another run_dir, or another folder for the input)"
                )


def _is_ignored(name: str) -> bool:
    """Return whether a file, given by its path in a folder, is neither MaskLoom's nor the user's.

    The manifest of a subfolder counts as the user's.
    """
    path = PurePosixPath(name)
    temporary = any(part.endswith(TEMPORARY_SUFFIX) for part in path.parts)
    return path.name in SYSTEM_FILES or temporary or (len(path.parts) == 1 and path.match(MANIFESTS))


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _remove_empty_folders(root: Path, names: Sequence[str]) -> None:
    """Remove the folders of these files that are empty, deepest first."""
    folders = {root / parent for name in names for parent in PurePosixPath(name).parents} - {root}
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_manifest(path: Path, files: Mapping[str, str]) -> None:
    """Write a manifest that lists the digests of files."""
    content = {"maskloom": __version__, "files": dict(files)}
    write_json(path, {**content, "digest": value_digest(content)})


def read_manifest(path: Path) -> dict[str, str]:
    """Return the digests that a manifest lists.

    Raises:
        MaskLoomError: the manifest is damaged.
    """
    remedy = "it lists what MaskLoom wrote in this folder: move the folder away and run the stage again"
    manifest = read_model(path, Manifest, remedy)
    if value_digest({"maskloom": manifest.maskloom, "files": manifest.files}) != manifest.digest:
        raise MaskLoomError(f"{path}: damaged (its content has changed since it was written); {remedy}")
    return manifest.files
