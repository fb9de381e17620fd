"""Memory that was freed, given back to the system.

The C library of Linux keeps freed memory for itself, and spreads it over an arena for each thread:
a long process would grow although it holds no more.
"""

import ctypes
import sys


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where its C library can (glibc: `malloc_trim`)."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
