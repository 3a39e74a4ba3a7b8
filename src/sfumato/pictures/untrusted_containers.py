"""Open callers' clips and sounds with PyAV (the extra `video`); only in the processes of `decoder_pool`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sfumato.errors import InvalidPicture
from sfumato.pictures.images import decoder_errors


@contextmanager
def opened(data: bytes, format: str, param: str, what: str) -> Iterator[Any]:
    """PyAV's container. `format`: FFmpeg's name of the only demuxer that is tried. Errors become InvalidPicture."""
    import av

    # Tags in older encodings, as of cameras and MP3 players, are no reason to refuse a file.
    with decoder_errors(param, what), av.open(io.BytesIO(data), format=format, metadata_errors="replace") as file:
        yield file


def codec_of(stream: Any, codecs: Sequence[str], param: str) -> Any:
    """The decoder of a stream. Raises InvalidPicture unless it is one of these."""
    codec = stream.codec_context  # None: FFmpeg does not know the codec
    if codec is None or codec.name not in codecs:
        name = codec.name if codec else "in it"
        raise InvalidPicture(f"{param}: the codec {name} is not read; {', '.join(codecs)} are", param=param)
    return codec
