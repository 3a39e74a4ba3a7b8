"""Decode callers' pictures: from base64, a `data:` URI or a file to an upright RGB or RGBA PNG.

Nothing is trusted: the header is read before pixels are decoded, and anything that cannot be decoded is refused
with the reason. Untrusted pictures are opened only in `open_untrusted`, which the server calls only in the processes
of `decoder_pool`: they can be killed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from sfumato.errors import InvalidPicture
from sfumato.settings import Settings

MIN_SIDE: Final = 8
"""In pixels. Smaller pictures are less than one latent of most autoencoders."""

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")
"""Formats to decode. Some of Pillow's others start programs (EPS) or take quadratic time (TIFF)."""

ANIMATED: Final = ("PNG", "WEBP", "GIF", "AVIF")
"""Formats where several frames are an animation; phones put a second picture into a JPEG."""

REDUCING_GAP: Final = 1.5
"""Before strong downscaling, pictures are box-averaged to this many times the new size, which is much faster."""

_DATA_URI = re.compile(r"data:[\w.+*-]*(?:/[\w.+*-]+)?(?:;[^;,]*+)*?(?P<base64>;\s*base64\s*)?,", re.IGNORECASE)
"""Its type is not read, and neither are its parameters, such as `;name=my%20cat.jpg` of web forms."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Size limits for a source picture, and the size it is scaled down to."""

    pixels: int
    """Maximum number of pixels to decode."""
    aspect: int
    """Maximum ratio of the longer side to the shorter one."""
    kept_pixels: int
    kept_side: int
    """Larger pictures are scaled down to this longer side, as nothing larger is drawn."""

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        return cls(settings.max_source_pixels, settings.max_aspect, settings.max_pixels, settings.max_side)


def from_text(text: str, param: str) -> bytes:
    """Bytes of bare base64 (line breaks allowed, as `base64 FILE` prints it) or of a `data:` URI."""
    body = text.strip()
    if match := _DATA_URI.match(body):
        if not match["base64"]:
            raise InvalidPicture(f"{param}: a data: URI must be base64, 'data:image/png;base64,...'", param=param)
        body = body[match.end() :]
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidPicture(
            f"{param}: {_shorten(text)} is neither base64, a data: URI nor an http(s) URL", param=param
        ) from None


@contextmanager
def open_untrusted(
    data: bytes, param: str, what: str = "picture", formats: Sequence[str] = FORMATS
) -> Iterator[Image.Image]:
    """Open an untrusted picture and read its header. Errors of its decoder become InvalidPicture.

    `what`, `formats`: what is needed and its formats, for the errors.
    """
    with decoder_errors(param, what):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            start = data[:12].decode("latin-1")
            raise InvalidPicture(
                f"{param}: not a {what} in a known format ({', '.join(formats)}): it starts with {start!r}",
                param=param,
            ) from None
        with image:
            yield image


@contextmanager
def decoder_errors(param: str, what: str) -> Iterator[None]:
    """Errors of the decoder of a picture, clip or sound become InvalidPicture."""
    try:
        yield
    except InvalidPicture:
        raise
    except MemoryError:
        raise InvalidPicture(f"{param}: decoding the {what} takes too much memory", param=param) from None
    except Exception as error:  # decoders may raise anything
        raise InvalidPicture(f"{param}: the {what} is damaged ({error or type(error).__name__})", param=param) from None


def read_size(data: bytes, param: str, bounds: Bounds) -> tuple[int, int]:
    """Width and height from the header. Raises InvalidPicture if the picture is refused."""
    with open_untrusted(data, param) as image:
        _check(image, param, bounds)
        return image.size


