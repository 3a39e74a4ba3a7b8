"""The comment of a WAV file: the chunk ICMT of a list INFO, as the RIFF specification of 1991 has it."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

MAX_LIST = 2**20
"""Bytes of a list that are read: a recipe has some thousands."""

_BEGINS = b"INFOICMT"


def with_comment(wav: bytes, comment: str) -> bytes:
    """A WAV file with a list behind its last chunk."""
    made = wav + _chunk(b"LIST", b"INFO" + _chunk(b"ICMT", comment.encode() + b"\0"))
    return made[:4] + struct.pack("<I", len(made) - 8) + made[8:]


def _chunk(name: bytes, content: bytes) -> bytes:
    """Padded to an even length, which the length does not count."""
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def comment(file: BinaryIO) -> str | None:
    """The comment that `with_comment` wrote; None if there is none. Raises OSError."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    while len(header := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", header)
        if name != b"LIST":
            file.seek(length + length % 2, io.SEEK_CUR)
            continue
        content = file.read(length) if length <= MAX_LIST else b""
        if content.startswith(_BEGINS):
            return content[len(_BEGINS) + 4 :].partition(b"\0")[0].decode(errors="replace")
    return None
