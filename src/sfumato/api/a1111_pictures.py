"""Source pictures and masks as AUTOMATIC1111 reads them, as the engine wants them."""

from __future__ import annotations

import io

from PIL import Image, ImageFilter, ImageOps

from sfumato import pictures
from sfumato.api.a1111_bodies import Img2ImgBody

DEFAULT_BLUR = 4.0
"""Pixels."""

CROPPED = (1, 2)
"""Resize modes that keep the proportions; the others stretch."""


def prepared(body: Img2ImgBody, max_pixels: int) -> tuple[list[bytes], bytes | None]:
    """Source pictures and mask as PNG, all of them of the size asked for, or of the first picture's.

    Raises InvalidPicture.
    """
    size = (body.width or 512, body.height or 512) if body.width or body.height else None
    mode = body.resize_mode or 0
    images = []
    for index, text in enumerate(body.init_images):  # one at a time: a decoded picture is large
        source = _opened(text, f"init_images[{index}]", max_pixels)
        size = size or source.size
        images.append(_png(_fitted(source, size, mode)))
    if not body.mask or not size:
        return images, None
    mask = _mask(_opened(body.mask, "mask", max_pixels))
    if body.inpainting_mask_invert:
        mask = ImageOps.invert(mask)
    blur = DEFAULT_BLUR if body.mask_blur is None else body.mask_blur
    if blur:
        mask = mask.filter(ImageFilter.GaussianBlur(blur))
    return images, _png(_fitted(mask, size, mode))


def _opened(text: str, param: str, max_pixels: int) -> Image.Image:
    data = pictures.from_text(text, param)
    return pictures.decoded(pictures.normalise(data, param, max_pixels))


def _mask(image: Image.Image) -> Image.Image:
    """White where the picture is to be redrawn: where it is opaque, if something of it is not; else where it is light.

    An alpha channel means the reverse of what OpenAI's masks mean by it.
    """
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        return image.getchannel("A").point([0] * 129 + [255] * 127)
    return image.convert("L")


def _fitted(image: Image.Image, size: tuple[int, int], mode: int) -> Image.Image:
    if image.size == size:
        return image
    if mode in CROPPED:
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
