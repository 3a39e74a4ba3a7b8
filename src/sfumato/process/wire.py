"""Messages on the socket between the API process and its worker: an 8-byte length, then a pickle.

Both ends are ours and the socket is an unnamed pair that only they hold, so pickle is safe here. A broken process
may still write garbage: anything that is not a message raises `BadFrame`, and nothing else.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from typing import Any

MAX_BYTES = 2**30
"""Limit of one message. The largest messages carry a request's source pictures or a finished picture."""

_LENGTH = struct.Struct("!Q")


class BadFrame(Exception):
    """The received bytes are not a message, or the object to send does not fit into one."""


def pack(message: object) -> bytes:
    """The encoded message. Raises BadFrame if it cannot be sent."""
    try:
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickling may raise anything
        raise BadFrame(f"a {type(message).__name__} cannot be pickled: {error!r}") from error
    return _LENGTH.pack(_check_length(len(body))) + body


def receive(sock: socket.socket) -> Any:
    """The next message; blocks. Raises EOFError if the other side is gone, BadFrame if the bytes are not a message."""
    (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))
    return _unpack(_receive_exactly(sock, _check_length(length)))


async def receive_async(reader: asyncio.StreamReader) -> Any:
    """Like `receive`. Raises asyncio.IncompleteReadError if the other side is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return _unpack(await reader.readexactly(_check_length(length)))


def _check_length(length: int) -> int:
    if length > MAX_BYTES:
        raise BadFrame(f"a message of {length} bytes; the limit is {MAX_BYTES}")
    return length


def _unpack(body: bytes) -> Any:
    try:
        return pickle.loads(body)
    except Exception as error:  # unpickling garbage can raise nearly anything
        raise BadFrame(f"{len(body)} bytes that are not a message: {error!r}") from error


def _receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(min(size - len(data), 1 << 20))
        if not chunk:
            raise EOFError("the other process closed the connection")
        data += chunk
    return bytes(data)
