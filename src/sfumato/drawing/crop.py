"""Areas of a picture: around its mask, if only that is redrawn; its place in a larger one that the model draws."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sfumato.errors import InvalidRequest

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""


def around(mask: Image.Image, padding: int, shape: tuple[int, int]) -> Box:
    """The masked area of `mask` (L) plus `padding` pixels, widened to the aspect ratio of `shape`.

    Clipped to the picture, so in a narrow picture the aspect ratio may differ. Raises InvalidRequest if the mask is all
    black: AUTOMATIC1111's may be, by itself or once its edge is blurred.
    """
    bounds = mask.getbbox()
    if bounds is None:
        raise InvalidRequest(
            "mask: nothing of it is white (after inversion and mask_blur), so there is no area to redraw. Mark a "
            "larger one, or leave out `mask` to redraw the whole picture",
            param="mask",
        )
    left, top = (max(0, side - padding) for side in bounds[:2])
    right, bottom = (min(limit, side + padding) for side, limit in zip(bounds[2:], mask.size, strict=True))
    width, height = right - left, bottom - top
    wide, high = shape
    if width * high < height * wide:
        left, right = _widened(left, right, -(-height * wide // high), mask.width)
    else:
        top, bottom = _widened(top, bottom, -(-width * high // wide), mask.height)
    return left, top, right, bottom


def pasted(picture: Image.Image, redrawn: Image.Image, mask: Image.Image, box: Box) -> Image.Image:
    """`picture` with `redrawn`, scaled to `box`, where the mask is white; unchanged elsewhere."""
    size = (box[2] - box[0], box[3] - box[1])
    whole = picture.convert(redrawn.mode)
    part = redrawn if redrawn.size == size else redrawn.resize(size, Image.Resampling.LANCZOS)
    whole.paste(part, box, mask.crop(box))
    return whole


def multiple_of(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The next size whose sides are multiples of this many pixels."""
    width, height = (-(-side // multiple) * multiple for side in size)
    return width, height


def centred(size: tuple[int, int], within: tuple[int, int]) -> Box:
    """The area of this size in the middle of a larger picture."""
    left, top = ((outer - inner) // 2 for outer, inner in zip(within, size, strict=True))
    return left, top, left + size[0], top + size[1]


def extended(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """A picture of this size with `image` (any mode of 8 bits) at `box`, and its edge repeated around it."""
    left, top, right, bottom = box
    around = [(top, size[1] - bottom), (left, size[0] - right)] + [(0, 0)] * (len(image.getbands()) > 1)
    return Image.fromarray(np.pad(np.asarray(image), around, mode="edge"))


def _widened(first: int, last: int, length: int, limit: int) -> tuple[int, int]:
    """`first` to `last`, extended on both sides to `length` within 0 to `limit`."""
    length = min(max(length, last - first), limit)
    first = min(max(0, first - (length - (last - first)) // 2), limit - length)
    return first, first + length
