"""What the program may delete or overwrite, and whether a file is what was written: a folder's manifest.

A folder that the program writes to holds `.maskloom.json`: the mark that it is the program's, and the digest of every file that was
written there. A file is listed before it takes its name, so that an interruption never leaves a file that looks like a stranger's. What
no manifest lists is the user's: it is never deleted or overwritten. Processes that write side by side keep a manifest each.
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
OUTGOING_SUFFIX = ".maskloom-old"  # of a folder whose successor takes its name at this moment
COPIES = f"if this is a copy, copy the hidden files {MANIFESTS} as well (cp -a, rsync -a)"
SYSTEM_FILES = frozenset(
    {".DS_Store", "Thumbs.db", "desktop.ini", LOCK_FILE}
)  # nobody's: they do not make a folder a user's


class Manifest(Record):
    """The content of a manifest; `digest` covers the rest, so that a damaged one is noticed."""

    maskloom: str
    files: dict[Annotated[str, inside("folder")], str]
    digest: str


class OwnedFolder:
    """A folder that the program writes to."""

    def __init__(self, path: Path, process: int = 0) -> None:
        """Name the folder; nothing is touched.

        Args:
            path: the folder.
            process: number of this process among those that write to the folder at the same time.
        """
        self.path = path
        self._own = path / (f".maskloom-{process}.json" if process else MANIFEST)

    def is_marked(self) -> bool:
        """Whether the folder is the program's."""
        return any(self.path.glob(MANIFESTS))

    def check(self) -> None:
        """Check that the folder may be written to: it is missing, empty or marked.

        Raises:
            MaskLoomError: it is a file, a link to nowhere, or holds files that the program did not write; or its manifest is damaged.
        """
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self.path.is_dir():
            raise MaskLoomError(f"{self.path}: not a folder, and MaskLoom writes a folder there; move it away")
        if self.is_marked():
            self.files()  # a damaged manifest is reported before anything is changed
            return
        strangers = [name for name in sorted(path.name for path in self.path.iterdir()) if not _is_nobodys(name)]
        if strangers:
            raise MaskLoomError(
                f"{self.path}: holds files that MaskLoom did not write ({_shown(strangers)}) and has no {MANIFEST}; "
                f"nothing was changed: move them away, or choose another run_dir or output; {COPIES}"
            )

    def claim(self) -> None:
        """Make the folder if it is missing, and mark it; see `check`."""
        self.check()
        self.mark()

    def mark(self) -> None:
        """Make the folder if it is missing, and mark it, whatever it holds."""
        if not self._own.exists():
            self.path.mkdir(parents=True, exist_ok=True)
            self._keep({})

    def files(self) -> dict[str, frozenset[str]]:
        """Return every file that was written, by its path below the folder, with its known digests: mostly one.

        There are several where processes of different runs wrote a file in turn.

        Raises:
            MaskLoomError: a manifest is damaged.
        """
        known: dict[str, set[str]] = {}
        for path in sorted(self.path.glob(MANIFESTS)):
            for name, digest in _read(path).items():
                known.setdefault(name, set()).add(digest)
        return {name: frozenset(digests) for name, digests in known.items()}

    def digests(self, subfolder: str = "") -> dict[str, str]:
        """Return the digest of each file as it was written, by its path below the folder.

        Args:
            subfolder: only files below it; empty: all.
        """
        prefix = f"{subfolder}/" if subfolder else ""
        listed = {name: known for name, known in self.files().items() if name.startswith(prefix)}
        return {name: min(known) if len(known) == 1 else self._present(name, known) for name, known in listed.items()}

    def problem(self, name: str) -> str | None:
        """Return what is wrong with a file, or None where it is as it was written."""
        known = self.files().get(name)
        if known is None:
            return f"{self.path / name}: not a file that MaskLoom wrote"
        return file_problem(self.path / name, known)

    def check_name(self, name: str) -> None:
        """Check that a file may be written.

        Raises:
            MaskLoomError: one is there that the program did not write.
        """
        target = self.path / name
        if (target.exists() or target.is_symlink()) and name not in self.files():
            raise MaskLoomError(
                f"{target}: in the way, and MaskLoom did not write it; nothing was changed: move it away, then run the same command again"
            )

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path to write to; it takes its name in the folder, and its place in the manifest, when the block ends well.

        Raises:
            MaskLoomError: a file is there that the program did not write.
        """
        self.check_name(name)
        with atomic_path(self.path / name) as temporary:
            yield temporary
            self._keep({**self._listed(), name: content_digest(temporary)})

    def write_text(self, name: str, text: str) -> None:
        """Write a text file; see `writing`."""
        with self.writing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def remove(self, names: Sequence[str]) -> None:
        """Delete files that the program wrote, and the folders that are empty then; others are left as they are."""
        listed = self.files()
        gone = [name for name in names if name in listed]
        for name in gone:
            (self.path / name).unlink(missing_ok=True)
        _remove_empty_folders(self.path, gone)
        for path in sorted(self.path.glob(MANIFESTS)):
            rest = {name: digest for name, digest in _read(path).items() if name not in gone}
            _write(path, rest)

    def clear(self, subfolder: str = "") -> None:
        """Delete all that the program wrote in the folder or in a subfolder of it; the mark stays."""
        self.remove(list(self.digests(subfolder)))

    def delete(self) -> None:
        """Delete all that the program wrote, and the folder where nothing of the user's is left in it; else its mark stays.

        Raises:
            MaskLoomError: the folder is not the program's.
        """
        if not self.path.is_dir():
            return
        self.check()
        if not self.path.is_symlink() and not strangers_in(self.path):
            outgoing = self.path.with_name(f".{self.path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
            self.path.rename(outgoing)  # no moment shows a half-deleted folder under its name
            shutil.rmtree(outgoing)
            return
        self.clear()

    def _present(self, name: str, known: frozenset[str]) -> str:
        """Return the one of several digests that the file has now, or any where it has none of them."""
        path = self.path / name
        return found if path.is_file() and (found := content_digest(path)) in known else min(known)

    def _listed(self) -> dict[str, str]:
        """Return this process's own entries."""
        return _read(self._own) if self._own.exists() else {}

    def _keep(self, files: Mapping[str, str]) -> None:
        _write(self._own, files)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; it takes the name `path` when the block ends well, in place of an older one.

    The older one must be the program's. Its files go only when the new ones are complete; the user's own files in it stay.

    Raises:
        MaskLoomError: what is there is not the program's, or another process is making a folder there.
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
    """Check that a folder may be put in place of what lies at a path.

    Raises:
        MaskLoomError: what lies there is not the program's, or is a link, whose target would be left behind.
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
    _write(folder / MANIFEST, {name: content_digest(folder / name) for name in names})


def put_in_place(new: Path, path: Path) -> None:
    """Give a finished folder its name; what the user has put into an older folder of that name moves over.

    Raises:
        MaskLoomError: the older folder is not the program's, or one of the user's files has the name of a new one.
    """
    restore_outgoing(path)
    check_replaceable(path)
    if not path.is_dir():
        new.rename(path)
        return
    kept = strangers_in(path)
    for name in kept:
        if (new / name).exists():
            raise MaskLoomError(f"{path / name}: in the way, and MaskLoom did not write it; move it away")
    for name in kept:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
    outgoing = _outgoing(path)
    path.rename(outgoing)
    new.rename(path)
    _move_strangers(outgoing, path)


def restore_outgoing(path: Path) -> None:
    """Mend what a kill between the renames of `put_in_place` has left: the older folder gets its name back where nothing has it.

    Else the new one has it, and only the user's own files have still to move over.

    Raises:
        MaskLoomError: one of the user's files has the name of a new one.
    """
    outgoing = _outgoing(path)
    if not OwnedFolder(outgoing).is_marked():
        return
    if path.exists():
        _move_strangers(outgoing, path)
    else:
        outgoing.rename(path)


def _outgoing(path: Path) -> Path:
    return path.with_name(f".{path.name}{OUTGOING_SUFFIX}")


def _move_strangers(outgoing: Path, path: Path) -> None:
    """Move the user's files from an older folder to the one that has taken its name, then delete the older one."""
    for name in strangers_in(outgoing):
        if (path / name).exists():
            raise MaskLoomError(f"{outgoing / name}: yours, and {path / name} has taken its place; move it away")
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (outgoing / name).rename(path / name)
    gone = path.with_name(f".{path.name}.gone{TEMPORARY_SUFFIX}")
    shutil.rmtree(gone, ignore_errors=True)
    outgoing.rename(gone)  # half deleted, it could not be told from a folder of the user's
    shutil.rmtree(gone)


