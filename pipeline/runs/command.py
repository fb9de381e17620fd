"""How a command ends: normally, with a line and exit code 2 for a user's mistake, or with the exit code of a signal."""

import errno
import os
import re
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

from maskloom.pipeline.errors import MaskLoomError, one_line, without_secrets
from maskloom.pipeline.runs.interruption import Interrupted, handled_signals

EXIT_CODE = 2
REPORTED = "MASKLOOM_REPORTED"
"""Variable that names the folder in which processes that were launched together note the errors that are printed."""
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
SHOWN = 200  # characters of a message that is not this program's


def exit_with(*errors: object) -> NoReturn:
    """Print errors to stderr, each on a line of its own, and leave with exit code 2."""
    for error in errors:
        text = without_secrets(one_line(error))
        line = f"error: {text}".encode(errors="backslashreplace")  # names of files may hold any bytes
        if _is_first_to_report(line):
            print(line.decode(), file=sys.stderr)
    raise SystemExit(EXIT_CODE)


def _is_first_to_report(line: bytes) -> bool:
    """Whether no other process of the same launch has printed this line."""
    if REPORTED not in os.environ:
        return True
    try:
        Path(os.environ[REPORTED], sha256(line).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # twice is better than never
        pass
    return True


def run_command(command: Callable[[], object], memory_advice: str = MEMORY_ADVICE) -> None:
    """Run a command line entry point; a user's mistake becomes one line and exit code 2.

    A full disk, a missing permission and a full memory are the user's to solve as well, so they are reported in the same way. SIGTERM and Ctrl-C
    end the command with a line and the exit code of the signal.

    Args:
        command: the entry point.
        memory_advice: what to change where memory runs out.
    """
    try:
        with handled_signals():
            _run_to_the_end(command)
    except Interrupted as stop:
        if (line := stop.line()) and os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except MaskLoomError as error:
        exit_with(error)
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            exit_with(error)
        where = f"{str(error.filename)[:SHOWN]}: " if error.filename else ""
        remedy = PATH_REMEDY if error.errno in PATH_ERRORS else DISK_REMEDY
        exit_with(f"{where}{error.strerror}; {remedy}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        exit_with(f"out of memory ({one_line(error)[:SHOWN] or type(error).__name__}); {memory_advice}")


def _run_to_the_end(command: Callable[[], object]) -> None:
    """Run a command; when it has succeeded, leave the process group (a command line ends with `SystemExit`)."""
    try:
        command()
    except SystemExit as end:
        if not end.code:
            leave_process_group()
        raise
    leave_process_group()


def leave_process_group() -> None:
    """End the communication with the other processes of a training, if there are any.

    Without it, threads of torch.distributed may still run when the interpreter ends, which can abort a process whose work is done.
    """
    distributed = sys.modules.get("torch.distributed")  # never imported here: most commands need no torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the device or of the machine; torch has several ways to say it."""
    named = {kind.__name__ for kind in type(error).__mro__} & {"MemoryError", "OutOfMemoryError"}
    return bool(named) or (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error))))
