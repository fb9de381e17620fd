"""Memory that was freed, given back to the system.

The C library of Linux keeps freed memory for itself, and spreads it over an arena for each thread:
a long process would grow although it holds no more.
"""

import ctypes
import sys

M_MMAP_THRESHOLD = -3  # of `mallopt`
LARGE = 12 << 20
"""Bytes of an array from which it goes back to the system as soon as it is freed; glibc raises its own limit to 32 MiB."""


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, now and as soon as a large array is freed.

    Only where the C library can: glibc, with `malloc_trim` and `mallopt`. PyArrow, which reads rows, keeps its own.
    """
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE)
        library.malloc_trim(0)
