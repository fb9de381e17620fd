"""Processes that benchmarks watch: their memory together, and their end."""

from __future__ import annotations

import subprocess

import psutil


def resident_memory(pid: int) -> int:
    """Return the resident memory of a process and all its descendants, in bytes; 0 once it has ended."""
    total = 0
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in processes:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total


def kill_process_tree(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a process and all its descendants, as if the machine went down."""
    parent = psutil.Process(process.pid)
    processes = [parent, *parent.children(recursive=True)]
    for member in processes:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes)
    process.wait()
