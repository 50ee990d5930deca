"""The C library's heap, in processes that make large arrays in many threads."""

import ctypes
import os
import sys

# Option of glibc's malloc.h, its variable, value: one heap, for arrays below 128 MiB (a window's have 50); 512 MiB that
# are free at its end are kept.
_OPTIONS = (
    (-8, "MALLOC_ARENA_MAX", 1),
    (-3, "MALLOC_MMAP_THRESHOLD_", 1 << 27),
    (-1, "MALLOC_TRIM_THRESHOLD_", 1 << 29),
)


def share_heap() -> None:
    """Let the threads that begin from here on, and all of processes that this one starts, share one heap.

    A heap per thread keeps each one's largest arrays, and memory that goes back to the system is mapped again page by
    page. Ten photographs to 2.5 MP each on one core: 3.0 GiB and 7.6 s of the kernel, with one heap 1.5 to 1.6 GiB and
    2.1 to 3.5 s; on two cores, where more are in flight, 2.7 to 3.1 and 1.9 to 2.5 GiB. Bicubic of one to 123 MP took
    66 s and takes 31. Variables that are set already stand. Without glibc it does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, name, value in _OPTIONS:
        if mallopt is not None and name not in os.environ:
            mallopt(option, value)
            os.environ[name] = str(value)
