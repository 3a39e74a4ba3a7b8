"""Run a VAE in tiles for one request: a large picture or a long clip in a fraction of the memory.

Pixels differ slightly where tiles meet, so it applies to one request and not to others on the same VAE.
"""

from __future__ import annotations

import copy
from typing import Any

NAME = "vae"
"""Name of the component that supports tiling."""


TILING, SLICING = "use_tiling", "use_slicing"
"""Attributes of those that support it: every autoencoder inherits the methods, and raises in them without these."""


FRAMEWISE = "use_framewise_decoding"
"""Attribute of video VAEs that decode all frames at once unless it is set (LTX, LTX-2, Mochi); others never do."""


def can_tile(pipeline: Any) -> bool:
    return hasattr(getattr(pipeline, NAME, None), TILING)


def tiled(vae: Any) -> Any:
    """A copy of `vae` with the same weights that works in tiles, one picture and a few frames at a time."""
    copied = copy.copy(vae)
    for attribute, enable in ((SLICING, "enable_slicing"), (TILING, "enable_tiling")):
        if hasattr(copied, attribute):
            getattr(copied, enable)()
    if hasattr(copied, FRAMEWISE):
        setattr(copied, FRAMEWISE, True)
    return copied
