"""Fit source pictures and masks to the requested size, as AUTOMATIC1111 does."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageFilter, ImageOps

from sfumato.pictures import images


@dataclass(frozen=True, slots=True)
class Fitting:
    """Parameters of its requests besides the pictures."""

    size: tuple[int, int] | None = None
    """In pixels; None: the first picture's size."""
    crop: bool = False
    """Keep the aspect ratio and crop the excess; else stretch."""
    blur: float = 0.0
    """Radius of the Gaussian that softens the mask's edge, in pixels."""
    invert: bool = False
    """Redraw the black area instead of the white one."""


def near(side: int, multiple: int) -> int:
    """The multiple next to a side, at least one."""
    return max(multiple, round(side / multiple) * multiple)


def of_source(source: tuple[int, int], own: tuple[int | None, int | None], multiple: int) -> tuple[int, int]:
    """The size of a clip that says none, with the shape of its source: at most of the area of the model's own size, as
    it costs that many times over. Sides are in pixels; None or 0: the model has no size of its own."""
    width, height = source
    if own[0] and own[1]:
        scale = min(1.0, math.sqrt(own[0] * own[1] / (width * height)))
        width, height = round(width * scale), round(height * scale)
    return near(width, multiple), near(height, multiple)


def fitted(png: bytes, size: tuple[int, int], crop: bool) -> bytes:
    """Fit a picture from `normalise` to this size."""
    image = images.decoded(png)
    if image.size == size:
        return png
    return images.png(_resized(image, size, crop))


def mask(png: bytes, size: tuple[int, int], fitting: Fitting) -> bytes:
    """A mask from `normalise` in mode L at this size: white is redrawn."""
    image = _white_where_opaque(images.decoded(png))
    if fitting.invert:
        image = ImageOps.invert(image)
    if fitting.blur:
        image = image.filter(ImageFilter.GaussianBlur(fitting.blur))
    return images.png(_resized(image, size, fitting.crop))


def _white_where_opaque(image: Image.Image) -> Image.Image:
    """White where the mask is opaque, if any part is transparent; else where it is light.

    An alpha channel means the opposite of OpenAI's masks.
    """
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        return image.getchannel("A").point([0] * 129 + [255] * 127)
    return image.convert("L")


def _resized(image: Image.Image, size: tuple[int, int], crop: bool) -> Image.Image:
    if image.size == size:
        return image
    if crop:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)
