"""Source pictures as web forms and cameras write them: `data:` URIs with parameters, damaged EXIF blocks."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from sfumato.errors import InvalidPicture
from sfumato.pictures import images
from sfumato.settings import Settings

BOUNDS = images.Bounds.of(Settings())


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "data:image/png;name=my%20cat.png;base64,",
        'data:image/png;filename="a cat.png";charset=utf-8;BASE64,',
        "data:image/png; base64, ",
        "data:image/*;base64,",
        "data:;base64,",
    ],
)
def test_parameters_of_a_data_uri_are_passed_over(head: str) -> None:
    assert images.from_text(head + base64.b64encode(b"a file").decode(), "image") == b"a file"


@pytest.mark.parametrize("head", ["data:image/png,", "data:image/png;name=cat.png,", "data:image/png;base64;x,"])
def test_one_that_is_not_base64_is_refused(head: str) -> None:
    with pytest.raises(InvalidPicture, match="must be base64"):
        images.from_text(f"{head}abcd", "image")


@pytest.mark.parametrize("part", [";", ";base64", ";a=b", "a"])
def test_a_long_head_is_refused_in_linear_time(part: str) -> None:
    """In quadratic time it would take many minutes."""
    with pytest.raises(InvalidPicture, match="neither base64"):
        images.from_text("data:" + part * 300_000, "image")


@pytest.mark.parametrize("block", [b"junk", b"not a header of a TIFF file"])
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_damaged_exif_block_turns_nothing(format: str, block: bytes) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 48), "red").save(file, format, exif=b"" if format == "PNG" else block)
    data = file.getvalue()
    if format == "PNG":  # Pillow writes none that is empty
        chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
        data = data[:33] + chunk + data[33:]
    png, size = images.normalise(data, "image", BOUNDS)
    assert size == images.size(png) == (32, 48)


def test_a_whole_one_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (32, 48), "red").save(file, "PNG", exif=exif)
    _, size = images.normalise(file.getvalue(), "image", BOUNDS)
    assert size == (48, 32)