def normalise(data: bytes, param: str, bounds: Bounds) -> tuple[bytes, tuple[int, int]]:
    """The picture upright (EXIF), in RGB or RGBA, as PNG, and its size before scaling down to `bounds`.

    Raises InvalidPicture with the reason.
    """
    with open_untrusted(data, param) as image:
        _check(image, param, bounds)
        image.load()
        upright = _upright(image)
        if upright.mode.startswith("I"):  # 16 bits; a plain conversion would clip all but the darkest levels to white
            upright = upright.point(lambda level: level / 256).convert("L")
        elif upright.mode == "F":
            raise InvalidPicture(
                f"{param}: floating-point pixels are not supported; send 8 or 16 bits per channel", param=param
            )
        original_size = upright.size
        upright = _scaled_down(upright.convert("RGBA" if _transparent(upright) else "RGB"), bounds)
    return png(upright), original_size


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF block says; a damaged block says nothing, as in browsers."""
    try:
        image.getexif()
    except (SyntaxError, ValueError, struct.error):
        return image
    return ImageOps.exif_transpose(image)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def decoded(png: bytes) -> Image.Image:
    """The pixels of a picture from `normalise`."""
    image = Image.open(io.BytesIO(png), formats=("PNG",))
    image.load()
    return image


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels of a picture from `normalise`."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return image.size


def fingerprint(png: bytes) -> str:
    """SHA-256 over mode, size and pixels: independent of how the picture was compressed."""
    image = decoded(png)
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def as_mask(png_data: bytes) -> bytes:
    """A mask in mode L, white where the picture is redrawn: where it is transparent, else where it is light.

    Raises InvalidPicture if that is nowhere.
    """
    image = decoded(png_data)
    mask = ImageOps.invert(image.getchannel("A")) if image.mode == "RGBA" else image.convert("L")
    if image.mode == "RGBA" and mask.getextrema() == (0, 0):  # drawn in black and white on an opaque layer
        mask = image.convert("L")
    if mask.getextrema() == (0, 0):
        raise InvalidPicture(
            "mask: no part is transparent or light, so nothing would be redrawn. "
            "Make the area to redraw transparent, or leave the mask out to redraw everything.",
            param="mask",
        )
    return png(mask)


def alpha_mask(png_data: bytes) -> bytes | None:
    """A mask in mode L of a picture from `normalise`: white where it is fully transparent; None if that is nowhere."""
    image = decoded(png_data)
    if image.mode != "RGBA" or image.getchannel("A").getextrema()[0] != 0:
        return None
    return png(image.getchannel("A").point([255] + [0] * 255))


def check_size(size: tuple[int, int], param: str, bounds: Bounds) -> None:
    """Raises InvalidPicture for a picture of this width and height that is not decoded."""
    width, height = size
    if width * height > bounds.pixels:
        raise InvalidPicture(
            f"{param}: the picture is {width}x{height}; at most {bounds.pixels} pixels are accepted "
            "(the setting max_source_pixels). Scale it down.",
            param=param,
        )
    if min(width, height) < MIN_SIDE:
        raise InvalidPicture(
            f"{param}: the picture is {width}x{height}; each side needs at least {MIN_SIDE} pixels", param=param
        )
    if max(width, height) > bounds.aspect * min(width, height):
        raise InvalidPicture(
            f"{param}: the picture is {width}x{height}; no side may be longer than {bounds.aspect} times the other "
            "(the setting max_aspect). Crop it.",
            param=param,
        )


def _check(image: Image.Image, param: str, bounds: Bounds) -> None:
    check_size(image.size, param, bounds)
    # Frames are not counted: in a TIFF that takes quadratic time.
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        raise InvalidPicture(f"{param}: the picture is animated. Send one frame.", param=param)


def _scaled_down(image: Image.Image, bounds: Bounds) -> Image.Image:
    scale = min(1.0, math.sqrt(bounds.kept_pixels / (image.width * image.height)), bounds.kept_side / max(image.size))
    if scale == 1.0:
        return image
    width, height = (max(MIN_SIDE, int(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)


def _transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def on_white(image: Image.Image) -> Image.Image:
    """Convert to RGB on white, as a browser shows it on a white page."""
    if image.mode == "RGBA":
        background = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(background, image).convert("RGB")
    return image.convert("RGB")
