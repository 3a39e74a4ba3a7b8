"""Containers that PyAV reads (the extra `video`): its errors become ValueError here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from sfumato.formats import FORMATS

SUFFIXES = tuple(f".{each.name}" for each in FORMATS.values() if each.package)
"""Of their files."""


@contextmanager
def opened(file: BinaryIO) -> Iterator[Any]:
    """PyAV's container for reading. Raises ImportError without PyAV, and ValueError for a damaged file, also inside."""
    import av

    try:
        with av.open(file) as container:
            yield container
    except av.FFmpegError as error:
        raise ValueError(str(error)) from None
