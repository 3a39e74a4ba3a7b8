"""Containers that PyAV reads (the extra `video`): its errors become ValueError here."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from sfumato.errors import InvalidPicture
from sfumato.formats import FORMATS
from sfumato.pictures.images import decoder_errors

SUFFIXES = tuple(f".{each.name}" for each in FORMATS.values() if each.package)
"""Of their files."""


@contextmanager
def opened(file: BinaryIO, format: str | None = None) -> Iterator[Any]:
    """PyAV's container for reading. `format`: FFmpeg's name of the only demuxer that is tried; None: any.

    Raises ImportError without PyAV, and ValueError for a damaged file, also inside.
    """
    import av

    try:
        # Tags in older encodings, as cameras and MP3 players write them, are no damage.
        with av.open(file, format=format, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise ValueError(error.strerror or str(error)) from None


@contextmanager
def open_untrusted(data: bytes, format: str, param: str, what: str) -> Iterator[Any]:
    """The same of a caller's file, only in the processes of `decoder_pool`. Errors become InvalidPicture."""
    with decoder_errors(param, what), opened(io.BytesIO(data), format) as container:
        yield container


def codec_of(stream: Any, codecs: Sequence[str], param: str) -> Any:
    """The decoder of a stream. Raises InvalidPicture unless it is one of these."""
    codec = stream.codec_context  # None: FFmpeg does not know the codec
    if codec is None or codec.name not in codecs:
        name = codec.name if codec else "in it"
        raise InvalidPicture(f"{param}: the codec {name} is not read; {', '.join(codecs)} are", param=param)
    return codec
