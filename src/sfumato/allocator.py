"""Return large memory blocks to the system when they are freed.

By default glibc raises its mmap threshold over time, up to 32 MiB, and keeps smaller blocks: after a few large bodies
and pictures a process stays hundreds of megabytes larger for good. A threshold that is set explicitly does not move.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LARGE = 2**18
"""Bytes."""
USUAL = 2**25
"""Bytes. Where glibc's own threshold ends up in a process that computes with tensors, which is faster there."""


def return_large_blocks() -> None:
    """Fix this process's malloc thresholds from now on. Does nothing with a C library other than glibc."""
    _set_thresholds(LARGE, LARGE)


@contextmanager
def separate_large_blocks() -> Iterator[None]:
    """What is allocated inside, in any thread, is returned when it is freed: for weights, which stay for long."""
    _set_thresholds(LARGE, LARGE)
    try:
        yield
    finally:
        _set_thresholds(USUAL, 2 * USUAL)


def _set_thresholds(mmap: int, trim: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, mmap)
        mallopt(M_TRIM_THRESHOLD, trim)


def trim() -> None:
    """Return to the system what is free, after much was freed. Does nothing with a C library other than glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
