"""SIGTERM (SLURM's preemption, `kill`) and Ctrl-C: one line, the exit code of the signal, nothing left running.

A command that computes ends where it is: finished work is on disk, and no file appears half-written. A training ends its optimizer step and
saves a checkpoint first; a runner hands the signal on to its stage. A second signal ends the process at once.
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
REPEATED_SECONDS = 1.0  # within them a signal counts once: it comes from the terminal, from SLURM and from a launcher that it has ended
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LAUNCHED = "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"  # environment of the processes that a launcher starts
REMEDY = "run the same command again to go on"


class Interrupted(BaseException):
    """Ends a command that was asked to stop; `message` is None where another process has reported it."""

    def __init__(self, number: int, message: str | None = REMEDY) -> None:
        """Keep the number of the signal and what to tell."""
        super().__init__(number, message)
        self.number, self.message = number, message

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells have it."""
        return 128 + self.number

    def line(self) -> str | None:
        """Return the line to print."""
        return None if self.message is None else f"stopped by {signal.Signals(self.number).name}; {self.message}"


@dataclass
class _State:
    """What this process knows of signals.

    Attributes:
        owner: the process whose handlers these are; a forked worker inherits them.
        number: of the first signal that came.
        time: when it came.
        action: what takes it; None ends the command.
    """

    owner: int = 0
    number: int | None = None
    time: float = 0.0
    action: Callable[[int], None] | None = None


_STATE = _State()


@contextmanager
def handled_signals() -> Iterator[None]:
    """Handle both signals in the block, which is a whole command; does nothing outside the main thread.

    Raises:
        Interrupted: one came.
    """
    if threading.current_thread() is not threading.main_thread() or _STATE.owner == os.getpid():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _STATE.__init__(os.getpid())  # type: ignore[misc]
    if any(name in os.environ for name in LAUNCHED):
        end_with_parent()
    try:
        _pass_ctrl_c(signal.SIG_UNBLOCK)
        yield
    finally:
        _STATE.__init__()  # type: ignore[misc]
        for number, handler in before.items():
            signal.signal(number, handler)


def hold_ctrl_c() -> None:
    """Let Ctrl-C wait until `handled_signals` takes it: a stage that is still importing would end with a traceback."""
    _pass_ctrl_c(signal.SIG_BLOCK)


def _pass_ctrl_c(how: int) -> None:
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(how, [signal.SIGINT])


@contextmanager
def signals_to(action: Callable[[int], None]) -> Iterator[None]:
    """Hand the first signal that comes in the block to `action`, instead of ending the command there; the block may ask `received`.

    Raises:
        Interrupted: at the end of the block, where one came and the block did not see it.
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
        _handle_in_worker(number)
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
    raise Interrupted(number)


def _handle_in_worker(number: int) -> None:
    """A forked worker leaves Ctrl-C to the process that it works for."""
    if number != signal.SIGINT:
        os._exit(128 + number)


def outlive_first_signal(worker: int) -> None:
    """Let a worker of a data loader serve the training's last step when SLURM signals every process; a second SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def end_children() -> None:
    """Kill the processes that this one has started, and theirs: what they write appears whole or not at all."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in child.cmdline()):  # ends by itself, after tidying up
                child.kill()
        except psutil.NoSuchProcess:
            pass


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent is killed: the same command, given again, must not meet it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
