"""Errors that a user can act on.

Everything a user can get wrong raises a `MaskLoomError`: one line that says what is wrong, where, and what to do.
The command line (`pipeline.runs.command`) prints that line and exits with code 2; anything else is a bug and keeps its traceback.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

SHOWN = 200  # characters of a message that is not this program's
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"]+@")  # as in the address of a mirror, https://USER:PASSWORD@HOST
# The addresses of uploads and downloads are credentials for a while.
SIGNED_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]*")


class MaskLoomError(Exception):
    """A mistake in the user's input, configuration or environment, told in one line."""


class RejectedSample(Exception):
    """One raw sample cannot be used; it goes to `rejected.jsonl` with this reason and the work continues."""


def one_line(text: object) -> str:
    """Return `text` with all runs of white space (line breaks too) folded into single spaces."""
    return " ".join(str(text).split())


def without_secrets(text: str) -> str:
    """Return text without what looks like a token, names and passwords in addresses, and the signatures of addresses: logs are passed on."""
    return SIGNED_QUERY.sub(r"\1", CREDENTIALS.sub("", TOKEN.sub("<token>", text)))


def excerpt(text: object) -> str:
    """Return a message that is not this program's as one line: whole if it is short, else as many whole sentences of it as are."""
    whole, taken = one_line(text), ""
    if len(whole) <= SHOWN:
        return whole
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", str(text).strip()):
        longer = one_line(f"{taken} {sentence}")
        if len(longer) > SHOWN:
            break
        taken = longer
    return taken or f"{whole[:SHOWN].rpartition(' ')[0] or whole[:SHOWN]} …"


def nearest_name(unknown: str, known: list[str]) -> str:
    """Return a sentence that names the nearest known name, if one is near, and all known names."""
    near = get_close_matches(unknown, known, n=1, cutoff=0.5)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    return f"{suggestion}known: {', '.join(sorted(known)) or 'none'}"


@contextmanager
def told_when_unwritable(path: Path) -> Iterator[None]:
    """Turn any failure of the block, which must do nothing but write `path`, into a line about the disk.

    torch and safetensors do not raise `OSError` when a disk is full, but errors of their own.

    Raises:
        MaskLoomError: the block failed.
    """
    try:
        yield
    except Exception as error:
        raise MaskLoomError(
            f"{path}: could not be written ({excerpt(error)}); free space or fix the permissions, "
            "then run the same command again: finished work is kept"
        ) from error
