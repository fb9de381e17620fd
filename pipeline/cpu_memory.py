"""Memory settings for work that allocates large arrays again and again on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEEP_BYTES = 2**31 - 1
LARGEST_HEAP_BLOCK = 32 << 20  # the largest value that glibc accepts


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next arrays and tensors.

    By default it returns large blocks to the kernel after every image or step, and the next one has
    to map them again page by page. Does nothing on systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
