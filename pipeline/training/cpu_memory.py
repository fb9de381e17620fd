"""Memory settings for torch on a CPU."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEEP_BYTES = 2**31 - 1
LARGEST_HEAP_BLOCK = 32 << 20  # the most that glibc accepts


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensors.

    By default it hands large blocks back to the kernel after every step and takes them again, page by page, in the next.
    Does nothing on systems without glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
