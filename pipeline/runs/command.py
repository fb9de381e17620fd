"""Run a command: report user mistakes in one line with exit code 2, and handle signals."""

import errno
import os
import re
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from maskloom.pipeline.errors import MaskLoomError, SeveralMistakes, one_line, without_secrets
from maskloom.pipeline.runs.interruption import Interrupted, handled_signals

EXIT_CODE = 2
REPORTED = "MASKLOOM_REPORTED"
"""Environment variable with the folder in which the processes of one launch note printed errors."""
DISK_REMEDY = "free space or fix the permissions, then run the same command again"
PATH_ERRORS = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENOTEMPTY})
PATH_REMEDY = "something else has this name, or none can have it; give another path"
MEMORY_ADVICE = (
    "lower train.train_batch_size, generate.batch_size or data.image_size, or give the job more memory "
    "(maskloom plan says what a training needs)"
)
OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|Cannot allocate memory|_ALLOC_FAILED|DefaultCPUAllocator"
    r"|Storage size calculation overflowed|numel: integer multiplication overflow|invalid buffer size",
    re.IGNORECASE,
)
SHOWN = 200  # characters that are shown of a library's message


def exit_with(*errors: object) -> NoReturn:
    """Print errors to stderr, one per line, and exit with code 2."""
    for error in errors:
        text = without_secrets(one_line(error))
        line = f"error: {text}".encode(errors="backslashreplace")  # file names may contain any bytes
        if _is_first_to_report(line):
            print(line.decode(), file=sys.stderr)
    raise SystemExit(EXIT_CODE)


def _is_first_to_report(line: bytes) -> bool:
    """Return whether no other process of the same launch has printed this line."""
    if REPORTED not in os.environ:
        return True
    try:
        Path(os.environ[REPORTED], sha256(line).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # printing twice is better than not at all
        pass
    return True


def run_command(command: Callable[[], object], memory_advice: str = MEMORY_ADVICE) -> None:
    """Run a command-line entry point; report each user mistake as one line, with exit code 2.

    A full disk, missing permissions and lack of memory are reported in the same way. SIGTERM and
    Ctrl-C end the command with one line and the exit code of the signal.

    Args:
        command: the entry point.
        memory_advice: what to change if memory runs out.
    """
    try:
        with handled_signals():
            _run_and_clean_up(command)
    except Interrupted as stop:
        if (line := stop.line()) and os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except SeveralMistakes as error:
        exit_with(*error.mistakes)
    except MaskLoomError as error:
        exit_with(error)
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            exit_with(error)
        where = f"{str(error.filename)[:SHOWN]}: " if error.filename else ""
        remedy = PATH_REMEDY if error.errno in PATH_ERRORS else DISK_REMEDY
        exit_with(f"{where}{error.strerror}; {remedy}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with(f"out of memory ({one_line(error)[:SHOWN] or type(error).__name__}); {memory_advice}")


def _run_and_clean_up(command: Callable[[], object]) -> None:
    """Run a command, which may end with `SystemExit`; leave the process group if it succeeds."""
    try:
        command()
    except SystemExit as end:
        if not end.code:
            leave_process_group()
        raise
    leave_process_group()


def leave_process_group() -> None:
    """Destroy the process group of torch.distributed, if there is one.

    Otherwise its threads may still run when the interpreter exits, which can abort a process that
    has finished its work.
    """
    distributed = sys.modules.get("torch.distributed")  # not imported here: most commands need no torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that the device or the machine is out of memory."""
    named = {kind.__name__ for kind in type(error).__mro__} & {"MemoryError", "OutOfMemoryError"}
    return bool(named) or (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error))))
