"""Memory that was freed, given back to the system.

The C library of Linux keeps freed memory for itself, and spreads it over a heap for each thread:
a long process would grow although it holds no more.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of `mallopt`
LARGE = 12 << 20
"""Bytes of an array from which it goes back to the system as soon as it is freed; glibc raises its own limit to 32 MiB."""
KEPT = 64 << 20
"""Freed bytes at the end of the heap that are kept for the next arrays; the system would clear each page anew."""


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, now and as soon as a large array is freed.

    From the first call on, threads that have not allocated anything yet share the heap of the others, which
    would otherwise keep what these cannot use.

    Only where the C library can: glibc, with `malloc_trim` and `mallopt`. PyArrow, which reads rows, keeps its own.
    """
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, KEPT)):
            library.mallopt(option, value)
        library.malloc_trim(0)
