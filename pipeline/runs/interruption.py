"""Handle SIGTERM (SLURM preemption, `kill`) and Ctrl-C.

The process prints one line, ends with the exit code of the signal, and leaves no process running. A
command ends at once: finished work is on disk, and no file is half-written. A training first
finishes its optimizer step and saves a checkpoint; the runner forwards the signal to its stage. A
second signal ends the process immediately.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A signal may arrive up to three times: from the terminal or SLURM, and from a launcher that it has
# ended. Within this time it counts once.
REPEATED_SECONDS = 1.0
LATER_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LAUNCHED = "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"  # environment variables that a launcher sets
REMEDY = "run the same command again to continue"


class Interrupted(BaseException):
    """Ends a command that a signal asked to stop."""

    def __init__(self, number: int, message: str | None = REMEDY) -> None:
        """Store the signal.

        Args:
            number: number of the signal.
            message: what the user should do; None if another process has reported the signal.
        """
        super().__init__(number, message)
        self.number, self.message = number, message

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as in shells."""
        return 128 + self.number

    def line(self) -> str | None:
        """Return the line to print, or None if another process has printed it."""
        return None if self.message is None else f"stopped by {signal.Signals(self.number).name}; {self.message}"


@dataclass
class _State:
    """State of the signal handlers of this process.

    Attributes:
        owner: id of the process that installed the handlers; a forked worker inherits them.
        number: number of the first signal received.
        time: when it was received.
        action: what is called with its number; None: the command ends.
    """

    owner: int = 0
    number: int | None = None
    time: float = 0.0
    action: Callable[[int], None] | None = None


_STATE = _State()


@contextmanager
def handled_signals() -> Iterator[None]:
    """Handle SIGTERM and SIGINT during the block, which is a whole command.

    Does nothing outside the main thread.

    Raises:
        Interrupted: a signal was received.
    """
    if threading.current_thread() is not threading.main_thread() or _STATE.owner == os.getpid():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _STATE.__init__(os.getpid())  # type: ignore[misc]
    if any(name in os.environ for name in LAUNCHED):
        end_with_parent()
    try:
        _mask_ctrl_c(signal.SIG_UNBLOCK)
        yield
    finally:
        _STATE.__init__()  # type: ignore[misc]
        for number, handler in before.items():
            signal.signal(number, handler)


def hold_ctrl_c() -> None:
    """Block Ctrl-C until `handled_signals` unblocks it.

    Otherwise a stage that is still importing would end with a traceback.
    """
    _mask_ctrl_c(signal.SIG_BLOCK)


def _mask_ctrl_c(how: int) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(how, [signal.SIGINT])


@contextmanager
def signals_to(action: Callable[[int], None]) -> Iterator[None]:
    """Call `action` with the first signal during the block instead of ending the command at once.

    The block may poll `received`.

    Raises:
        Interrupted: after the block, if a signal was received and the block did not raise.
    """
    before, _STATE.action = _STATE.action, action
    try:
        yield
    finally:
        _STATE.action = before
    if _STATE.number is not None:
        raise Interrupted(_STATE.number)


def received() -> int | None:
    """Return the number of the signal that asked this process to stop, or None."""
    return _STATE.number


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _STATE.owner:
        if number != signal.SIGINT:  # a forked worker leaves Ctrl-C to its parent
            os._exit(128 + number)
        return
    if _STATE.number is not None:
        if time.monotonic() - _STATE.time >= REPEATED_SECONDS:
            end_children()
            os._exit(128 + number)
        return
    _STATE.number, _STATE.time = number, time.monotonic()
    if _STATE.action is not None:
        _STATE.action(number)
        return
    end_children()
    threading.Thread(target=_end_later_children, daemon=True).start()
    raise Interrupted(number)


def _end_later_children() -> None:
    """Kill what other threads still start until the command has ended: it would wait for them."""
    while _STATE.number is not None:
        time.sleep(LATER_SECONDS)
        if _STATE.number is not None:
            end_children()


def outlive_first_signal(worker: int) -> None:
    """Keep a data-loader worker running after the first SIGTERM; a second one ends it.

    SLURM signals every process, and the training still needs the worker to finish its last step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def end_children() -> None:
    """Kill all child processes, recursively; their files are written atomically."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in child.cmdline()):  # cleans up and ends by itself
                child.kill()
        except psutil.NoSuchProcess:
            pass


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent is killed.

    Otherwise the same command, run again, would find this process still at work.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