def strangers_in(folder: Path) -> list[str]:
    """Return the files and links of a marked folder that the program did not write, by their path below it."""
    listed = OwnedFolder(folder).files()
    paths = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    names = [path.relative_to(folder).as_posix() for path in paths]
    return [name for name in names if name not in listed and not _is_nobodys(name)]


def delete_folder(path: Path) -> None:
    """Delete a folder that the program wrote whole, as a checkpoint; the user's own files in it stay. See `OwnedFolder.delete`."""
    OwnedFolder(path).delete()


def file_problem(path: Path, known: frozenset[str] | str) -> str | None:
    """Return what is wrong with a file that should have this content, or None.

    Args:
        path: the file.
        known: its digest, or several that it may have.
    """
    expected = {known} if isinstance(known, str) else known
    if not path.is_file():
        return f"{path}: missing"
    return None if content_digest(path) in expected else f"{path}: not what was written"


def check_places(inputs: Mapping[str, Path | None], outputs: Sequence[Path]) -> None:
    """Check that no input lies in an output and no output in an input, links resolved.

    Args:
        inputs: files and folders that are read, by the key or option that names them.
        outputs: files and folders that are written.

    Raises:
        MaskLoomError: names the key and both places.
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


def _is_nobodys(name: str) -> bool:
    """Whether a file, named by its path below a folder, is neither the program's nor the user's; the manifest of a folder in it is the user's."""
    path = PurePosixPath(name)
    temporary = any(part.endswith(TEMPORARY_SUFFIX) for part in path.parts)
    return path.name in SYSTEM_FILES or temporary or (len(path.parts) == 1 and path.match(MANIFESTS))


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(name.encode("utf-8", "replace").decode() for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _remove_empty_folders(root: Path, names: Sequence[str]) -> None:
    """Remove the folders that held these files, deepest first, where they are empty."""
    folders = {root / parent for name in names for parent in PurePosixPath(name).parents} - {root}
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _write(path: Path, files: Mapping[str, str]) -> None:
    content = {"maskloom": __version__, "files": dict(files)}
    write_json(path, {**content, "digest": value_digest(content)})


def _read(path: Path) -> dict[str, str]:
    remedy = "it lists what MaskLoom wrote in this folder: move the folder away and run the stage again"
    manifest = read_model(path, Manifest, remedy)
    if value_digest({"maskloom": manifest.maskloom, "files": manifest.files}) != manifest.digest:
        raise MaskLoomError(f"{path}: damaged (its content is not what was written); {remedy}")
    return manifest.files
