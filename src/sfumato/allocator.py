"""Large blocks go back to the system when they are freed.

glibc raises its threshold for them as it goes, up to 32 MiB, and keeps what is below: after a few large bodies and
pictures a process is hundreds of megabytes larger for ever. A threshold that is set stays.
"""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
LARGE = 2**18
"""Bytes."""


def give_back_large_blocks() -> None:
    """Of this process, from now on. Does nothing where the C library is another."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, LARGE)
