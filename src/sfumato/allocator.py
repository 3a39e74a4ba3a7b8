"""Return large memory blocks to the system when they are freed.

By default glibc raises its mmap threshold over time, up to 32 MiB, and keeps smaller blocks: after a few large bodies
and pictures a process stays hundreds of megabytes larger for good. A threshold that is set explicitly does not move.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LARGE = 2**18
"""Bytes."""


def return_large_blocks() -> None:
    """Fix this process's malloc thresholds from now on. Does nothing with a C library other than glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, LARGE)


def trim() -> None:
    """Return to the system what is free, after much was freed. Does nothing with a C library other than glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
