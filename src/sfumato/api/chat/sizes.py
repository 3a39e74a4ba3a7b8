"""`image_config`, as OpenRouter has it: a picture's size by its proportions and its resolution."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sfumato.api.fields import BLANK

SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "1:1": (1024, 1024), "2:3": (832, 1248), "3:2": (1248, 832), "3:4": (864, 1184), "4:3": (1184, 864),
        "4:5": (896, 1152), "5:4": (1152, 896), "9:16": (768, 1344), "16:9": (1344, 768), "21:9": (1536, 672),
    }
)  # fmt: skip
"""Proportions → width and height at 1K, of OpenRouter's documentation; those of others are computed."""

RESOLUTIONS: Mapping[str, float] = MappingProxyType({"512": 0.5, "0.5K": 0.5, "1K": 1.0, "2K": 2.0, "4K": 4.0})
"""Value of `image_size` → factor of each side at 1K."""

SIDE = 1024
"""Of a square at 1K."""

_RATIO = re.compile(r"(\d{1,4}(?:\.\d{1,4})?):(\d{1,4}(?:\.\d{1,4})?)", re.ASCII)


class ImageConfig(BaseModel):
    """OpenRouter's `image_config`; what else it may have is listed as ignored."""

    model_config = ConfigDict(extra="allow")

    aspect_ratio: Annotated[str | None, BLANK] = Field(
        None,
        max_length=20,
        description="WIDTH:HEIGHT, such as 16:9. Alone: as many pixels as the model draws by itself.",
    )
    image_size: Annotated[str | None, BLANK] = Field(
        None,
        max_length=20,
        description=f"{', '.join(RESOLUTIONS)}: 1K has the pixels of a square of {SIDE} a side. Needs an aspect ratio "
        "if there is a source picture.",
    )

    @field_validator("aspect_ratio")
    @classmethod
    def _is_a_ratio(cls, value: str | None) -> str | None:
        plain = (value or "auto").replace(" ", "").lower()
        if plain == "auto":
            return None
        match = _RATIO.fullmatch(plain)
        if not match or not float(match[1]) or not float(match[2]):
            raise ValueError("WIDTH:HEIGHT is valid, such as 1:1, 16:9 or 2:3")
        return plain

    @field_validator("image_size")
    @classmethod
    def _is_a_resolution(cls, value: str | None) -> str | None:
        plain = (value or "auto").strip().upper()
        if plain == "AUTO":
            return None
        if plain not in RESOLUTIONS:
            raise ValueError(f"{', '.join(RESOLUTIONS)} are valid; for others send `size` as WIDTHxHEIGHT")
        return plain

    def size(self, own: tuple[int, int], multiple: int) -> tuple[int, int]:
        """Width and height in pixels, multiples of `multiple`. `own`: what the model draws by itself."""
        proportion = _proportion(self.aspect_ratio) or own[0] / own[1]
        pixels = own[0] * own[1]
        if self.image_size is not None:
            pixels = int((SIDE * RESOLUTIONS[self.image_size]) ** 2)
        if width_and_height := SIZES.get(self.aspect_ratio or ""):
            factor = math.sqrt(pixels) / SIDE
            width, height = (side * factor for side in width_and_height)
            if width % multiple == height % multiple == 0:
                return int(width), int(height)
        return _of_pixels(pixels, proportion, multiple)


def _proportion(ratio: str | None) -> float | None:
    """Width through height."""
    if ratio is None:
        return None
    width, height = ratio.split(":")
    return float(width) / float(height)


def _of_pixels(pixels: int, proportion: float, multiple: int) -> tuple[int, int]:
    width, height = math.sqrt(pixels * proportion), math.sqrt(pixels / proportion)
    return max(1, round(width / multiple)) * multiple, max(1, round(height / multiple)) * multiple
