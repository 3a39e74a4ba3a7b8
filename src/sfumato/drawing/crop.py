"""The area of a picture around its mask, for requests that redraw only that area, at the model's own size."""

from __future__ import annotations

from PIL import Image

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are exclusive."""


def around(mask: Image.Image, padding: int, shape: tuple[int, int]) -> Box:
    """The masked area of `mask` (L, not all black) plus `padding` pixels, widened to the aspect ratio of `shape`.

    Clipped to the picture, so in a narrow picture the aspect ratio may differ.
    """
    found = mask.getbbox()
    assert found, "the mask must not be all black"
    left, top = (max(0, side - padding) for side in found[:2])
    right, bottom = (min(most, side + padding) for side, most in zip(found[2:], mask.size, strict=True))
    width, height = right - left, bottom - top
    wide, high = shape
    if width * high < height * wide:
        left, right = _widened(left, right, -(-height * wide // high), mask.width)
    else:
        top, bottom = _widened(top, bottom, -(-width * high // wide), mask.height)
    return left, top, right, bottom


def pasted(picture: Image.Image, drawn: Image.Image, mask: Image.Image, box: Box) -> Image.Image:
    """`picture` with `drawn`, scaled to `box`, where the mask is white; unchanged elsewhere."""
    size = (box[2] - box[0], box[3] - box[1])
    whole = picture.convert(drawn.mode)
    part = drawn if drawn.size == size else drawn.resize(size, Image.Resampling.LANCZOS)
    whole.paste(part, box, mask.crop(box))
    return whole


def _widened(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """`first` to `last`, extended on both sides to `length` within 0 to `most`."""
    length = min(max(length, last - first), most)
    first = min(max(0, first - (length - (last - first)) // 2), most - length)
    return first, first + length
