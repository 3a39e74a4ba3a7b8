"""Frames on the pipes of a decoder: a JSON object and a blob of bytes, each preceded by its length.

Not pickle: the answers come from a process that has read hostile bytes.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, BinaryIO

_LENGTHS = struct.Struct("!IQ")

CHUNK = 2**20
"""Bytes copied at a time."""


def write(file: BinaryIO, message: dict[str, Any], blob: bytes | memoryview) -> None:
    head = json.dumps(message).encode()
    file.write(_LENGTHS.pack(len(head), len(blob)) + head)
    file.write(blob)
    file.flush()


def read(file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """The next frame; blocks. Raises EOFError if the other side is gone."""
    head, blob = _LENGTHS.unpack(_exactly(file, _LENGTHS.size))
    return json.loads(_exactly(file, head)), _exactly(file, blob)


async def send(writer: asyncio.StreamWriter, message: dict[str, Any], blob: bytes) -> None:
    """Send in chunks, so that no second copy of a large picture is buffered."""
    head = json.dumps(message).encode()
    writer.write(_LENGTHS.pack(len(head), len(blob)) + head)
    view = memoryview(blob)
    for start in range(0, len(blob), CHUNK):
        writer.write(view[start : start + CHUNK])
        await writer.drain()
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next frame. Raises asyncio.IncompleteReadError if the other side is gone."""
    head, blob = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
    return json.loads(await reader.readexactly(head)), await reader.readexactly(blob)


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError("the other process closed the pipe")
    return data
