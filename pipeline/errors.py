"""Errors that a user can act on.

Every user mistake raises a `MaskLoomError`: one line that says what is wrong, where, and what to
do. The command line (`pipeline.runs.command`) prints that line and exits with code 2. Any other
exception is a bug and keeps its traceback.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

SHOWN = 200  # characters that are shown of a library's message
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
CREDENTIALS = re.compile(r"(?<=://)[^\s/@'\"]+@")  # as in https://USER:PASSWORD@HOST
# The query of a signed upload or download URL grants access for a limited time.
SIGNED_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]*")


class MaskLoomError(Exception):
    """A mistake in the user's input, configuration or environment, described in one line."""


class SeveralMistakes(MaskLoomError):
    """Several mistakes, such as invalid values of one configuration; the command line prints each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        """Store the mistakes, at least one; as text, the error is the first and the number of others."""
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        super().__init__(f"{mistakes[0]}{more}")
        self.mistakes = list(mistakes)


class LeakedImages(MaskLoomError):
    """Images that shape a model are images that measure it, or copies of training images."""

    def __init__(self, found: str, remedy: str, files: str = "") -> None:
        """Store what was found where, what to do, and the raw files of the images; the error states all of it."""
        super().__init__("; ".join(filter(None, (found, files, remedy))))
        self.found, self.remedy, self.files = found, remedy, files


class RejectedSample(Exception):
    """One raw sample cannot be used: it is listed in `rejected.jsonl` with this reason."""


def one_line(text: object) -> str:
    """Return `text` with every run of white space, line breaks included, replaced by one space."""
    return " ".join(str(text).split())


def without_secrets(text: str) -> str:
    """Return text without Hub tokens, and without credentials and signatures in URLs."""
    return SIGNED_QUERY.sub(r"\1", CREDENTIALS.sub("", TOKEN.sub("<token>", text)))


def excerpt(text: object) -> str:
    """Return a library's message as one line; a long one is cut after a sentence."""
    whole, taken = one_line(text), ""
    if len(whole) <= SHOWN:
        return whole
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", str(text).strip()):
        longer = one_line(f"{taken} {sentence}")
        if len(longer) > SHOWN:
            break
        taken = longer
    return taken or f"{whole[:SHOWN].rpartition(' ')[0] or whole[:SHOWN]} …"


def nearest_name(unknown: str, known: list[str], most: int | None = None) -> str:
    """Return a sentence that suggests a similar known name, if there is one, and lists the known ones.

    Args:
        unknown: the name that is not known.
        known: the known names.
        most: of more names than this, only as many of the most similar are listed; None: all are.
    """
    near = get_close_matches(unknown, known, n=1, cutoff=0.5)
    suggestion = f"did you mean {near[0]!r}? " if near else ""
    if most is None or len(known) <= most:
        return f"{suggestion}known: {', '.join(sorted(known)) or 'none'}"
    alike = get_close_matches(unknown, known, n=most, cutoff=0)
    return f"{suggestion}known: {', '.join(alike)} and {len(known) - most} more"


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Report any exception of the block, which must only write `path`, as a failure to write it.

    torch and safetensors raise exceptions of their own, not `OSError`, when a disk is full.

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
