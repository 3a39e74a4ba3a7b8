"""The part of a picture around its mask, for those who have only that part drawn, at the model's own size."""

from __future__ import annotations

from PIL import Image

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are the first outside."""


def around(mask: Image.Image, padding: int, shape: tuple[int, int]) -> Box:
    """The masked part of `mask` (L, not all black), `padding` pixels more, widened to the proportions of `shape`.

    Where the picture ends it ends too: in a narrow picture the proportions may differ.
    """
    found = mask.getbbox()
    assert found, "a mask marks something"
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
    """`picture` with `drawn`, scaled to `box`, where the mask is white; elsewhere it is as it was."""
    size = (box[2] - box[0], box[3] - box[1])
    whole = picture.convert(drawn.mode)
    part = drawn if drawn.size == size else drawn.resize(size, Image.Resampling.LANCZOS)
    whole.paste(part, box, mask.crop(box))
    return whole


def _widened(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """`first` to `last`, grown on both sides to `length` as far as 0 to `most` lets it."""
    length = min(max(length, last - first), most)
    first = min(max(0, first - (length - (last - first)) // 2), most - length)
    return first, first + length
