"""Source pictures and masks as AUTOMATIC1111 fits them to the size that is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageFilter, ImageOps

from sfumato.pictures import images


@dataclass(frozen=True, slots=True)
class Fitting:
    """What its requests say beside the pictures."""

    size: tuple[int, int] | None = None
    """Pixels; None: the first picture's."""
    crop: bool = False
    """Keep the proportions and crop what is over; else stretch."""
    blur: float = 0.0
    """Radius of the Gaussian that softens the mask's edge, in pixels."""
    invert: bool = False
    """Black is redrawn."""


def fitted(png: bytes, size: tuple[int, int], crop: bool) -> bytes:
    """A picture that went through `normalise`, at this size."""
    image = images.decoded(png)
    if image.size == size:
        return png
    return images.png(_fitted(image, size, crop))


def mask(png: bytes, size: tuple[int, int], how: Fitting) -> bytes:
    """A mask that went through `normalise`, as L at this size: white where the picture is redrawn."""
    image = _white_where_opaque(images.decoded(png))
    if how.invert:
        image = ImageOps.invert(image)
    if how.blur:
        image = image.filter(ImageFilter.GaussianBlur(how.blur))
    return images.png(_fitted(image, size, how.crop))


def _white_where_opaque(image: Image.Image) -> Image.Image:
    """White where it is opaque, if something of it is not; else where it is light.

    An alpha channel means the reverse of what OpenAI's masks mean by it.
    """
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        return image.getchannel("A").point([0] * 129 + [255] * 127)
    return image.convert("L")


def _fitted(image: Image.Image, size: tuple[int, int], crop: bool) -> Image.Image:
    if image.size == size:
        return image
    if crop:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)
