"""Pictures that no camera makes: good ones of every format, cut short, bent and blown up."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

SIDE = 48

MAGIC = (
    b"DDS ", b"II*\0", b"MM\0*", b"%!PS-Adobe-3.0 EPSF-3.0", b"\0\0\1\0", b"8BPS", b"SIMPLE  =", b"\x89HDF\r\n\x1a\n",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0 ftypavif", b"\0\0\0 ftypheic", b"RIFF\xff\xff\xff\xffWEBPVP8X", b"GIF89a",
    b"BM", b"P6\n9 9\n255\n", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"icns", b"\x01\xda", b"qoif", b"<svg",
    b"#define x 9",
)  # fmt: skip
"""With which files of Pillow's formats begin."""


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _noise(mode: str = "RGB") -> Image.Image:
    grey = Image.frombytes("L", (SIDE, SIDE), random.Random(SIDE).randbytes(SIDE * SIDE))  # the same in every process
    return Image.merge("RGB", (grey, grey.rotate(90), grey.rotate(180))).convert(mode)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(side: int) -> bytes:
    """So many pixels a side, in a few kilobytes."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packed = zlib.compress(b"\0" * ((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose compressed text is some megabytes."""
    good = _saved(_noise(), "PNG")
    return good[:33] + _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * 2**22, 9)) + good[33:]


def scans(times: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    good = _saved(_noise("L"), "JPEG", progressive=True)
    last = good.rindex(b"\xff\xda")
    return good[:last] + good[last:-2] * times + b"\xff\xd9"


def good() -> dict[str, bytes]:
    """Every format that is read, in its kinds."""
    frames = [_noise(), _noise()]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "png": _saved(_noise(), "PNG"),
        "png rgba": _saved(_noise("RGBA"), "PNG"),
        "png palette": _saved(_noise("P"), "PNG", transparency=0),
        "png 1 bit": _saved(_noise("1"), "PNG"),
        "png 16 bits": _saved(_noise("L").convert("I;16"), "PNG"),
        "png animated": _saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "jpeg": _saved(_noise(), "JPEG", exif=exif),
        "jpeg grey": _saved(_noise("L"), "JPEG"),
        "jpeg cmyk": _saved(_noise("CMYK"), "JPEG"),
        "jpeg progressive": _saved(_noise(), "JPEG", progressive=True),
        "webp": _saved(_noise(), "WEBP"),
        "webp lossless": _saved(_noise("RGBA"), "WEBP", lossless=True, exif=exif.tobytes()),
        "webp animated": _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "gif": _saved(_noise("P"), "GIF"),
        "gif animated": _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": _saved(_noise(), "BMP"),
        "avif": _saved(_noise(), "AVIF", speed=10),
        "tiff": _saved(_noise(), "TIFF"),
        "ico": _saved(_noise(), "ICO"),
        "dds": _saved(_noise("RGBA"), "DDS"),
        "png bomb": png_bomb(6000),
        "text bomb": text_bomb(),
        "jpeg scans": scans(40),
        "empty": b"",
        "text": b"no picture at all",
    }


def _cut(data: bytearray, chance: random.Random) -> bytearray:
    return data[: chance.randrange(len(data) + 1)]


def _flip(data: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.choice((1, 1, 2, 8, 64)) if data else 0):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return data


def _fill(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data) + 1)
    length = chance.choice((1, 2, 4, 8))
    data[start : start + length] = bytes([chance.choice((0, 1, 127, 128, 255))]) * length
    return data


def _repeat(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data) + 1)
    piece = data[start : start + chance.choice((1, 4, 16, 256))]
    data[start:start] = piece * chance.choice((1, 2, 50))
    return data


def _remove(data: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(data) + 1)
    del data[start : start + chance.choice((1, 4, 16, 256))]
    return data


def _head(data: bytearray, chance: random.Random) -> bytearray:
    magic = chance.choice(MAGIC)
    return bytearray(magic) + data[len(magic) :] if chance.random() < 0.5 else bytearray(magic) + data


CHANGES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    _cut,
    _flip,
    _flip,
    _fill,
    _repeat,
    _remove,
    _head,
)


def changed(data: bytes, chance: random.Random) -> bytes:
    """With a few of `CHANGES`, or none."""
    result = bytearray(data)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        result = chance.choice(CHANGES)(result, chance)
    return bytes(result)
