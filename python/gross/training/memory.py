"""The C library's allocator, told to keep what is freed."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> bool:
    """Have the C library reuse freed memory instead of giving it back to the system, for the rest
    of the process. Returns whether it does; only glibc can be told.

    By default blocks beyond 32 MB come in fresh pages every time, which the system must clear:
    training the 4-layer network on batches of 256 images then takes twice as long on a CPU."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # M_MMAP_MAX = 0: no block is mapped on its own; M_TRIM_THRESHOLD = -1: the heap never shrinks.
    return bool(mallopt(-4, 0) == 1 and mallopt(-1, -1) == 1)
