"""Raw folders as no dataset's makers meant them: damaged bytes, wrong content, names of every kind,
links, pipes and folders in place of files.
"""

import functools
import hashlib
import importlib
import os
import random
import shutil
import socket
import stat
import tempfile
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from maskloom.data_prep.sources import PACKAGE
from maskloom.pipeline.plugins import load_plugin, plugin_names

NAMES = [name for name in plugin_names(PACKAGE) if load_plugin(PACKAGE, name, "dataset").Adapter.needs_raw_dir]
MOST_MUTATIONS = 3


@functools.cache
def pristine(name: str) -> Path:
    """A raw folder as its writer left it, kept as long as the process."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    importlib.import_module(f"tests.writers.{name}").write_raw(Path(folder.name))
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory] = []


def options_of(name: str) -> dict[str, Any]:
    """The options that fit what the writer writes."""
    return getattr(importlib.import_module(f"tests.writers.{name}"), "OPTIONS", {})


def write_malformed(name: str, seed: int, raw: Path) -> str:
    """Write a malformed raw folder of a dataset; return what was done to it.

    The same seed gives the same folder.
    """
    chance = random.Random(f"{name}/{seed}")
    shutil.copytree(pristine(name), raw)
    done = []
    for _ in range(chance.randint(1, MOST_MUTATIONS)):
        mutate = chance.choice(MUTATIONS)
        files = sorted(path for path in raw.rglob("*") if path.is_file() and not path.is_symlink())
        if files:
            with suppress(OSError):  # a name that is too long, or taken
                mutate(chance.choice(files), raw, chance)
            done.append(mutate.__name__)
    return ", ".join(done)


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what every entry below a folder is: kind, time, and content or target."""
    found: dict[str, tuple[object, ...]] = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = ""
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


def truncated(path: Path, raw: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * chance.random())])


def overwritten(path: Path, raw: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    start, noise = int(len(content) * chance.random()), chance.randbytes(chance.randint(1, 16))
    path.write_bytes(content[:start] + noise + content[start + len(noise) :])


def overwritten_in_the_header(path: Path, raw: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    start, noise = int(min(len(content), 512) * chance.random()), chance.randbytes(chance.randint(1, 16))
    path.write_bytes(content[:start] + noise + content[start + len(noise) :])


def inserted(path: Path, raw: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    start = int(len(content) * chance.random())
    path.write_bytes(content[:start] + chance.randbytes(chance.randint(1, 16)) + content[start:])


def cut(path: Path, raw: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    start = int(len(content) * chance.random())
    path.write_bytes(content[:start] + content[start + chance.randint(1, 16) :])


def emptied(path: Path, raw: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def deleted(path: Path, raw: Path, chance: random.Random) -> None:
    path.unlink()


def text_under_its_name(path: Path, raw: Path, chance: random.Random) -> None:
    path.write_text(
        chance.choice(["<html>404</html>", "version https://git-lfs.github.com/spec/v1\n", "a,b\n1", "\0" * 999])
    )


def content_of_another_file(path: Path, raw: Path, chance: random.Random) -> None:
    others = sorted(p for p in raw.rglob("*") if p.is_file() and not p.is_symlink())
    path.write_bytes(chance.choice(others).read_bytes())


STRANGE_NAMES: tuple[Callable[[str, str], str], ...] = (
    lambda stem, end: unicodedata.normalize("NFD", f"{stem}é") + end,
    lambda stem, end: f"{stem}é{end}",
    lambda stem, end: stem + end.upper(),
    lambda stem, end: stem.upper() + end,
    lambda stem, end: f" {stem}  {end}",
    lambda stem, end: f"{stem}\u00a0{end}",
    lambda stem, end: f"{stem}\u200f\u200b{end}",
    lambda stem, end: f"a\\{stem}{end}",
    lambda stem, end: f"{stem}{os.fsdecode(bytes([255, 254]))}{end}",
    lambda stem, end: f"{stem}\n\x1b[31m\t{end}",
    lambda stem, end: f"{'x' * (255 - len(end))}{end}",
    lambda stem, end: f"---{end}",
    lambda stem, end: f"-rf {stem}{end}",
    lambda stem, end: f"{stem}\U0001f469\u200d\U0001f52c{end}",
    lambda stem, end: f"<script>{stem}'\"&$(x)`{end}",
    lambda stem, end: f".{stem}{end}",
    lambda stem, end: f"._{stem}{end}",
    lambda stem, end: stem,
    lambda stem, end: f"{stem}{end}.part",
)


def renamed(path: Path, raw: Path, chance: random.Random) -> None:
    path.rename(path.with_name(chance.choice(STRANGE_NAMES)(path.stem, path.suffix)))


def copied_under_a_strange_name(path: Path, raw: Path, chance: random.Random) -> None:
    shutil.copy(path, path.with_name(chance.choice(STRANGE_NAMES)(path.stem, path.suffix)))


def folder_renamed(path: Path, raw: Path, chance: random.Random) -> None:
    if path.parent != raw:
        path.parent.rename(path.parent.with_name(chance.choice(STRANGE_NAMES)(path.parent.name, "")))


def link_to_itself(path: Path, raw: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def link_to_nothing(path: Path, raw: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_another_file(path: Path, raw: Path, chance: random.Random) -> None:
    others = sorted(p for p in raw.rglob("*") if p.is_file() and p != path)
    if others:
        path.unlink()
        path.symlink_to(chance.choice(others))


def loop_of_folders(path: Path, raw: Path, chance: random.Random) -> None:
    loop = path.with_name("loop")
    if not os.path.lexists(loop):
        loop.symlink_to(chance.choice([path.parent, raw]), target_is_directory=True)


def pipe(path: Path, raw: Path, chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def listening_socket(path: Path, raw: Path, chance: random.Random) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)
        try:  # a socket's path is short
            bound.bind(f"/proc/self/fd/{here}/s")
            path.with_name("s").rename(path)
        except OSError:
            path.mkdir()
        finally:
            os.close(here)


def folder_under_its_name(path: Path, raw: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()
    if chance.random() < 0.5:
        (path / path.name).write_bytes(b"x")


def file_in_place_of_its_folder(path: Path, raw: Path, chance: random.Random) -> None:
    if path.parent != raw:
        shutil.rmtree(path.parent)
        path.parent.write_bytes(b"x")


def folder_emptied(path: Path, raw: Path, chance: random.Random) -> None:
    shutil.rmtree(path.parent)
    path.parent.mkdir()


def without_permissions(path: Path, raw: Path, chance: random.Random) -> None:
    path.chmod(0)


def clutter(path: Path, raw: Path, chance: random.Random) -> None:
    for name in (".DS_Store", "Thumbs.db", f"._{path.name}", "__MACOSX"):
        place = path.with_name(name)
        if name == "__MACOSX":
            place.mkdir(exist_ok=True)
            place /= f"._{path.name}"
        if not os.path.lexists(place):
            place.write_bytes(b"\0\5\x16\7")


MUTATIONS = (
    truncated, overwritten, overwritten_in_the_header, inserted, cut, emptied, deleted, text_under_its_name,
    content_of_another_file, renamed, renamed, renamed, copied_under_a_strange_name, copied_under_a_strange_name, folder_renamed,
    link_to_itself, link_to_nothing, link_to_another_file, loop_of_folders, pipe, listening_socket, folder_under_its_name,
    file_in_place_of_its_folder, folder_emptied, without_permissions, clutter,
)  # fmt: skip
