"""Pictures that callers send: from base64, a `data:` URI or a URL to an upright RGB or RGBA PNG.

Nothing is trusted: size is read before pixels are decoded, and what cannot be decoded is refused
with the reason.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from typing import Final

from PIL import Image, ImageOps, UnidentifiedImageError

from sfumato.errors import InvalidPicture

MIN_SIDE: Final = 8
"""Pixels. Smaller than one latent of most autoencoders: nothing could be made of it."""

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")
"""What is decoded. Others of Pillow's start programs (EPS), or take time with the square of the file (TIFF)."""

ANIMATED: Final = ("PNG", "WEBP", "GIF", "AVIF")
"""Those whose frames are an animation; phones put a second one into a JPEG."""

_DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w=-]+)*?(?P<base64>;base64)?,", re.IGNORECASE)


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
            f"{param}: {_shown(text)} is neither base64, a data: URI nor an http(s) URL", param=param
        ) from None


def normalise(data: bytes, param: str, max_pixels: int) -> bytes:
    """The picture upright (EXIF), in RGB or RGBA, as PNG. Raises InvalidPicture that says why not."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidPicture(
                    f"{param}: the picture is {width}x{height}; at most {max_pixels} pixels are taken. Scale it down.",
                    param=param,
                )
            if min(width, height) < MIN_SIDE:
                raise InvalidPicture(
                    f"{param}: the picture is {width}x{height}; each side needs at least {MIN_SIDE} pixels",
                    param=param,
                )
            # Frames are not counted: in a TIFF that takes time with the square of their number.
            if image.format in ANIMATED and getattr(image, "is_animated", False):
                raise InvalidPicture(f"{param}: the picture is animated. Send one frame.", param=param)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except InvalidPicture:
        raise
    except UnidentifiedImageError:
        raise InvalidPicture(
            f"{param}: not a picture in a known format (PNG, JPEG, WebP ...): it starts with {data[:12]!r}",
            param=param,
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like
        raise InvalidPicture(
            f"{param}: the picture is damaged ({error or type(error).__name__})", param=param
        ) from None
    if upright.mode.startswith("I"):  # 16 bits; a plain conversion would clip all but the darkest to white
        upright = upright.point(lambda level: level / 256).convert("L")
    elif upright.mode == "F":
        raise InvalidPicture(f"{param}: its levels are fractions; send 8 or 16 bits for each channel", param=param)
    file = io.BytesIO()
    upright.convert("RGBA" if _transparent(upright) else "RGB").save(file, "PNG", compress_level=1)
    return file.getvalue()


def decoded(png: bytes) -> Image.Image:
    """The pixels of a picture that went through `normalise`."""
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels of a picture that went through `normalise`."""
    with Image.open(io.BytesIO(png)) as image:
        return image.size


def fingerprint(png: bytes) -> str:
    """SHA-256 over mode, size and pixels: the same for the same picture, however it was compressed."""
    image = decoded(png)
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def _transparent(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def as_mask(png: bytes) -> bytes:
    """A mask as L, white where the picture is to be redrawn: where it is transparent, else where it is light.

    Raises InvalidPicture when that is nowhere.
    """
    image = decoded(png)
    mask = ImageOps.invert(image.getchannel("A")) if image.mode == "RGBA" else image.convert("L")
    if image.mode == "RGBA" and mask.getextrema() == (0, 0):  # drawn in black and white on an opaque layer
        mask = image.convert("L")
    if mask.getextrema() == (0, 0):
        raise InvalidPicture(
            "mask: nothing in it is transparent or light, so nothing would be redrawn. "
            "Make the part to redraw transparent, or leave the mask out to redraw all of it.",
            param="mask",
        )
    file = io.BytesIO()
    mask.save(file, "PNG", compress_level=1)
    return file.getvalue()
