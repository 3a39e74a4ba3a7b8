"""Run a VAE in tiles for one request: a large picture in a fraction of the memory.

Pixels differ slightly where tiles meet, so it applies to one request and not to others on the same VAE.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAME = "vae"
"""Name of the component that supports tiling."""


TILING, SLICING = "use_tiling", "use_slicing"
"""Attributes of those that support it: every autoencoder inherits the methods, and raises in them without these."""


def can_tile(pipeline: Any) -> bool:
    return hasattr(getattr(pipeline, NAME, None), TILING)


@contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Inside the context `vae` works in tiles, one picture at a time; afterwards as before."""
    before = dict(vars(vae))
    try:
        for attribute, enable in ((SLICING, "enable_slicing"), (TILING, "enable_tiling")):
            if hasattr(vae, attribute):
                getattr(vae, enable)()
        yield
    finally:
        for name, value in list(vars(vae).items()):
            if name not in before:
                delattr(vae, name)
            elif before[name] is not value:
                setattr(vae, name, before[name])
