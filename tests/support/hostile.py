"""Pictures that cost whoever decodes them far more than whoever sends them."""

from __future__ import annotations

import io
import struct

from PIL import Image

START_OF_SCAN, END = 0xDA, 0xD9


def many_scans(side: int = 4096, scans: int = 1500) -> bytes:
    """A grey progressive JPEG of some hundred kilobytes whose last scan comes so many times: each visits all blocks."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True, quality=50)
    segments = _segments(file.getvalue())
    last = max(index for index, (marker, _) in enumerate(segments) if marker == START_OF_SCAN)
    again = b"".join(data for _, data in segments[last - 1 : last + 1])  # with its Huffman table
    before = b"".join(data for _, data in segments[: last + 1])
    return b"\xff\xd8" + before + again * scans + b"\xff\xd9"


def _segments(jpeg: bytes) -> list[tuple[int, bytes]]:
    """Marker and bytes of each, a scan with its data, without the start and the end of the image."""
    found = []
    at = 2
    while jpeg[at + 1] != END:
        marker = jpeg[at + 1]
        (length,) = struct.unpack(">H", jpeg[at + 2 : at + 4])
        end = at + 2 + length
        if marker == START_OF_SCAN:
            while jpeg[end] != 0xFF or jpeg[end + 1] == 0 or 0xD0 <= jpeg[end + 1] <= 0xD7:
                end += 1
        found.append((marker, jpeg[at:end]))
        at = end
    return found
